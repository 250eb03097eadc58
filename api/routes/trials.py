"""The shapes that a search evaluates."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from api.bodies import read_no_body
from api.conditional import etag_of, is_unchanged, not_modified
from api.cursors import AfterCursor, decode_cursor, encode_cursor, page_of
from api.once import OnceDep
from api.openapi import accepted_answer, problems, versioned_answer
from api.routes.dependencies import MAX_INTEGER, SearchDep, StoreDep, TrialNumber
from api.schemas.common import Page
from api.schemas.trials import AttemptAnswer, CurveAnswer, PointAnswer, TrialAnswer, TrialDetail
from api.summary import describe_bundle, describe_rung, describe_trial, thin
from nas.store.listing import TrialOrder, trial_place
from nas.store.records import TrialState
from nas.trial_bundles import find_bundle

router = APIRouter(tags=["trials"])


@router.get("/searches/{search_id}/trials", operation_id="list_trials", summary="List trials", responses=problems(404, 422))
def list_trials(
    search: SearchDep,
    store: StoreDep,
    state: Annotated[TrialState | None, Query(description="Only trials in this state.")] = None,
    origin: Annotated[
        str | None,
        Query(
            pattern=r"^[a-z][a-z0-9_:]{0,63}$", description="Only those of this origin: `sampler`, `anchor`, `anchor:uniform`, `user`, `control`, `repeat`, ..."
        ),
    ] = None,
    sort: Annotated[TrialOrder, Query(description="Order; a minus is the largest first.")] = "number",
    after: AfterCursor = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> Page[TrialAnswer]:
    """The trials of a search. A cursor belongs to its order."""
    order = f"trials.{sort}"
    place = None if after is None else decode_cursor(after, order=order, kinds=((int,),) * (1 if sort.endswith("number") else 2))
    found = store.page_trials(search.id, order=sort, state=state, origin=origin, after=place, limit=limit + 1)
    return page_of(found, limit=limit, answer=describe_trial, cursor=lambda trial: encode_cursor(order, *trial_place(trial, order=sort)))


@router.get(
    "/searches/{search_id}/trials/{number}",
    operation_id="get_trial",
    summary="Get a trial",
    response_model=TrialDetail,
    responses={**versioned_answer(), **problems(404, 422)},
)
def read_trial(search: SearchDep, number: TrialNumber, store: StoreDep, request: Request, response: Response) -> Any:
    """One trial: its results by rung, attempts and learning curve."""
    trial, bundle = store.get_trial(search.id, number), find_bundle(search, number, store=store)
    detail = TrialDetail(
        **dict(describe_trial(trial)),
        rungs=[describe_rung(record) for record in store.list_rungs(search.id, trial=number, with_documents=False)],
        attempts=[AttemptAnswer.model_validate(record) for record in store.list_attempts(search.id, trial=number)],
        points=[PointAnswer.model_validate(record) for record in store.list_points(search.id, trial=number)],
        bundle=None if bundle is None else describe_bundle(bundle),
    )
    # No row counts what happens to a trial and its curve: the version is the content.
    etag = etag_of(hashlib.sha256(detail.model_dump_json().encode()).hexdigest()[:32])
    if is_unchanged(request, etag):
        return not_modified(etag)
    response.headers["ETag"] = etag
    return detail


@router.get(
    "/searches/{search_id}/trials/{number}/metrics", operation_id="get_trial_metrics", summary="Get a trial's learning curve", responses=problems(404, 422)
)
def read_trial_metrics(
    search: SearchDep,
    number: TrialNumber,
    store: StoreDep,
    rung: Annotated[int | None, Query(ge=0, le=MAX_INTEGER, description="Only this rung's part.")] = None,
    max_points: Annotated[int, Query(ge=2, le=10_000, description="Points at most: evenly chosen, the first and the last among them.")] = 1000,
) -> CurveAnswer:
    """The points of a trial's training: loss, learning rate, speed over tokens."""
    store.get_trial(search.id, number)
    points = store.list_points(search.id, trial=number, rung=rung)
    chosen = [PointAnswer.model_validate(point) for point in thin(points, max_points=max_points)]
    return CurveAnswer(search=search.id, trial=number, num_points=len(points), points=chosen)


@router.post(
    "/searches/{search_id}/trials/{number}/retry",
    operation_id="retry_trial",
    summary="Retry a failed trial",
    status_code=202,
    responses={**accepted_answer(), **problems(404, 409, 413, 422)},
    dependencies=[Depends(read_no_body)],
)
def retry_trial(search: SearchDep, number: TrialNumber, store: StoreDep, once: OnceDep) -> TrialAnswer:
    """Let a failed trial wait for its next rung again; its failures so far count no more. 409 unless it has failed and its search still evaluates shapes."""
    return describe_trial(once.trial(lambda: store.retry_trial(search.id, number), number=number))
