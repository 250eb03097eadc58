"""What the API and the pages say of a search, worked out from its records: progress, cost, board. Pure; reads no store, knows no HTTP."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from api.schemas.leaderboard import LeaderboardAnswer, LeaderboardRow
from api.schemas.searches import Best, Cost, Input, Progress, RungProgress, SearchAnswer, SearchSummary
from api.schemas.trials import MetricAnswer, RungAnswer, TrialAnswer
from nas.errors import NotFound
from nas.shape import Shape
from nas.store.records import RungRecord, SearchRecord, SearchState, TrialRecord, TrialState, all_winners

SHAPE_FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts")


def summarise_search(search: SearchRecord, *, counts: Mapping[TrialState, int]) -> SearchSummary:
    teacher_parameters, budget = search.plan.get("teacher_parameters"), search.plan.get("max_parameters")
    proposed = sum(counts.values())
    return SearchSummary(
        id=search.id,
        label=search.label,
        labels=search.labels,
        state=search.state,
        teacher=search.spec["teacher"],
        max_parameters=budget,
        share_of_teacher=budget / teacher_parameters if budget and teacher_parameters else None,
        progress=Progress(
            planned=proposed if search.state.is_terminal else max(planned_trials(search), proposed),
            proposed=proposed,
            settled=sum(number for state, number in counts.items() if state.is_terminal),
            trials=dict(counts),
            seconds_left=_seconds_left(search),
        ),
        best=best_row(search),
        created_at=search.created_at,
        updated_at=search.updated_at,
        started_at=search.started_at,
        finished_at=search.finished_at,
    )


def describe_search(search: SearchRecord, *, trials: Sequence[TrialRecord], rungs: Sequence[RungRecord]) -> SearchAnswer:
    found = Counter(trial.state for trial in trials)
    summary = summarise_search(search, counts={state: found[state] for state in TrialState})
    return SearchAnswer(
        **dict(summary),
        spec=search.spec,
        plan=search.plan,
        inputs=describe_inputs(search.inputs),
        rungs=rung_progress(search, trials=trials, rungs=rungs),
        cost=describe_cost(search.board),
        version=search.version,
        error=search.error,
        end_reason=(search.board or {}).get("end_reason"),
    )


def describe_inputs(inputs: Mapping[str, Any]) -> list[Input]:
    """Names and digests of what a search uses; where it lies on the server's disk stays there."""
    found = [("teacher", inputs["teacher"])] if "teacher" in inputs else []
    found += [("corpus", corpus) for corpus in inputs.get("corpora", ())]
    found += [("task", task) for task in inputs.get("tasks", ())]
    return [Input(kind=kind, name=value["name"], digest=value["digest"]) for kind, value in found]  # type: ignore[arg-type]


def _seconds_left(search: SearchRecord) -> float | None:
    left = (search.board or {}).get("time_left")
    return left["seconds"] if left and search.state is SearchState.SEARCHING else None


def planned_trials(search: SearchRecord) -> int:
    """Most trials that the search will have, as the submission worked it out."""
    return int(search.plan["max_trials"])


def best_row(search: SearchRecord) -> Best | None:
    """The row of the winner; before there is one, of the leader."""
    board = search.board or {"rows": []}
    leader = board.get("leader", board.get("winner"))
    row = next((row for row in board["rows"] if row["number"] == leader), None)
    return None if row is None else Best(trial=row["number"], score=row["score"], standard_error=row["standard_error"])


def rung_progress(search: SearchRecord, *, trials: Sequence[TrialRecord], rungs: Sequence[RungRecord]) -> list[RungProgress]:
    spec = search.spec["rungs"]
    tokens = [0, *(spec["first_tokens"] * spec["factor"] ** step for step in range(spec["num_trained"]))]
    finished = Counter(record.rung for record in rungs)
    running = Counter((-1 if trial.rung is None else trial.rung) + 1 for trial in trials if trial.state is TrialState.RUNNING)
    return [RungProgress(rung=rung, tokens=count, finished=finished[rung], running=running[rung]) for rung, count in enumerate(tokens)]


def describe_cost(board: Mapping[str, Any] | None) -> Cost:
    """The cost that the controller keeps on the board; nothing before the first result."""
    cost = (board or {}).get("cost") or {"tokens": 0, "seconds": {}, "cpus": 0.0, "gpus": 0.0}
    wall = sum(cost["seconds"].values())
    return Cost(
        distillation_tokens=cost["tokens"],
        step_seconds=cost["seconds"],
        device_seconds=cost.get("device_seconds", wall * (cost["gpus"] or cost["cpus"])),  # boards of an earlier version lack it
        decisions=cost.get("decisions", []),
    )


def describe_trial(trial: TrialRecord) -> TrialAnswer:
    return TrialAnswer(
        number=trial.number,
        origin=trial.origin,
        shape=Shape.from_dict(trial.shape),
        parameters=trial.parameters,
        budget=trial.budget,
        state=trial.state,
        rung=trial.rung,
        failure=trial.failure,
        confirmation=trial.confirmation,
        created_at=trial.created_at,
        updated_at=trial.updated_at,
    )


def describe_rung(record: RungRecord) -> RungAnswer:
    result = record.result
    return RungAnswer(
        rung=record.rung,
        tokens=result["tokens"],
        kl=MetricAnswer(**_without_documents(result["kl"])),
        loss=MetricAnswer(**_without_documents(result["loss"])),
        tasks={name: MetricAnswer(**_without_documents(metric)) for name, metric in result["tasks"].items()},
        parameters=result["parameters"],
        seconds=result["seconds"],
        reused_from=result.get("reused_from"),
        finished_at=record.finished_at,
    )


def _without_documents(metric: Mapping[str, Any]) -> dict[str, Any]:
    return {name: metric[name] for name in ("value", "standard_error", "higher_is_better")}


def of_budget(search: SearchRecord, budget: int) -> SearchRecord:
    """The search as if it had only this budget: its board, plan and winner. Cost, baselines and time are of the whole search.

    Raises:
        NotFound: the search has no such budget.
    """
    if budget > (more := len(search.spec.get("more_budgets", ()))):
        raise NotFound(f"budget: expected one of the search's, 0 to {more}, got {budget}")
    whole = dict(search.board or {})
    boards = [whole, *whole.pop("more_budgets", ())]
    board = {**whole, **boards[budget]} if budget < len(boards) else None
    plans = search.plan.get("budgets") or [{}]
    winner = next((winner for winner in all_winners(search) if winner["budget"] == budget), None)
    return replace(search, board=board or None, plan={**search.plan, **plans[min(budget, len(plans) - 1)]}, winner=winner)


def leaderboard(search: SearchRecord, *, budget: int = 0) -> LeaderboardAnswer:
    """The stored board of one budget, or an empty one before the first result; its cost is that of the whole search.

    Raises:
        NotFound: the search has no such budget.
    """
    board = of_budget(search, budget).board or {"rows": []}
    cost = describe_cost(board) if "cost" in board else None
    return LeaderboardAnswer.model_validate({**board, "cost": cost, "budget": budget, "search": search.id, "state": search.state})


def leaderboard_csv(board: LeaderboardAnswer, *, task_names: Sequence[str]) -> str:
    """One line per row with all that the board says of it. Empty where there is no value."""
    costs = list(dict.fromkeys(name for row in board.rows for name in row.costs if name != "parameters"))
    out = io.StringIO()
    lines = [_flat(row, task_names=task_names, costs=costs, board=board) for row in board.rows]
    writer = csv.DictWriter(out, fieldnames=list(lines[0]) if lines else ["rank", "number"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(row: LeaderboardRow, *, task_names: Sequence[str], costs: Sequence[str], board: LeaderboardAnswer) -> dict[str, Any]:
    """One row as a line of a table."""
    difference, confirmation = row.difference, row.confirmation or {}
    latency, deployability, held_out = (confirmation.get(name) or {} for name in ("latency", "deployability", "held_out"))
    measured = {"": row.tasks, "held_out_": held_out.get("tasks", {})}
    return {
        **{name: getattr(row, name) for name in ("rank", "tie_group", "number", "origin")},
        **{name: getattr(row.shape, name) for name in SHAPE_FIELDS},
        **{name: getattr(row, name) for name in ("parameters", "share_of_teacher", "rung", "tokens", "score", "standard_error")},
        **{f"difference{suffix}": getattr(difference, name, None) for suffix, name in (("", "value"), ("_low", "low"), ("_high", "high"))},
        **{name: getattr(row, name) for name in ("kl", "kl_standard_error", "loss", "state", "verified", "probability_best")},
        "is_winner": row.number == board.winner,
        "is_pareto": row.number in board.pareto,
        **{name: row.costs.get(name) for name in costs},
        **{name: latency.get(name) for name in ("prefill_seconds", "decode_seconds_per_token", "peak_memory_bytes")},
        "tensor_parallel_sizes": " ".join(map(str, deployability.get("tensor_parallel_sizes", []))),
        "quantization_block_sizes": " ".join(map(str, deployability.get("quantization_block_sizes", []))),
        **{
            f"{prefix}{task}{suffix}": tasks.get(task, {}).get(key)
            for prefix, tasks in measured.items()
            for task in task_names
            for suffix, key in (("", "value"), ("_standard_error", "standard_error"))
        },
        "held_out_kl": held_out.get("kl", {}).get("value"),
    }
