"""Attempts, and what each of them said: kept in the store, so there when its node is gone."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.responses import PlainTextResponse

from api.cursors import MAX_CURSOR_LENGTH, decode_cursor, encode_cursor
from api.openapi import problems
from api.routes.dependencies import MAX_INTEGER, SearchDep, StoreDep
from api.schemas.common import Page
from api.schemas.trials import AttemptAnswer
from nas.errors import NotFound

router = APIRouter(tags=["trials"])

_ORDER = "attempts.-id"


@router.get("/searches/{search_id}/attempts", operation_id="list_attempts", summary="List attempts", responses=problems(404, 422))
def list_attempts(
    search: SearchDep,
    store: StoreDep,
    trial: Annotated[int | None, Query(ge=0, le=MAX_INTEGER, description="Only those of this trial.")] = None,
    after: Annotated[str | None, Query(max_length=MAX_CURSOR_LENGTH, description="`next_cursor` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page[AttemptAnswer]:
    """Every try at a step of the search, the latest first: prepare, rungs, confirmations, bundles."""
    before = None if after is None else decode_cursor(after, order=_ORDER, kinds=((str,),))[0]
    found = store.list_attempts(search.id, trial=trial, before=before, limit=limit + 1)[::-1]
    has_more = len(found) > limit
    data = [AttemptAnswer.model_validate(record) for record in found[:limit]]
    return Page(data=data, has_more=has_more, next_cursor=encode_cursor(_ORDER, data[-1].id) if has_more else None)


@router.get(
    "/searches/{search_id}/attempts/{attempt_id}/log",
    operation_id="get_attempt_log",
    summary="Get an attempt's log",
    response_class=PlainTextResponse,
    responses=problems(404, 422),
)
def read_attempt_log(
    search: SearchDep, store: StoreDep, attempt_id: Annotated[str, Path(max_length=64, description="Its id: `att_...`.")]
) -> PlainTextResponse:
    """The end of what the attempt said, 64 KiB at most; of one that runs, what it had said a few seconds ago."""
    log = store.read_log(attempt_id)
    if log is None or log.search_id != search.id:
        raise NotFound(f"log: expected an attempt of search {search.id} that has said something and is not too old, got {attempt_id!r}")
    return PlainTextResponse(log.text)
