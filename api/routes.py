"""The REST resources under /v1. Routes parse, call the store, present; what is legal and what it costs is decided in `nas/`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from api.openapi import SUBMIT_BODY, csv_answer, problems
from api.schemas import (
    AttemptAnswer,
    ComparisonAnswer,
    CorpusAnswer,
    EventAnswer,
    LeaderboardAnswer,
    Page,
    PointAnswer,
    PreviewAnswer,
    SearchAnswer,
    SearchSummary,
    TaskAnswer,
    TeacherAnswer,
    TrialAnswer,
    TrialDetail,
    WinnerAnswer,
)
from api.summary import describe_cost, describe_inputs, describe_rung, describe_search, describe_trial, leaderboard, leaderboard_csv, summarise_search
from nas.errors import Conflict, InvalidSpec, NotFound, Problem
from nas.search.comparison import Side, compare, comparison_as_dict
from nas.search.confirmed import Confirmation
from nas.search.results import RungResult
from nas.settings import Settings
from nas.shape import Shape
from nas.spec import dump_spec, parse_spec
from nas.store.records import EventRecord, SearchRecord, SearchState, all_winners
from nas.store.store import Store
from nas.submission import ask_about, check_submission, estimate_time

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""How often an open event stream looks for new events."""

MAX_BODY_BYTES = 2**20

MAX_INTEGER = 2**31 - 1
"""Trial numbers and event sequences are 32-bit in the store."""

_SEARCH_ID = re.compile(r"srch_[0-9a-z]{1,64}")

router = APIRouter(prefix="/v1")


def get_store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def get_settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


StoreDep = Annotated[Store, Depends(get_store)]


def get_search(search_id: Annotated[str, Path(description="The search's id: `srch_...`.")], store: StoreDep) -> SearchRecord:
    """The search of the path. Ids of another form never reach the database, which need not accept every character."""
    if not _SEARCH_ID.fullmatch(search_id):
        raise NotFound(f"search: expected an id such as srch_1f2e3d, got {search_id!r}")
    return store.get_search(search_id)


SearchDep = Annotated[SearchRecord, Depends(get_search)]


def get_other(store: StoreDep, other_id: Annotated[str, Query(alias="with", description="The id of the other search: `srch_...`.")]) -> SearchRecord:
    return get_search(other_id, store)


OtherDep = Annotated[SearchRecord, Depends(get_other)]
TrialNumber = Annotated[int, Path(ge=0, le=MAX_INTEGER, description="The trial's number within its search.")]
BudgetIndex = Annotated[int, Query(ge=0, le=15, description="Which budget of a search that has several: 0 the first, 1 the first of `more_budgets`, ...")]


async def read_json_body(request: Request) -> bytes:
    """The raw body: `parse_spec` reads it itself, so that its errors name the field, and NaN is seen.

    Asking for the JSON media type also makes a browser ask before another site's page may send one.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"Content-Type: expected application/json, got {media_type or 'nothing'}")
    # FastAPI's own limit answers in plain text, and from outside every handler of ours.
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body: expected at most {MAX_BODY_BYTES} bytes, got more")
    return bytes(body)


BodyDep = Annotated[bytes, Depends(read_json_body)]


@router.get("/teachers", tags=["registry"], operation_id="list_teachers", summary="List teachers")
def list_teachers(store: StoreDep) -> Page[TeacherAnswer]:
    """Teachers that the operator has registered (`nas teachers add`), by name."""
    return Page(data=[TeacherAnswer.model_validate(record) for record in store.list_teachers()])


@router.get("/corpora", tags=["registry"], operation_id="list_corpora", summary="List corpora")
def list_corpora(store: StoreDep) -> Page[CorpusAnswer]:
    """Corpora that the operator has registered (`nas corpora add`), by name."""
    return Page(data=[CorpusAnswer.model_validate(record) for record in store.list_corpora()])


@router.get("/tasks", tags=["registry"], operation_id="list_tasks", summary="List tasks")
def list_tasks(store: StoreDep) -> Page[TaskAnswer]:
    """lm-eval tasks that the operator has registered (`nas tasks add`), by name."""
    return Page(data=[TaskAnswer.model_validate(record) for record in store.list_tasks()])


@router.post(
    "/searches",
    tags=["searches"],
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
        idempotency_key=idempotency_key,
        body_digest=hashlib.sha256(body).hexdigest() if idempotency_key else None,
    )
    response.headers["Location"] = f"/v1/searches/{search.id}"
    if not created:
        response.headers["Idempotency-Replayed"] = "true"
    return _answer_search(search, store=store)


@router.post(
    "/searches:preview",
    tags=["searches"],
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


@router.get("/searches", tags=["searches"], operation_id="list_searches", summary="List searches", responses=problems(422))
def list_searches(
    store: StoreDep,
    state: Annotated[SearchState | None, Query(description="Only searches in this state.")] = None,
    after: Annotated[str | None, Query(max_length=100, description="`next_cursor` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
) -> Page[SearchSummary]:
    """Searches, newest first. Pages stay in step while new searches arrive."""
    if after is not None and not _SEARCH_ID.fullmatch(after):
        raise InvalidSpec(Problem(field="after", expected="the next_cursor of a page", got=repr(after)))
    found = store.list_searches(state=state, after=after, limit=limit + 1)
    data = [summarise_search(search, counts=store.search_counts(search.id)) for search in found[:limit]]
    has_more = len(found) > limit
    return Page(data=data, has_more=has_more, next_cursor=data[-1].id if has_more else None)


@router.get("/searches/{search_id}", tags=["searches"], operation_id="get_search", summary="Get a search", responses=problems(404))
def read_search(search: SearchDep, store: StoreDep) -> SearchAnswer:
    """State, progress, plan, cost and error of a search."""
    return _answer_search(search, store=store)


def _answer_search(search: SearchRecord, *, store: Store) -> SearchAnswer:
    return describe_search(search, trials=store.list_trials(search.id), rungs=store.list_rungs(search.id, with_documents=False))


@router.post(
    "/searches/{search_id}/cancel",
    tags=["searches"],
    operation_id="cancel_search",
    summary="Cancel a search",
    status_code=202,
    responses=problems(404, 409),
)
def cancel_search(search: SearchDep, store: StoreDep) -> SearchAnswer:
    """Stop a search; trials in flight are given a moment to end. Again is no error; a finished search is a 409."""
    return _answer_search(store.request_cancel(search.id), store=store)


@router.get("/searches/{search_id}/trials", tags=["trials"], operation_id="list_trials", summary="List trials", responses=problems(404, 422))
def list_trials(
    search: SearchDep,
    store: StoreDep,
    after: Annotated[int, Query(ge=-1, le=MAX_INTEGER, description="`next_cursor` of the page before.")] = -1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> Page[TrialAnswer]:
    """The trials of a search, by number."""
    found = [trial for trial in store.list_trials(search.id) if trial.number > after]
    has_more = len(found) > limit
    data = [describe_trial(trial) for trial in found[:limit]]
    return Page(data=data, has_more=has_more, next_cursor=str(data[-1].number) if has_more else None)


@router.get("/searches/{search_id}/trials/{number}", tags=["trials"], operation_id="get_trial", summary="Get a trial", responses=problems(404, 422))
def read_trial(search: SearchDep, number: TrialNumber, store: StoreDep) -> TrialDetail:
    """One trial: its results by rung, attempts and learning curve."""
    trial = store.get_trial(search.id, number)
    return TrialDetail(
        **dict(describe_trial(trial)),
        rungs=[describe_rung(record) for record in store.list_rungs(search.id, trial=number, with_documents=False)],
        attempts=[AttemptAnswer.model_validate(record) for record in store.list_attempts(search.id, trial=number)],
        points=[PointAnswer.model_validate(record) for record in store.list_points(search.id, trial=number)],
    )


@router.get(
    "/searches/{search_id}/leaderboard",
    tags=["results"],
    operation_id="get_leaderboard",
    summary="Get the leaderboard",
    response_model=LeaderboardAnswer,
    responses={**csv_answer(), **problems(404, 422)},
)
def read_leaderboard(search: SearchDep, format: Annotated[Literal["json", "csv"], Query()] = "json", budget: BudgetIndex = 0) -> Any:
    """The board as it stands, of one budget of the search; empty before the first result."""
    board = leaderboard(search, budget=budget)
    if format == "json":
        return board
    text = leaderboard_csv(board, task_names=[task["name"] for task in search.spec["tasks"]])
    return PlainTextResponse(text, media_type="text/csv", headers={"Content-Disposition": f'attachment; filename="{search.id}.csv"'})


@router.get("/searches/{search_id}/compare", tags=["results"], operation_id="compare_searches", summary="Compare two searches", responses=problems(404, 422))
def compare_searches(search: SearchDep, other: OtherDep, store: StoreDep) -> ComparisonAnswer:
    """What was asked differently, the shapes on both boards, best against best, and what each took."""
    comparison = compare(load_side(search, store=store), load_side(other, store=store))
    costs = describe_cost(search.board), describe_cost(other.board)
    values = {**comparison_as_dict(comparison), "cost": costs, "searches": (search.id, other.id), "states": (search.state, other.state)}
    return ComparisonAnswer.model_validate(values)


def load_side(search: SearchRecord, *, store: Store) -> Side:
    """One search for `compare`: its board, and the results of its leader with their documents."""
    board = search.board or {}
    row = next((row for row in board.get("rows", ()) if row["number"] == board.get("leader")), None)
    best = held_out = None
    if row is not None:
        best = next((record.result for record in store.list_rungs(search.id, trial=row["number"]) if record.rung == row["rung"]), None)
        if (confirmation := store.list_confirmations(search.id).get(row["number"])) is not None:
            held_out = Confirmation.from_dict(confirmation).held_out
    return Side(spec=search.spec, inputs=search.inputs, board=board, best=None if best is None else RungResult.from_dict(best), held_out=held_out)


@router.get("/searches/{search_id}/events", tags=["events"], operation_id="list_events", summary="List events", responses=problems(404, 422))
def list_events(
    search: SearchDep,
    store: StoreDep,
    after: Annotated[int, Query(ge=0, le=MAX_INTEGER, description="Only events after this sequence number.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page[EventAnswer]:
    """What happened, in order."""
    found = store.list_events(search.id, after=after, limit=limit + 1)
    data = [EventAnswer.model_validate(event) for event in found[:limit]]
    has_more = len(found) > limit
    return Page(data=data, has_more=has_more, next_cursor=str(data[-1].sequence) if has_more else None)


@router.get(
    "/searches/{search_id}/events/stream",
    tags=["events"],
    operation_id="stream_events",
    summary="Follow the events",
    response_class=EventSourceResponse,
    responses=problems(404, 422),
)
async def stream_events(
    search: SearchDep,
    store: StoreDep,
    after: Annotated[int, Query(ge=0, le=MAX_INTEGER, description="Only events after this sequence number.")] = 0,
    last_event_id: Annotated[str | None, Header(description="Sent by a browser that reconnects; wins over `after`.")] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: past ones first, then as they happen. The stream ends after the event that ends the search."""
    seen = after
    if last_event_id is not None and last_event_id.isdecimal() and int(last_event_id) <= MAX_INTEGER:
        seen = int(last_event_id)
    yield ServerSentEvent(comment=f"events of {search.id}", retry=2000)
    while True:
        # The state is read before the events: whatever ended the search is then among the events, or already seen.
        ended = (await run_in_threadpool(store.get_search, search.id)).state.is_terminal
        events = await run_in_threadpool(store.list_events, search.id, after=seen, limit=500)
        for event in events:
            yield _frame(event)
            seen = event.sequence
            if event.type in _TERMINAL_EVENTS:
                return
        if ended and not events:
            return
        if not events:
            await asyncio.sleep(POLL_SECONDS)


_TERMINAL_EVENTS = frozenset(f"search.{state}" for state in SearchState if state.is_terminal)


def _frame(event: EventRecord) -> ServerSentEvent:
    data = json.loads(EventAnswer.model_validate(event).model_dump_json())
    return ServerSentEvent(id=str(event.sequence), event=event.type, data=data)


@router.get("/searches/{search_id}/winner", tags=["results"], operation_id="get_winner", summary="Get the winner", responses=problems(404, 409))
def read_winner(search: SearchDep, budget: BudgetIndex = 0) -> WinnerAnswer:
    """The winning shape with its config, provenance and scores. 409 until the search has succeeded."""
    winner = {name: value for name, value in _winner(search, budget=budget).items() if name != "bundle"}
    query = f"?budget={budget}" if budget else ""
    return WinnerAnswer.model_validate({**winner, "search": search.id, "bundle_url": f"/v1/searches/{search.id}/winner/bundle{query}"})


@router.get(
    "/searches/{search_id}/winner/bundle",
    tags=["results"],
    operation_id="download_bundle",
    summary="Download the winner's bundle",
    response_class=FileResponse,
    responses={
        200: {"description": "A tar file; the ETag is its SHA-256.", "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}},
        304: {"description": "Unchanged: If-None-Match names this bundle."},
        **problems(404, 409),
    },
)
def download_bundle(search: SearchDep, request: Request, settings: Annotated[Settings, Depends(get_settings)], budget: BudgetIndex = 0) -> Response:
    """The winner as one tar file: weights, tokenizer, shape, kept indices, recipe, model card."""
    winner = _winner(search, budget=budget)
    folder = settings.data_folder.resolve()
    path = (folder / winner["bundle"]).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise NotFound(f"bundle of {search.id}: the file is no longer in the data folder")
    etag = f'"{winner["bundle_sha256"]}"'
    if etag in [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers={"ETag": etag})
    return FileResponse(path, media_type="application/x-tar", filename=f"{search.id}.tar", headers={"ETag": etag})


def _winner(search: SearchRecord, *, budget: int) -> dict[str, Any]:
    if search.winner is None:
        raise Conflict(f"search {search.id}: expected the state succeeded, got {search.state}; there is no winner yet")
    winners = {winner["budget"]: winner for winner in all_winners(search)}
    if budget not in winners:
        raise NotFound(f"budget: expected one that has a winner ({', '.join(map(str, winners))}), got {budget}")
    return winners[budget]
