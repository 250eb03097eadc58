"""Submit, price, list, read, change and delete searches; pause, resume and cancel them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import AwareDatetime, BeforeValidator, StringConstraints
from starlette.responses import Response

from api.bodies import JsonBodyDep, read_no_body
from api.conditional import check_match, etag_of, is_unchanged, not_modified
from api.cursors import AfterCursor, decode_cursor, encode_cursor, page_of
from api.once import Once, OnceDep
from api.openapi import SUBMIT_BODY, UPDATE_BODY, accepted_answer, made_answer, problems, versioned_answer
from api.principal import PrincipalDep
from api.routes.dependencies import SearchDep, StoreDep
from api.schemas.common import Page
from api.schemas.searches import UPDATE_ADAPTER, PreviewAnswer, SearchAnswer, SearchSummary
from api.summary import describe_inputs, describe_search, summarise_search
from api.threads import submitting
from nas.shape import Shape
from nas.spec import LINE, dump_spec, parse_spec
from nas.store.records import SearchRecord, SearchState, TrialCounts
from nas.store.store import Store
from nas.strict_json import read_object, validate
from nas.submission import ask_about, check_submission, estimate_time
from nas.tracing import current_traceparent

router = APIRouter(tags=["searches"])

_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def _check_time(text: str) -> str:
    if not _TIME.fullmatch(text):
        raise ValueError("a time such as 2026-11-22T09:30:00Z")
    return text


LabelQuery = Annotated[str, StringConstraints(pattern=rf"^[A-Za-z0-9][A-Za-z0-9._/-]{{0,62}}:{LINE}$")]
Time = Annotated[AwareDatetime, BeforeValidator(_check_time)]
"""RFC 3339 with its zone; pydantic alone also takes numbers for seconds since 1970."""

_Route = TypeVar("_Route", bound=Callable[..., Any])


@router.post(
    "/searches",
    operation_id="submit_search",
    summary="Submit a search",
    status_code=201,
    openapi_extra=SUBMIT_BODY,
    responses={**made_answer(), **problems(409, 413, 415, 422)},
)
async def submit_search(store: StoreDep, principal: PrincipalDep, body: JsonBodyDep, once: OnceDep, response: Response) -> SearchAnswer:
    """Check and price a spec, and queue it. Nothing is computed on the teacher yet."""
    return await submitting(partial(_submit, body, store=store, project=principal.project, once=once, response=response))


def _submit(body: bytes, *, store: Store, project: str, once: Once, response: Response) -> SearchAnswer:
    spec = parse_spec(body)

    def plan() -> Callable[[], SearchRecord]:
        submission = check_submission(spec, store=store, project=project)
        return partial(
            store.create_search,
            spec=dump_spec(submission.spec),
            inputs=submission.inputs,
            plan=submission.plan,
            label=spec.label,
            labels=spec.labels,
            project=project,
            traceparent=current_traceparent(),
        )

    search = once.new_search(plan)
    response.headers["Location"] = f"/v1/searches/{search.id}"
    return _answer(search, store=store, response=response)


@router.post(
    "/searches:preview",
    operation_id="preview_search",
    summary="Check and price a spec",
    openapi_extra=SUBMIT_BODY,
    responses=problems(413, 415, 422),
)
async def preview_search(
    store: StoreDep,
    principal: PrincipalDep,
    body: JsonBodyDep,
    shape: Annotated[list[str], Query(max_length=100, description="Shapes to ask about, as the leaderboard writes them: `L4-D56-F144-H4-K4-E8`.")] = [],  # noqa: B006  (FastAPI copies it)
) -> PreviewAnswer:
    """The same checks as a submit, the plan that it would store, and how long it would take; no search is stored."""
    return await submitting(partial(_preview, body, shapes=shape, store=store, project=principal.project))


def _preview(body: bytes, *, shapes: Sequence[str], store: Store, project: str) -> PreviewAnswer:
    spec = parse_spec(body)
    asked = [Shape.from_key(key) for key in shapes]
    submission = check_submission(spec, store=store, project=project)
    speed = store.wish_speed(cpus=spec.resources.cpus, gpus=spec.resources.gpus, dtype=spec.distillation.dtype)
    return PreviewAnswer(
        spec=dump_spec(spec),
        plan=submission.plan,
        inputs=describe_inputs(submission.inputs),
        time=estimate_time(submission, speed=speed),
        asked=ask_about(submission, asked),
    )


@router.get("/searches", operation_id="list_searches", summary="List searches", responses=problems(422))
def list_searches(
    store: StoreDep,
    principal: PrincipalDep,
    state: Annotated[SearchState | None, Query(description="Only searches in this state.")] = None,
    label: Annotated[list[LabelQuery], Query(max_length=32, description="Only searches with this label, as `name:value`; several must all be there.")] = [],  # noqa: B006  (FastAPI copies it)
    created_after: Annotated[Time | None, Query(description="Only searches submitted at this time or later (RFC 3339).")] = None,
    created_before: Annotated[Time | None, Query(description="Only searches submitted before this time.")] = None,
    after: AfterCursor = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
) -> Page[SearchSummary]:
    """Searches, newest first. Pages stay in step while new searches arrive."""
    found = store.list_searches(
        project=principal.project,
        state=state,
        labels=_read_labels(label),
        created_after=created_after,
        created_before=created_before,
        after=None if after is None else decode_cursor(after, order="searches", kinds=((str,),))[0],
        limit=limit + 1,
    )
    counts = store.trial_counts([search.id for search in found])
    return page_of(
        found,
        limit=limit,
        answer=lambda search: summarise_search(search, counts=counts[search.id]),
        cursor=lambda search: encode_cursor("searches", search.id),
    )


def _read_labels(texts: Sequence[str]) -> dict[str, str]:
    """`name:value` each; a name has no colon, a value may."""
    labels: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition(":")
        if labels.get(name, value) != value:
            message = "Input should be name:value, each name with one value"
            raise RequestValidationError([{"type": "value_error", "loc": ("query", "label"), "msg": message, "input": text[:80]}])
        labels[name] = value
    return labels


@router.get(
    "/searches/{search_id}",
    operation_id="get_search",
    summary="Get a search",
    response_model=SearchAnswer,
    responses={**versioned_answer(), **problems(404)},
)
def read_search(search: SearchDep, store: StoreDep, request: Request, response: Response) -> object:
    """State, progress, plan, cost and error of a search. Its ETag is its version, which grows with everything that happens to it."""
    if is_unchanged(request, etag_of(search.version)):
        return not_modified(etag_of(search.version))
    return _answer(search, store=store, response=response)


@router.patch(
    "/searches/{search_id}",
    operation_id="update_search",
    summary="Change a search",
    openapi_extra=UPDATE_BODY,
    responses=problems(404, 409, 412, 413, 415, 422, 428),
)
def update_search(search: SearchDep, body: JsonBodyDep, store: StoreDep, request: Request, response: Response) -> SearchAnswer:
    """Extend or narrow a search that has not ended: its trials, how many of them run at once, its labels. If-Match names the version that was decided on."""
    changes = validate(read_object(body), adapter=UPDATE_ADAPTER)
    is_named = check_match(request, etag_of(search.version))
    changed = store.update_search(
        search.id,
        version=search.version if is_named else None,
        max_trials=changes.max_trials,
        max_parallel_trials=changes.max_parallel_trials,
        labels=changes.labels,
    )
    return _answer(changed, store=store, response=response)


@router.delete("/searches/{search_id}", operation_id="delete_search", summary="Delete a search", status_code=204, responses=problems(404, 409))
def delete_search(search: SearchDep, store: StoreDep) -> None:
    """Forget a search that has ended, with its trials and events; its files go soon afterwards. 409 while it has not ended, or another one builds on it."""
    store.delete_search(search.id)


def _act(path: str, *, operation_id: str, summary: str) -> Callable[[_Route], _Route]:
    """A route of a request to a search: 202, since its controller sees to it."""
    return router.post(
        f"/searches/{{search_id}}/{path}",
        operation_id=operation_id,
        summary=summary,
        status_code=202,
        responses={**accepted_answer(), **problems(404, 409, 413, 422)},
        dependencies=[Depends(read_no_body)],
    )


@_act("cancel", operation_id="cancel_search", summary="Cancel a search")
def cancel_search(search: SearchDep, store: StoreDep, once: OnceDep, response: Response) -> SearchAnswer:
    """Stop a search; trials in flight are given a moment to end. Again is no error; a finished search is a 409."""
    return _answer(once.search(lambda: store.request_cancel(search.id)), store=store, response=response)


@_act("pause", operation_id="pause_search", summary="Pause a search")
def pause_search(search: SearchDep, store: StoreDep, once: OnceDep, response: Response) -> SearchAnswer:
    """Start nothing more; what runs is asked to stop, keeps its checkpoints, and goes on from them later. Again is no error."""
    return _answer(once.search(lambda: store.request_pause(search.id)), store=store, response=response)


@_act("resume", operation_id="resume_search", summary="Resume a search")
def resume_search(search: SearchDep, store: StoreDep, once: OnceDep, response: Response) -> SearchAnswer:
    """Queue a paused search again. One that is not paused is left as it is."""
    return _answer(once.search(lambda: store.request_resume(search.id)), store=store, response=response)


def _answer(search: SearchRecord, *, store: Store, response: Response) -> SearchAnswer:
    response.headers["ETag"] = etag_of(search.version)
    # Whose only event is its own creation has no trial.
    counts = TrialCounts(cells={}) if search.version == 1 else store.trial_counts([search.id])[search.id]
    return describe_search(search, counts=counts)
