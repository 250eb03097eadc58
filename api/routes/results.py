"""What came out of a search: its winner with the bundle, and how it compares with another search."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from starlette.responses import Response

from api.openapi import problems
from api.routes.dependencies import BudgetIndex, OtherDep, SearchDep, SettingsDep, StoreDep
from api.schemas.results import ComparisonAnswer, WinnerAnswer
from api.summary import describe_cost
from nas.errors import Conflict, NotFound
from nas.search.comparison import Side, compare, comparison_as_dict
from nas.search.confirmed import Confirmation
from nas.search.results import RungResult
from nas.store.records import SearchRecord, all_winners
from nas.store.store import Store

router = APIRouter(tags=["results"])

MAX_SHARED_SHAPES = 500


@router.get("/searches/{search_id}/compare", operation_id="compare_searches", summary="Compare two searches", responses=problems(404, 422))
def compare_searches(search: SearchDep, other: OtherDep, store: StoreDep) -> ComparisonAnswer:
    """What was asked differently, the shapes on both boards, best against best, and what each took."""
    shared = store.shared_shapes(search.id, other.id, limit=MAX_SHARED_SHAPES)
    comparison = compare(load_side(search, store=store), load_side(other, store=store), shared=shared)
    costs = describe_cost(search.board), describe_cost(other.board)
    values = {**comparison_as_dict(comparison), "cost": costs, "searches": (search.id, other.id), "states": (search.state, other.state)}
    return ComparisonAnswer.model_validate(values)


def load_side(search: SearchRecord, *, store: Store) -> Side:
    """One search for `compare`: its board's facts, and its leader with the results and their documents."""
    board = search.board or {}
    row = board.get("of_rows", {}).get("leader")
    best = held_out = None
    if row is not None:
        best = next((record.result for record in store.list_rungs(search.id, trial=row["number"]) if record.rung == row["rung"]), None)
        if (confirmation := store.get_confirmation(search.id, row["number"])) is not None:
            held_out = Confirmation.from_dict(confirmation).held_out
    result = None if best is None else RungResult.from_dict(best)
    return Side(spec=search.spec, inputs=search.inputs, board=board, leader=row, best=result, held_out=held_out)


@router.get("/searches/{search_id}/winner", operation_id="get_winner", summary="Get the winner", responses=problems(404, 409))
def read_winner(search: SearchDep, budget: BudgetIndex = 0) -> WinnerAnswer:
    """The winning shape with its config, provenance and scores. 409 until the search has succeeded."""
    winner = {name: value for name, value in _winner(search, budget=budget).items() if name != "bundle"}
    query = f"?budget={budget}" if budget else ""
    return WinnerAnswer.model_validate({**winner, "search": search.id, "bundle_url": f"/v1/searches/{search.id}/winner/bundle{query}"})


@router.get(
    "/searches/{search_id}/winner/bundle",
    operation_id="download_bundle",
    summary="Download the winner's bundle",
    response_class=FileResponse,
    responses={
        200: {"description": "A tar file; the ETag is its SHA-256.", "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}},
        304: {"description": "Unchanged: If-None-Match names this bundle."},
        **problems(404, 409),
    },
)
def download_bundle(search: SearchDep, request: Request, settings: SettingsDep, budget: BudgetIndex = 0) -> Response:
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
