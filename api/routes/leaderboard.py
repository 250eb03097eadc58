"""The leaderboard of a search."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import PlainTextResponse

from api.openapi import csv_answer, problems
from api.routes.dependencies import BudgetIndex, SearchDep
from api.schemas.leaderboard import LeaderboardAnswer
from api.summary import leaderboard, leaderboard_csv

router = APIRouter(tags=["results"])


@router.get(
    "/searches/{search_id}/leaderboard",
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
