"""Full distillations of students that searches found: submit, list, read, follow, cancel, download and delete them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import FileResponse, StreamingResponse
from starlette.responses import PlainTextResponse, Response

from api.bodies import JsonBodyDep, read_no_body
from api.conditional import etag_of, is_unchanged, not_modified
from api.cursors import AfterCursor, decode_cursor, encode_cursor, page_of
from api.distillations import describe_distillation, detail_distillation, summarise_distillation
from api.feed import Feed, Stream
from api.files import send_file
from api.once import Once, OnceDep
from api.openapi import DISTIL_BODY, accepted_answer, event_stream_answer, file_answers, made_answer, problems, versioned_answer
from api.principal import PrincipalDep
from api.routes.dependencies import MAX_INTEGER, SEARCH_ID, SettingsDep, StoreDep
from api.routes.events import LastEventId, page_of_events, stream_of
from api.schemas.common import Page
from api.schemas.distillations import DistillationAnswer, DistillationDetail, DistillationState, DistillationSummary
from api.schemas.events import EventAnswer
from api.threads import fetching
from nas.distillations import check_distillation, parse_distillation
from nas.errors import Conflict, NotFound
from nas.settings import Settings
from nas.store.records import SearchRecord, SearchState
from nas.store.store import Store
from nas.tracing import current_traceparent

router = APIRouter(tags=["distillations"])

_ID = re.compile(r"dist_[0-9a-z]{1,64}")
_ORDER = "distillations"


def get_distillation(
    distillation_id: Annotated[str, Path(description="The distillation's id: `dist_...`.")], store: StoreDep, principal: PrincipalDep
) -> SearchRecord:
    """The distillation of the path; another project's is none."""
    if not _ID.fullmatch(distillation_id):
        raise NotFound(f"distillation: expected an id such as dist_1f2e3d, got {distillation_id!r}")
    return store.get_distillation(distillation_id, project=principal.project)


DistillationDep = Annotated[SearchRecord, Depends(get_distillation)]


async def open_stream(distillation: DistillationDep, request: Request) -> AsyncIterator[Stream]:
    """A place in the feed, given back when the answer has ended, however it ended."""
    feed: Feed = request.app.state.feed
    with feed.subscribe(distillation) as stream:
        yield stream


@router.post(
    "/distillations",
    operation_id="submit_distillation",
    summary="Submit a full distillation",
    status_code=201,
    openapi_extra=DISTIL_BODY,
    responses={**made_answer(), **problems(409, 413, 415, 422)},
)
async def submit_distillation(
    store: StoreDep, settings: SettingsDep, principal: PrincipalDep, body: JsonBodyDep, once: OnceDep, response: Response
) -> DistillationAnswer:
    """Distil a search's student in full, by its bundle's recipe: the winner, or a trial that was verified. It is queued; 409 until the search has succeeded."""
    made = await fetching(partial(_submit, body, store=store, settings=settings, project=principal.project, once=once))
    response.headers["Location"] = f"/v1/distillations/{made.id}"
    response.headers["ETag"] = etag_of(made.version)
    return describe_distillation(made)


def _submit(body: bytes, *, store: Store, settings: Settings, project: str, once: Once) -> SearchRecord:
    asked = parse_distillation(body)

    def plan() -> Callable[[], SearchRecord]:
        planned = check_distillation(asked, store=store, settings=settings, project=project)
        return partial(
            store.create_distillation,
            search_id=asked.search_id,
            trial=planned.trial,
            spec=planned.spec,
            inputs=planned.inputs,
            tokens=planned.tokens,
            label=asked.label,
            project=project,
            traceparent=current_traceparent(),
        )

    return once.new_search(plan)


@router.get("/distillations", operation_id="list_distillations", summary="List full distillations", responses=problems(422))
def list_distillations(
    store: StoreDep,
    principal: PrincipalDep,
    search: Annotated[str | None, Query(pattern=f"^{SEARCH_ID.pattern}$", description="Only those of this search's students.")] = None,
    state: Annotated[DistillationState | None, Query(description="Only those in this state.")] = None,
    after: AfterCursor = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
) -> Page[DistillationSummary]:
    """Full distillations, newest first. Pages stay in step while new ones arrive."""
    found = store.list_distillations(
        project=principal.project,
        search_id=search,
        state=None if state is None else SearchState(state),
        after=None if after is None else decode_cursor(after, order=_ORDER, kinds=((str,),))[0],
        limit=limit + 1,
    )
    return page_of(found, limit=limit, answer=summarise_distillation, cursor=lambda found: encode_cursor(_ORDER, found.id))


@router.get(
    "/distillations/{distillation_id}",
    operation_id="get_distillation",
    summary="Get a full distillation",
    response_model=DistillationDetail,
    responses={**versioned_answer(), **problems(404)},
)
def read_distillation(distillation: DistillationDep, store: StoreDep, request: Request, response: Response) -> object:
    """State, recipe, attempts, learning curve, and what came out."""
    detail = describe_now(distillation, store=store)
    # No row counts the curve's points: the version is the content.
    etag = etag_of(hashlib.sha256(detail.model_dump_json(exclude={"seconds_left"}).encode()).hexdigest()[:32])
    if is_unchanged(request, etag):
        return not_modified(etag)
    response.headers["ETag"] = etag
    return detail


def describe_now(distillation: SearchRecord, *, store: Store) -> DistillationDetail:
    attempts = store.list_attempts(distillation.id)
    return detail_distillation(distillation, attempts=attempts, points=store.list_points(distillation.id, trial=distillation.spec["trial"]))


@router.post(
    "/distillations/{distillation_id}/cancel",
    operation_id="cancel_distillation",
    summary="Cancel a full distillation",
    status_code=202,
    responses={**accepted_answer(), **problems(404, 409, 413, 422)},
    dependencies=[Depends(read_no_body)],
)
def cancel_distillation(distillation: DistillationDep, store: StoreDep, once: OnceDep) -> DistillationAnswer:
    """Stop a distillation; what it has trained goes. Again is no error; a finished one is a 409."""
    return describe_distillation(once.search(lambda: store.request_cancel(distillation.id)))


@router.delete(
    "/distillations/{distillation_id}",
    operation_id="delete_distillation",
    summary="Delete a full distillation",
    status_code=204,
    responses=problems(404, 409),
)
def delete_distillation(distillation: DistillationDep, store: StoreDep) -> None:
    """Forget a distillation that has ended, with its file, which goes soon afterwards. 409 while it has not ended."""
    store.delete_search(distillation.id)


@router.get(
    "/distillations/{distillation_id}/events",
    operation_id="list_distillation_events",
    summary="List a full distillation's events",
    responses=problems(404, 422),
)
def list_events(
    distillation: DistillationDep,
    store: StoreDep,
    after: Annotated[int, Query(ge=0, le=MAX_INTEGER, description="Only events after this sequence number.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page[EventAnswer]:
    """What happened, in order."""
    return page_of_events(distillation.id, store=store, after=after, limit=limit)


@router.get(
    "/distillations/{distillation_id}/events/stream",
    operation_id="stream_distillation_events",
    summary="Follow a full distillation's events",
    response_class=StreamingResponse,
    responses={**event_stream_answer(), **problems(404, 422, 503)},
)
async def stream_events(
    stream: Annotated[Stream, Depends(open_stream)],
    distillation: DistillationDep,
    after: Annotated[int, Query(ge=0, le=MAX_INTEGER, description="Only events after this sequence number.")] = 0,
    last_event_id: LastEventId = None,
) -> StreamingResponse:
    """Server-sent events: past ones first, then as they happen. The stream ends after the event that ends the distillation."""
    return stream_of(stream, name=distillation.id, after=after, last_event_id=last_event_id)


@router.get(
    "/distillations/{distillation_id}/log",
    operation_id="get_distillation_log",
    summary="Get a full distillation's log",
    response_class=PlainTextResponse,
    responses=problems(404, 422),
)
def read_log(
    distillation: DistillationDep,
    store: StoreDep,
    attempt: Annotated[str | None, Query(max_length=64, description="Its id: `att_...`; left out, the latest attempt's.")] = None,
) -> PlainTextResponse:
    """The end of what an attempt said, 64 KiB at most; of one that runs, what it had said a few seconds ago."""
    wanted = attempt or next((record.id for record in store.list_attempts(distillation.id, limit=1)), "")
    log = store.read_log(wanted)
    if log is None or log.search_id != distillation.id:
        raise NotFound(f"log: expected an attempt of {distillation.id} that has said something and is not too old, got {wanted!r}")
    return PlainTextResponse(log.text)


@router.get(
    "/distillations/{distillation_id}/file",
    operation_id="download_distillation",
    summary="Download what a full distillation made",
    response_class=FileResponse,
    responses={**file_answers(), **problems(404, 409)},
)
async def download_distillation(distillation: DistillationDep, request: Request, settings: SettingsDep) -> Response:
    """The distilled model as one tar file: a folder that plain transformers loads, and what was measured. 409 until it has succeeded."""
    result = distillation.winner
    if distillation.state is not SearchState.SUCCEEDED or result is None:
        raise Conflict(f"distillation {distillation.id}: expected the state succeeded, got {distillation.state}; there is no file yet")
    return await fetching(partial(send_file, result["file"], sha256=result["sha256"], name=f"{distillation.id}.tar", request=request, settings=settings))
