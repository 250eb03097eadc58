"""The leaderboard of a search."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from starlette.responses import Response

from api.conditional import etag_of, is_unchanged, not_modified
from api.cursors import MAX_CURSOR_LENGTH
from api.leaderboards import BATCH_ROWS, at_version, csv_lines, describe_board, json_lines, of_budget, read_cursor, read_page, stream_rows
from api.openapi import leaderboard_answers, problems
from api.routes.dependencies import BudgetIndex, SearchDep, StoreDep
from api.schemas.leaderboard import LeaderboardAnswer
from nas.store.boards import BoardQuery
from nas.store.records import TrialState

router = APIRouter(tags=["results"])

MAX_PARAMETERS = 2**63 - 1

Sort = Literal["rank", "-rank", "score", "-score", "kl", "-kl", "parameters", "-parameters"]


def get_query(
    budget: BudgetIndex = 0,
    sort: Annotated[
        Sort, Query(description="`rank` is the board's own order, `score` has the best first, the others the smallest; `-` turns an order round.")
    ] = "rank",
    state: Annotated[TrialState | None, Query(description="Only trials that were in this state when the board was stored.")] = None,
    rung: Annotated[int | None, Query(ge=0, le=1000, description="Only trials whose deepest finished rung this is.")] = None,
    pareto: Annotated[bool | None, Query(description="Only trials of the front, or only the others.")] = None,
    min_parameters: Annotated[int | None, Query(ge=0, le=MAX_PARAMETERS, description="Only shapes with at least so many parameters.")] = None,
    max_parameters: Annotated[int | None, Query(ge=0, le=MAX_PARAMETERS, description="Only shapes with at most so many parameters.")] = None,
) -> BoardQuery:
    """Which rows, in which order."""
    return BoardQuery(
        budget=budget,
        sort=sort.removeprefix("-"),  # type: ignore[arg-type]
        descending=sort.startswith("-"),
        state=state,
        rung=rung,
        pareto=pareto,
        min_parameters=min_parameters,
        max_parameters=max_parameters,
    )


QueryDep = Annotated[BoardQuery, Depends(get_query)]


@router.get(
    "/searches/{search_id}/leaderboard",
    operation_id="get_leaderboard",
    summary="Get the leaderboard",
    response_model=LeaderboardAnswer,
    responses={**leaderboard_answers(), **problems(404, 410, 422)},
)
def read_leaderboard(
    search: SearchDep,
    store: StoreDep,
    query: QueryDep,
    request: Request,
    response: Response,
    format: Annotated[
        Literal["json", "csv", "ndjson"], Query(description="`json` is a page; `csv` and `ndjson` (a row a line) are all rows, of one version, as a stream.")
    ] = "json",
    after: Annotated[
        str | None, Query(max_length=MAX_CURSOR_LENGTH, description="`next_cursor` of the page before: the next rows of the same version.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Most rows of a page.")] = 100,
) -> Any:
    """A page of the board of one budget of the search, with the facts of the board; empty before the first result.

    Pages that follow each other by `next_cursor` are of one version, however often the board changes meanwhile. A version can be read for five minutes
    after the next one has come; then its cursors are refused (410), and reading begins again with the first page.
    """
    of_budget(search, query.budget)  # refuses one that the search does not have
    version, position = (search.board_version, None) if after is None else read_cursor(after, query=query)
    search = at_version(search, version, store=store)
    page = read_page(search, query=query, after=position, limit=limit if format == "json" else BATCH_ROWS, store=store)
    if format == "json":
        # The version of the board and the state are all that can change in this answer.
        etag = etag_of(f"{page.version}-{search.state}")
        if is_unchanged(request, etag):
            return not_modified(etag)
        response.headers["ETag"] = etag
        return describe_board(search, page=page, query=query)
    rows = stream_rows(page, search=search, query=query, store=store)
    lines, media_type = (json_lines(rows), "application/x-ndjson") if format == "ndjson" else (csv_lines(rows, search=search, budget=query.budget), "text/csv")
    return StreamingResponse(lines, media_type=media_type, headers={"Content-Disposition": f'attachment; filename="{search.id}.{format}"'})
