"""The pages: searches, one search, one trial, one distillation, the API's documentation, the kinds of problems. Rendered here, they work without scripts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import FileResponse, HTMLResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from api.cursors import MAX_CURSOR_LENGTH
from api.distillations import detail_distillation, summarise_distillation
from api.guard import PLOTTED_SECURITY_POLICY
from api.leaderboards import cursor_behind, describe_board, of_budget, read_cursor, read_page
from api.principal import PrincipalDep
from api.problems import PROBLEM_TYPES
from api.rendering import TEMPLATES
from api.routes.dependencies import BudgetIndex, OtherDep, SearchDep, StoreDep, TrialNumber
from api.routes.distillations import DistillationDep
from api.routes.leaderboard import Sort, get_query
from api.routes.results import compare_searches
from api.schemas.trials import AttemptAnswer
from api.summary import best_row, describe_bundle, describe_rung, describe_search, describe_trial, summarise_search
from api.views import (
    Drawn,
    board_row,
    compare_shapes,
    cost_title,
    curve_figure,
    draw,
    drawn_cost,
    elapsed_seconds,
    group_failures,
    held_out_rows,
    new_row,
    other_ceilings,
    rung_figure,
    score_figure,
    task_columns,
)
from nas.store.boards import BoardPage
from nas.store.records import BundleState, TrialState, utc_now
from nas.store.store import Store
from nas.trial_bundles import find_bundle
from nas.trial_files import is_verified

SEARCHES_PER_PAGE = 50
ROWS_PER_PAGE = 50
CONFIRMED_SHOWN = 50
FAILURES_SHOWN = 100
MAX_DRAWN = 100
"""Figures draw at most so many of the best rows, as many spread evenly over all trials, and the front."""
EVENTS_SHOWN = 40

_SHOWN_WITHOUT_RESULT = (TrialState.WAITING, TrialState.RUNNING, TrialState.STOPPED, TrialState.CANCELLED)

_PLOTTED = frozenset({"search.html", "trial.html", "distillation.html"})

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


def install(app: FastAPI) -> None:
    """Add the pages and what they load: the stylesheet, our scripts, and plotly.js out of its wheel."""
    app.include_router(router)
    app.mount("/static", StaticFiles(packages=[("api", "static")]), name="static")


def render(name: str, **values: Any) -> HTMLResponse:
    headers = {"Content-Security-Policy": PLOTTED_SECURITY_POLICY} if name in _PLOTTED else {}
    return HTMLResponse(TEMPLATES.get_template(name).render(**values), headers=headers)


@router.get("/")
def searches_page(
    store: StoreDep, principal: PrincipalDep, after: Annotated[str | None, Query(max_length=100, pattern=r"^srch_[0-9a-z]+$")] = None
) -> HTMLResponse:
    found = store.list_searches(project=principal.project, after=after, limit=SEARCHES_PER_PAGE + 1)
    counts = store.trial_counts([search.id for search in found])
    searches = [summarise_search(search, counts=counts[search.id]) for search in found[:SEARCHES_PER_PAGE]]
    next_cursor = searches[-1].id if len(found) > SEARCHES_PER_PAGE else None
    is_active = any(not search.state.is_terminal for search in searches)
    return render("searches.html", searches=searches, next_cursor=next_cursor, after=after, is_active=is_active, now=utc_now(), teachers=store.list_teachers())


@router.get("/searches/{search_id}")
def search_page(
    search: SearchDep,
    store: StoreDep,
    budget: BudgetIndex = 0,
    sort: Sort = "rank",
    pareto: bool | None = None,
    after: Annotated[str | None, Query(max_length=MAX_CURSOR_LENGTH)] = None,
) -> HTMLResponse:
    """The search, with a page of the leaderboard of one of its budgets."""
    query = get_query(budget=budget, sort=sort, pareto=pareto)
    counts = store.trial_counts([search.id])[search.id]
    answer = describe_search(search, counts=counts)
    shown = of_budget(search, budget)
    board, version = shown.board or {}, search.board_version
    # An open page follows the search: it goes on at the place where the one before ended, in the board as it is now.
    page = read_page(search, query=query, after=None if after is None else read_cursor(after, query=query)[1], limit=ROWS_PER_PAGE, store=store)
    states = store.trial_states(search.id, [row["number"] for row in page.rows])
    rows = [board_row(row, board=board, state=states.get(row["number"])) for row in page.rows]
    if page.end is None and sort == "rank" and not pareto:
        new = store.list_trials(search.id, states=_SHOWN_WITHOUT_RESULT, without_result=True, budget=budget, limit=ROWS_PER_PAGE)
        rows += [new_row(trial, teacher_parameters=search.plan.get("teacher_parameters")) for trial in new]
    drawn = Drawn(num_rows=0, points=(), lines=()) if version is None else _drawn(store, search.id, version, budget, drawn_cost(search.spec))
    confirmed = [] if version is None else store.confirmed_rows(search.id, version=version, budget=budget, limit=CONFIRMED_SHOWN)
    num_failed = counts.by_state[TrialState.FAILED]
    events = store.list_events(search.id, after=max(search.version - EVENTS_SHOWN, 0), limit=EVENTS_SHOWN)
    return render(
        "search.html",
        search=answer,
        version=search.version,
        rows=rows,
        view={"sort": sort, "pareto": pareto, "next": cursor_behind(page, query=query), "is_first": after is None, "num_drawn": drawn.num_rows},
        board=describe_board(search, page=BoardPage(version=0, rows=[], end=None), query=query).model_dump(),
        budgets=[of_budget(search, index).plan for index in range(1 + len(search.spec.get("more_budgets", ())))],
        tasks=task_columns(search),
        costs=[name for name in search.spec.get("objectives", ()) if name not in ("parameters", "memory_bytes")],
        show={"memory": any(row.memory_bytes for row in rows), "latency": any(row.latency for row in rows)},
        held_out=held_out_rows(confirmed, board=board),
        failures=group_failures(store.list_trials(search.id, states=[TrialState.FAILED], limit=FAILURES_SHOWN) if num_failed else []),
        num_failed=num_failed,
        events=events[::-1],
        elapsed_seconds=elapsed_seconds(answer, now=utc_now()),
        best=best_row(shown),
        plan=shown.plan,
        ceilings=other_ceilings(shown),
        cost_title=cost_title,
        has_winner=shown.winner is not None,
        distillations=[summarise_distillation(found) for found in store.list_distillations(project=search.project, search_id=search.id)],
        others=[other for other in store.latest_searches(project=search.project, limit=SEARCHES_PER_PAGE) if other.id != search.id],
        score_figure=score_figure(shown, drawn=drawn),
        rung_figure=rung_figure(drawn, progress=answer),
    )


@lru_cache(maxsize=64)
def _drawn(store: Store, search_id: str, version: int, budget: int, cost: str) -> Drawn:
    """A version of a board never changes, and many look at the newest one."""
    head = store.get_board_head(search_id, version=version)
    boards = [head, *head.get("more_budgets", ())]
    board = boards[budget] if budget < len(boards) else {}
    return draw(store.board_sample(search_id, version=version, budget=budget, most=MAX_DRAWN), search_id=search_id, board=board, cost=cost)


@router.get("/searches/{search_id}/compare")
def comparison_page(search: SearchDep, other: OtherDep, store: StoreDep) -> HTMLResponse:
    comparison = compare_searches(search, other, store)
    labels = [side.label or side.id for side in (search, other)]
    return render("comparison.html", comparison=comparison.model_dump(), searches=[search, other], labels=labels)


@router.get("/searches/{search_id}/trials/{number}")
def trial_page(search: SearchDep, number: TrialNumber, store: StoreDep) -> HTMLResponse:
    trial = store.get_trial(search.id, number)
    records = store.list_rungs(search.id, trial=number, with_documents=False)
    points = store.list_points(search.id, trial=number)
    stored = {} if search.board_version is None else store.board_rows(search.id, version=search.board_version, numbers=[number])
    row = board_row(stored[number], board=of_budget(search, trial.budget).board or {}, state=trial.state) if stored else None
    answer, bundle = describe_trial(trial), find_bundle(search, number, store=store)
    is_active = not trial.state.is_terminal and not search.state.is_terminal
    return render(
        "trial.html",
        search=summarise_search(search, counts=store.trial_counts([search.id])[search.id]),
        trial=answer,
        bundle=None if bundle is None else describe_bundle(bundle),
        may_be_bundled=search.state.is_terminal and is_verified(trial),
        is_packing=bundle is not None and bundle.state is BundleState.WAITING,
        has_winner=search.winner is not None,
        row=row,
        is_active=is_active,
        comparison=compare_shapes(answer.shape, teacher=search.plan.get("teacher_shape", {})),
        teacher_parameters=search.plan.get("teacher_parameters"),
        tasks=task_columns(search),
        rungs=[describe_rung(record) for record in records],
        attempts=[AttemptAnswer.model_validate(record) for record in store.list_attempts(search.id, trial=number)],
        logged=store.list_logged(search.id),
        curve_figure=curve_figure(points=points, rungs=records, is_active=is_active),
    )


@router.get("/distillations/{distillation_id}")
def distillation_page(distillation: DistillationDep, store: StoreDep) -> HTMLResponse:
    points = store.list_points(distillation.id, trial=distillation.spec["trial"])
    is_active = not distillation.state.is_terminal
    return render(
        "distillation.html",
        distillation=detail_distillation(distillation, attempts=store.list_attempts(distillation.id), points=points).model_dump(),
        is_active=is_active,
        logged=store.list_logged(distillation.id),
        curve_figure=curve_figure(points=points, rungs=(), is_active=is_active),
    )


@router.get("/docs")
def docs_page(request: Request) -> HTMLResponse:
    """The OpenAPI document as a page: FastAPI's own loads its scripts from a CDN, which an offline machine does not reach."""
    document = request.app.openapi()
    operations: dict[str, list[dict[str, Any]]] = {tag["name"]: [] for tag in document["tags"]}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            operations[operation["tags"][0]].append({"method": method.upper(), "path": path, **operation})
    return render("docs.html", document=document, operations=operations, schemas=document["components"]["schemas"], type_of=type_of)


def type_of(schema: Mapping[str, Any]) -> str:
    """The type of a JSON schema in words: `integer or null`, `array of TaskSpec`."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " or ".join(type_of(choice) for choice in schema["anyOf"])
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return ", ".join(repr(value) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"array of {type_of(schema['items'])}" if schema.get("items") else "array"
    name = str(schema.get("format", schema.get("type", "any")))
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return " ".join([name, *(f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)])


@router.get("/problems/{code}")
def problem_page(code: str) -> HTMLResponse:
    if code not in PROBLEM_TYPES:
        raise HTTPException(404, "Not Found")
    return render("problem_type.html", kind=PROBLEM_TYPES[code])


@router.get("/static/plotly.min.js")
def plotly_script() -> FileResponse:
    # find_spec, since importing the package would cost a second and we only want a file of it.
    spec = find_spec("plotly")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(next(iter(spec.submodule_search_locations))) / "package_data" / "plotly.min.js"
    return FileResponse(path, media_type="text/javascript", headers={"Cache-Control": "public, max-age=86400"})
