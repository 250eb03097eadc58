"""What came out of a search: its winner with the bundle, and how it compares with another search."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import yaml
from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from starlette.responses import Response

from api.bodies import read_no_body
from api.files import IMMUTABLE, send_file
from api.leaderboards import of_budget
from api.once import OnceDep
from api.openapi import accepted_answer, file_answers, problems, winner_answers
from api.principal import PrincipalDep
from api.routes.dependencies import BudgetIndex, OtherDep, SearchDep, SettingsDep, StoreDep, TrialNumber
from api.schemas.results import BundleAnswer, ComparisonAnswer, ImportancesAnswer, WinnerAnswer
from api.summary import describe_bundle, describe_cost
from api.threads import fetching
from nas.errors import Conflict, NotFound
from nas.search.comparison import Side, compare, comparison_as_dict
from nas.search.confirmed import Confirmation
from nas.search.results import RungResult
from nas.settings import Settings
from nas.store.records import BundleRecord, BundleState, SearchRecord, all_winners
from nas.store.store import Store
from nas.trial_bundles import find_bundle, plan_bundle

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


@router.get("/searches/{search_id}/importances", operation_id="get_importances", summary="Get the importances", responses=problems(404, 422))
def read_importances(search: SearchDep, budget: BudgetIndex = 0) -> ImportancesAnswer:
    """Which choices mattered: depth, width, heads, MLP."""
    found = (of_budget(search, budget).board or {}).get("importances", {})
    return ImportancesAnswer(search=search.id, budget=budget, importances=dict(sorted(found.items(), key=lambda item: -item[1])))


@router.get(
    "/searches/{search_id}/winner",
    operation_id="get_winner",
    summary="Get the winner",
    response_model=None,
    responses={**winner_answers(), **problems(404, 409, 422)},
)
def read_winner(
    search: SearchDep,
    budget: BudgetIndex = 0,
    format: Annotated[
        Literal["json", "hf-config", "yaml"], Query(description="hf-config: only the config.json that transformers loads; yaml: the whole as YAML.")
    ] = "json",
) -> Any:
    """The winning shape with its config, provenance and scores. 409 until the search has succeeded."""
    winner = {name: value for name, value in _winner(search, budget=budget).items() if name != "bundle"}
    if format == "hf-config":
        return JSONResponse(winner["config"], headers={"Content-Disposition": 'attachment; filename="config.json"'})
    query = f"?budget={budget}" if budget else ""
    row = (of_budget(search, budget).board or {}).get("of_rows", {}).get("leader") or {}
    figures = {name: row.get(name) if row.get("number") == winner["trial"] else None for name in ("score", "standard_error", "probability_best")}
    answer = WinnerAnswer.model_validate({**winner, **figures, "search": search.id, "bundle_url": f"/v1/searches/{search.id}/winner/bundle{query}"})
    if format == "yaml":
        return PlainTextResponse(yaml.safe_dump(answer.model_dump(mode="json"), sort_keys=False, allow_unicode=True), media_type="application/yaml")
    return answer


@router.get(
    "/searches/{search_id}/winner/bundle",
    operation_id="download_bundle",
    summary="Download the winner's bundle",
    response_class=FileResponse,
    responses={**file_answers(), **problems(404, 409, 422)},
)
async def download_bundle(search: SearchDep, request: Request, settings: SettingsDep, budget: BudgetIndex = 0) -> Response:
    """The winner as one tar file: weights, tokenizer, shape, kept indices, recipe, model card."""
    winner = _winner(search, budget=budget)
    return await fetching(partial(send_file, winner["bundle"], sha256=winner["bundle_sha256"], name=f"{search.id}.tar", request=request, settings=settings))


@router.post(
    "/searches/{search_id}/trials/{number}/bundle",
    operation_id="request_trial_bundle",
    summary="Ask for a trial's bundle",
    status_code=202,
    responses={**accepted_answer(), **problems(404, 409, 413, 422)},
    dependencies=[Depends(read_no_body)],
)
async def request_trial_bundle(search: SearchDep, number: TrialNumber, store: StoreDep, settings: SettingsDep, once: OnceDep) -> BundleAnswer:
    """Have the bundle of a verified trial packed, of a member of the Pareto front for instance; a controller does it, and the trial tells when it is there.

    Again is no error, and one that failed is tried again. 409 while the search goes on, and where the trial was not verified or its student not kept.
    """
    plan = partial(plan_bundle, search, number, store=store, settings=settings)
    return describe_bundle(await fetching(partial(once.bundle, plan, again=lambda: find_bundle(search, number, store=store) or plan()())))


@router.get(
    "/searches/{search_id}/trials/{number}/bundle",
    operation_id="download_trial_bundle",
    summary="Download a trial's bundle",
    response_class=FileResponse,
    responses={**file_answers(), **problems(404, 409, 422)},
)
async def download_trial_bundle(search: SearchDep, number: TrialNumber, request: Request, store: StoreDep, settings: SettingsDep) -> Response:
    """The trial as one tar file, like the winner's. 409 until it is packed, which the winner's is by itself and any other once it is asked for (POST)."""
    return await fetching(partial(_send_trial_bundle, search, number, request=request, store=store, settings=settings))


def _send_trial_bundle(search: SearchRecord, number: int, *, request: Request, store: Store, settings: Settings) -> Response:
    bundle = find_bundle(search, number, store=store)
    if bundle is None or bundle.path is None or bundle.sha256 is None:
        raise Conflict(f"trial {number} of search {search.id}: expected a bundle that is packed, got {_state_of(bundle)}")
    return send_file(bundle.path, sha256=bundle.sha256, name=f"{search.id}-trial-{number}.tar", request=request, settings=settings)


def _state_of(bundle: BundleRecord | None) -> str:
    """Why there is no file."""
    if bundle is None:
        return "one that nobody asked for; POST to this address asks for it"
    if bundle.state is BundleState.WAITING:
        return "one that is being packed"
    error = bundle.error or {}
    return f"one that could not be packed ({error.get('reason')}: {error.get('message')}); POST to this address tries again"


@router.get(
    "/artifacts/{sha256}",
    operation_id="download_artifact",
    summary="Download a file by its digest",
    response_class=FileResponse,
    responses={**file_answers(), **problems(404, 422)},
)
async def download_artifact(
    sha256: Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the file, such as `bundle_sha256` of a winner.")],
    store: StoreDep,
    settings: SettingsDep,
    request: Request,
    principal: PrincipalDep,
) -> Response:
    """A file that a search made, by its content: a whole one or a range of it. What a digest names never changes."""
    return await fetching(partial(_send_artifact, sha256, project=principal.project, request=request, store=store, settings=settings))


def _send_artifact(sha256: str, *, project: str, request: Request, store: Store, settings: Settings) -> Response:
    artifact = store.find_artifact(sha256, project=project)
    if artifact is None:
        raise NotFound(f"artifact: expected the SHA-256 of a file of a search, got {sha256}")
    return send_file(artifact.path, sha256=sha256, name=f"{artifact.search_id}.tar", request=request, settings=settings, cache=IMMUTABLE)


def _winner(search: SearchRecord, *, budget: int) -> dict[str, Any]:
    if search.winner is None:
        raise Conflict(f"search {search.id}: expected the state succeeded, got {search.state}; there is no winner{'' if search.state.is_terminal else ' yet'}")
    winners = {winner["budget"]: winner for winner in all_winners(search)}
    if budget not in winners:
        raise NotFound(f"budget: expected one that has a winner ({', '.join(map(str, winners))}), got {budget}")
    return winners[budget]
