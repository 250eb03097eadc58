"""The shapes that a search evaluates."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from api.openapi import problems
from api.routes.dependencies import MAX_INTEGER, SearchDep, StoreDep, TrialNumber
from api.schemas.common import Page
from api.schemas.trials import AttemptAnswer, PointAnswer, TrialAnswer, TrialDetail
from api.summary import describe_rung, describe_trial

router = APIRouter(tags=["trials"])


@router.get("/searches/{search_id}/trials", operation_id="list_trials", summary="List trials", responses=problems(404, 422))
def list_trials(
    search: SearchDep,
    store: StoreDep,
    after: Annotated[int, Query(ge=-1, le=MAX_INTEGER, description="`next_cursor` of the page before.")] = -1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> Page[TrialAnswer]:
    """The trials of a search, by number."""
    found = store.list_trials(search.id, after=after, limit=limit + 1)
    has_more = len(found) > limit
    data = [describe_trial(trial) for trial in found[:limit]]
    return Page(data=data, has_more=has_more, next_cursor=str(data[-1].number) if has_more else None)


@router.get("/searches/{search_id}/trials/{number}", operation_id="get_trial", summary="Get a trial", responses=problems(404, 422))
def read_trial(search: SearchDep, number: TrialNumber, store: StoreDep) -> TrialDetail:
    """One trial: its results by rung, attempts and learning curve."""
    trial = store.get_trial(search.id, number)
    return TrialDetail(
        **dict(describe_trial(trial)),
        rungs=[describe_rung(record) for record in store.list_rungs(search.id, trial=number, with_documents=False)],
        attempts=[AttemptAnswer.model_validate(record) for record in store.list_attempts(search.id, trial=number)],
        points=[PointAnswer.model_validate(record) for record in store.list_points(search.id, trial=number)],
    )
