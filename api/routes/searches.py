"""Submit, price, list, read and cancel searches."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, Header, Query
from starlette.responses import Response

from api.openapi import SUBMIT_BODY, problems
from api.routes.dependencies import SEARCH_ID, BodyDep, SearchDep, StoreDep
from api.schemas.common import Page
from api.schemas.searches import PreviewAnswer, SearchAnswer, SearchSummary
from api.summary import describe_inputs, describe_search, summarise_search
from nas.errors import InvalidSpec, Problem
from nas.shape import Shape
from nas.spec import dump_spec, parse_spec
from nas.store.records import SearchRecord, SearchState
from nas.store.store import Store
from nas.submission import ask_about, check_submission, estimate_time

router = APIRouter(tags=["searches"])


@router.post(
    "/searches",
    operation_id="submit_search",
    summary="Submit a search",
    status_code=201,
    openapi_extra=SUBMIT_BODY,
    responses=problems(409, 413, 415, 422),
)
def submit_search(
    store: StoreDep,
    body: BodyDep,
    response: Response,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=200, pattern=r"^[!-~]+$", description="Any text; the same key and body again give the same search.")
    ] = None,
) -> SearchAnswer:
    """Check and price a spec, and queue it. Nothing is computed on the teacher yet."""
    spec = parse_spec(body)
    submission = check_submission(spec, store=store)
    search, created = store.create_search(
        spec=dump_spec(submission.spec),
        inputs=submission.inputs,
        plan=submission.plan,
        label=spec.label,
        labels=spec.labels,
        idempotency_key=idempotency_key,
        body_digest=hashlib.sha256(body).hexdigest() if idempotency_key else None,
    )
    response.headers["Location"] = f"/v1/searches/{search.id}"
    if not created:
        response.headers["Idempotency-Replayed"] = "true"
    return _answer_search(search, store=store)


@router.post(
    "/searches:preview",
    operation_id="preview_search",
    summary="Check and price a spec",
    openapi_extra=SUBMIT_BODY,
    responses=problems(413, 415, 422),
)
def preview_search(
    store: StoreDep,
    body: BodyDep,
    shape: Annotated[list[str], Query(max_length=100, description="Shapes to ask about, as the leaderboard writes them: `L4-D56-F144-H4-K4-E8`.")] = [],  # noqa: B006  (FastAPI copies it)
) -> PreviewAnswer:
    """The same checks as a submit, the plan that it would store, and how long it would take; no search is stored."""
    spec = parse_spec(body)
    asked = [Shape.from_key(key) for key in shape]
    submission = check_submission(spec, store=store)
    speed = store.wish_speed(cpus=spec.resources.cpus, gpus=spec.resources.gpus, dtype=spec.distillation.dtype)
    return PreviewAnswer(
        spec=dump_spec(spec),
        plan=submission.plan,
        inputs=describe_inputs(submission.inputs),
        time=estimate_time(submission, speed=speed),
        asked=[ask_about(submission, shape) for shape in asked],
    )


@router.get("/searches", operation_id="list_searches", summary="List searches", responses=problems(422))
def list_searches(
    store: StoreDep,
    state: Annotated[SearchState | None, Query(description="Only searches in this state.")] = None,
    after: Annotated[str | None, Query(max_length=100, description="`next_cursor` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
) -> Page[SearchSummary]:
    """Searches, newest first. Pages stay in step while new searches arrive."""
    if after is not None and not SEARCH_ID.fullmatch(after):
        raise InvalidSpec(Problem(field="after", expected="the next_cursor of a page", got=repr(after)))
    found = store.list_searches(state=state, after=after, limit=limit + 1)
    data = [summarise_search(search, counts=store.search_counts(search.id)) for search in found[:limit]]
    has_more = len(found) > limit
    return Page(data=data, has_more=has_more, next_cursor=data[-1].id if has_more else None)


@router.get("/searches/{search_id}", operation_id="get_search", summary="Get a search", responses=problems(404))
def read_search(search: SearchDep, store: StoreDep) -> SearchAnswer:
    """State, progress, plan, cost and error of a search."""
    return _answer_search(search, store=store)


def _answer_search(search: SearchRecord, *, store: Store) -> SearchAnswer:
    return describe_search(search, trials=store.list_trials(search.id), rungs=store.list_rungs(search.id, with_documents=False))


@router.post(
    "/searches/{search_id}/cancel",
    operation_id="cancel_search",
    summary="Cancel a search",
    status_code=202,
    responses=problems(404, 409),
)
def cancel_search(search: SearchDep, store: StoreDep) -> SearchAnswer:
    """Stop a search; trials in flight are given a moment to end. Again is no error; a finished search is a 409."""
    return _answer_search(store.request_cancel(search.id), store=store)
