"""What the pages show of a search and of a trial, worked out from records: table rows, figures, facts. Pure; the templates only lay it out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from statistics import median
from typing import Any

from api.rendering import format_count, origin_badge
from api.schemas.searches import SearchAnswer
from nas.shape import Shape
from nas.store.records import Json, PointRecord, RungRecord, SearchRecord, TrialRecord, TrialState

MAX_CURVE_POINTS = 1000
"""A page draws at most this many points of a learning curve, evenly chosen; the API has them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the leaderboard table; None is a value that does not exist yet."""

    number: int
    origin: str
    state: TrialState
    shape: Shape
    parameters: int
    share_of_teacher: float | None
    rank: int | None = None
    tie_group: int | None = None
    """Only for groups of two rows and more."""
    is_winner: bool = False
    is_verified: bool | None = None
    """Whether a finalist's file proved to be the model that was scored; None for a trial that was not checked."""
    is_pareto: bool = False
    rung: int | None = None
    tokens: int | None = None
    score: float | None = None
    standard_error: float | None = None
    kl: float | None = None
    difference: Mapping[str, float] | None = None
    """To the best score: value, low and high."""
    kl_standard_error: float | None = None
    probability_best: float | None = None
    memory_bytes: float | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    """Everything that may be an objective, by its name in the spec."""
    latency: Mapping[str, Any] | None = None
    """Of a trial that was confirmed: prefill_seconds, decode_seconds_per_token, and what was measured where."""
    tasks: Mapping[str, Mapping[str, Any]]


def board_row(row: Json, *, board: Json, state: TrialState | None = None) -> Row:
    """A line of a stored row. `state`: the trial's own, where it is known: it may have changed since the board was stored."""
    return Row(
        **{name: row[name] for name in ("number", "origin", "parameters", "share_of_teacher", "rank", "rung", "tokens", "score", "standard_error")},
        **{name: row[name] for name in ("kl", "kl_standard_error", "tasks")},
        state=state or TrialState(row["state"]),
        is_verified=row.get("verified"),
        difference=row.get("difference"),
        probability_best=row.get("probability_best"),
        memory_bytes=row.get("costs", {}).get("memory_bytes"),
        costs=row.get("costs", {}),
        latency=(row.get("confirmation") or {}).get("latency"),
        shape=Shape.from_dict(row["shape"]),
        tie_group=row["tie_group"] if row.get("tied") else None,
        is_winner=row["number"] == board.get("leader", board.get("winner")),
        is_pareto=row["number"] in board.get("pareto", ()),
    )


def new_row(trial: TrialRecord, *, teacher_parameters: int | None) -> Row:
    """A line of a trial that has no result yet."""
    return Row(
        number=trial.number,
        origin=trial.origin,
        state=trial.state,
        shape=Shape.from_dict(trial.shape),
        parameters=trial.parameters,
        share_of_teacher=trial.parameters / teacher_parameters if teacher_parameters else None,
        tasks={},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutRow:
    """One model on the documents and blocks that no rung used."""

    name: str
    number: int | None
    """The trial; None for the teacher and for a median of several."""
    parameters: int
    metrics: Mapping[str, Mapping[str, Any]]
    """loss, kl and the tasks: value and standard_error (None for a median)."""
    row: Mapping[str, Any] | None = None
    """The trial's row of the board: whether it is a finalist, verified, how probably the best, its latency and where it can be served."""


def held_out_rows(rows: Sequence[Json], *, board: Json) -> list[HeldOutRow]:
    """The comparison that the search did not choose by: the teacher, every confirmed shape, and the median of the random controls.

    Args:
        rows: those of the board that were confirmed.
    """
    confirmed = [(row, row["confirmation"]["held_out"]) for row in rows]
    if not confirmed:
        return []
    lines = [HeldOutRow(name="teacher", number=None, parameters=board["teacher"]["held_out"]["parameters"], metrics=_metrics(board["teacher"]["held_out"]))]
    for row, result in confirmed:
        if row["origin"] != "control":
            name = "winner" if row["number"] == board.get("winner") else row["origin"].removeprefix("anchor:").replace("_", " ")
            lines.append(HeldOutRow(name=name, number=row["number"], parameters=result["parameters"], metrics=_metrics(result), row=row))
    controls = [result for row, result in confirmed if row["origin"] == "control"]
    if controls:
        every = [_metrics(result) for result in controls]
        medians = {name: {"value": median(metrics[name]["value"] for metrics in every), "standard_error": None} for name in every[0]}
        parameters = int(median(result["parameters"] for result in controls))
        name = f"median of {len(controls)} random shapes" if len(controls) > 1 else "a random shape"
        lines.append(HeldOutRow(name=name, number=None, parameters=parameters, metrics=medians))
    return lines


def _metrics(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {"loss": result["loss"], "kl": result["kl"], **result["tasks"]}


def group_failures(trials: Iterable[TrialRecord]) -> list[dict[str, Any]]:
    """Failed trials by stage and reason, the most frequent first."""
    groups: dict[tuple[str, str], list[TrialRecord]] = defaultdict(list)
    for trial in trials:
        if trial.state is TrialState.FAILED:
            failure = trial.failure or {}
            groups[str(failure.get("stage", "unknown")), str(failure.get("reason", "unknown"))].append(trial)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [{"stage": stage, "reason": reason, "trials": members} for (stage, reason), members in ordered]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What the figures of a search draw of one version of its board."""

    num_rows: int
    points: Sequence[Mapping[str, Any]]
    """Score and cost of rows of the last rung, whose scores alone may be compared."""
    lines: Sequence[Mapping[str, Any]]
    """Held-out KL from rung to rung."""


def drawn_cost(spec: Mapping[str, Any]) -> str:
    """The cost that scores are drawn over: the first objective, without any the parameters."""
    return str(next(iter(spec.get("objectives", ())), "parameters"))


def cost_title(name: str) -> str:
    """What an axis or a column says of a cost: memory, bytes; decode ms:chat."""
    return {"memory_bytes": "memory, bytes", "flops_per_token": "FLOPs per token"}.get(name, name.replace("_", " "))


def other_ceilings(search: SearchRecord) -> dict[str, float]:
    """The budget's ceilings beside that of parameters, by cost."""
    ceilings = {**search.plan.get("ceilings", {}), **search.plan.get("latency_ceilings", {})}
    return {name: most for name, most in ceilings.items() if "parameters" not in name}


def _cost_of(row: Json, name: str) -> float | None:
    """Boards of an earlier version have a row's costs elsewhere, or not at all."""
    value = row["parameters"] if name == "parameters" else row.get("costs", {}).get(name)
    return None if value is None else float(value)


def draw(rows: Sequence[Json], *, search_id: str, board: Json, cost: str = "parameters") -> Drawn:
    """Rows of a board as points over one of their costs, and as lines."""
    leader, front = board.get("leader", board.get("winner")), frozenset(board.get("pareto", ()))
    points = [
        {
            "number": row["number"],
            "x": _cost_of(row, cost),
            "y": row["score"],
            "error": row["standard_error"],
            "kind": _kind(row["origin"]),
            "label": _label(row),
            "tied": row["rank"] == 1 and bool(row.get("tied")),
            "pareto": row["number"] in front,
            "winner": row["number"] == leader,
            "url": f"/searches/{search_id}/trials/{row['number']}",
        }
        for row in rows
        if row["score"] is not None and row["rank"] is not None and _cost_of(row, cost) is not None
    ]
    lines = [
        {
            "number": row["number"],
            "label": _label(row),
            "kind": _kind(row["origin"]),
            "winner": row["number"] == leader,
            "x": list(range(len(row["kl_by_rung"]))),
            "y": row["kl_by_rung"],
        }
        for row in sorted(rows, key=lambda row: int(row["number"]))
        if row.get("kl_by_rung")  # boards of an earlier version lack it
    ]
    return Drawn(num_rows=len(rows), points=points, lines=lines)


def score_figure(search: SearchRecord, *, drawn: Drawn) -> dict[str, Any]:
    """Score over the first objective (`drawn_cost`), with what the teacher costs and the ceiling, where there are such."""
    cost, plan = drawn_cost(search.spec), search.plan
    if cost == "parameters":  # the line stands where the axis counts what the budget counts
        teacher, ceiling = plan.get("teacher_parameters"), plan.get("max_parameters") if plan.get("counting", "total") == "total" else None
    else:
        teacher, ceiling = plan.get("teacher_costs", {}).get(cost), {**plan.get("ceilings", {}), **plan.get("latency_ceilings", {})}.get(cost)
    return {
        "kind": "score",
        "cost": cost_title(cost),
        # A front over several costs is no line over one of them.
        "is_front_drawn": len(search.spec.get("objectives", ())) <= 1,
        "empty": f"No shape has reached the last rung{_yet(search.state.is_terminal)}",
        "points": drawn.points,
        "leader": "winner" if search.winner is not None else "leads",
        "teacher": teacher,
        "budget": ceiling,
    }


def _label(row: Json) -> str:
    return f"#{row['number']} {Shape.from_dict(row['shape']).key}"


def _kind(origin: str) -> str:
    badge = origin_badge(origin)
    return badge[0] if badge else "sampler"


def rung_figure(drawn: Drawn, *, progress: SearchAnswer) -> dict[str, Any]:
    """Held-out KL of trials from rung to rung."""
    return {
        "kind": "rungs",
        "empty": f"No rung has finished{_yet(progress.state.is_terminal)}",
        "rungs": ["none" if rung.rung == 0 else format_count(rung.tokens) for rung in progress.rungs],
        "lines": drawn.lines,
    }


def _yet(is_over: bool) -> str:
    return "" if is_over else " yet"


def curve_figure(*, points: Sequence[PointRecord], rungs: Sequence[RungRecord], is_active: bool) -> dict[str, Any]:
    """The learning curve of one trial: training loss over tokens, the rungs' bounds and what they measured on held-out text.

    A rung ends on a branch where the rate decays, and the next one goes on from before it: between two rungs the line has a gap (None).
    """
    step = -(-len(points) // MAX_CURVE_POINTS) or 1
    ends = {index for index, (point, after) in enumerate(pairwise(points)) if after.rung != point.rung}
    chosen = [point for index, point in enumerate(points) if index % step == 0 or index in ends or index == len(points) - 1]
    x: list[int | None] = []
    y: list[float | None] = []
    for before, point in zip([None, *chosen], chosen, strict=False):
        if before is not None and before.rung != point.rung:
            x.append(None)
            y.append(None)
        x.append(point.tokens)
        y.append(point.loss)
    return {
        "kind": "curve",
        "empty": f"No training step{_yet(not is_active)}",
        "x": x,
        "y": y,
        "rungs": [{"rung": record.rung, "tokens": record.result["tokens"], "kl": record.result["kl"]["value"]} for record in rungs],
    }


def elapsed_seconds(search: SearchAnswer, *, now: datetime) -> float | None:
    """Since a controller took the search, pauses included; None before."""
    return None if search.started_at is None else ((search.finished_at or now) - search.started_at).total_seconds()


def task_columns(search: SearchRecord) -> list[dict[str, Any]]:
    """The tasks of the objective, with the metric that it reads of each and which way is better."""
    metrics = {task["name"]: task["card"]["metrics"] for task in search.inputs["tasks"]}
    columns = []
    for task in search.spec["tasks"]:
        name = task["metric"] or metrics[task["name"]][0]["name"]
        metric = next(metric for metric in metrics[task["name"]] if metric["name"] == name)
        columns.append({"name": task["name"], "metric": name, "higher_is_better": metric["higher_is_better"]})
    return columns


def compare_shapes(shape: Shape, *, teacher: Mapping[str, int]) -> list[dict[str, Any]]:
    """Each number of a shape beside the teacher's."""
    return [
        {"name": name, "value": value, "teacher": teacher.get(name), "share": value / teacher[name] if name in teacher else None}
        for name, value in shape.as_dict().items()
    ]
