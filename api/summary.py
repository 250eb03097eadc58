"""What the API and the pages say of a search, worked out from its records: progress, cost, board. Pure; reads no store, knows no HTTP."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from api.schemas import (
    Best,
    Cost,
    Input,
    LeaderboardAnswer,
    MetricAnswer,
    Progress,
    RungAnswer,
    RungProgress,
    SearchAnswer,
    SearchSummary,
    TrialAnswer,
)
from nas.shape import Shape
from nas.spec import parse_spec
from nas.store.records import RungRecord, SearchRecord, SearchState, TrialRecord, TrialState

SHAPE_FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts")


def summarise_search(search: SearchRecord, *, counts: Mapping[TrialState, int]) -> SearchSummary:
    teacher_parameters, budget = search.plan.get("teacher_parameters"), search.plan.get("max_parameters")
    proposed = sum(counts.values())
    return SearchSummary(
        id=search.id,
        label=search.label,
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
        cost=count_cost(search, rungs=rungs),
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
    """The row of the winner; before there is one, the first that is no control."""
    rows = [row for row in (search.board or {}).get("rows", ()) if row["rank"] is not None and row["origin"] != "control"]
    winner = (search.board or {}).get("winner")
    for row in [row for row in rows if row["number"] == winner] or rows[:1]:
        return Best(trial=row["number"], score=row["score"], standard_error=row["standard_error"])
    return None


def rung_progress(search: SearchRecord, *, trials: Sequence[TrialRecord], rungs: Sequence[RungRecord]) -> list[RungProgress]:
    spec = search.spec["rungs"]
    tokens = [0, *(spec["first_tokens"] * spec["factor"] ** step for step in range(spec["num_trained"]))]
    finished = Counter(record.rung for record in rungs)
    running = Counter((-1 if trial.rung is None else trial.rung) + 1 for trial in trials if trial.state is TrialState.RUNNING)
    return [RungProgress(rung=rung, tokens=count, finished=finished[rung], running=running[rung]) for rung, count in enumerate(tokens)]


def count_cost(search: SearchRecord, *, rungs: Sequence[RungRecord]) -> Cost:
    spec = parse_spec(json.dumps(search.spec))
    seconds: dict[str, float] = defaultdict(float)
    for record in rungs:
        for step, value in record.result["seconds"].items():
            seconds[step] += value
    resources = search.spec["resources"]
    return Cost(
        distillation_tokens=sum(spec.trained_tokens(record.rung) for record in rungs),
        step_seconds=dict(seconds),
        device_seconds=sum(seconds.values()) * (resources["gpus"] or resources["cpus"]),
    )


def describe_trial(trial: TrialRecord) -> TrialAnswer:
    return TrialAnswer(
        number=trial.number,
        origin=trial.origin,
        shape=Shape.from_dict(trial.shape),
        parameters=trial.parameters,
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
        finished_at=record.finished_at,
    )


def _without_documents(metric: Mapping[str, Any]) -> dict[str, Any]:
    return {name: metric[name] for name in ("value", "standard_error", "higher_is_better")}


def leaderboard(search: SearchRecord) -> LeaderboardAnswer:
    """The stored board, or an empty one before the first result."""
    return LeaderboardAnswer.model_validate({"rows": [], **(search.board or {}), "search": search.id, "state": search.state})


def is_verified(confirmation: Mapping[str, Any] | None) -> bool | None:
    """Whether a trial's file proved to be the model that was scored. A control's is counted but not reloaded: too little to call it so."""
    if confirmation is None or (confirmation["verified"] and not confirmation.get("reloaded", True)):
        return None
    return bool(confirmation["verified"])


def leaderboard_csv(board: LeaderboardAnswer, *, task_names: Sequence[str]) -> str:
    """One line per row; a column per task and its standard error. Empty where there is no value."""
    names = ["rank", "tie_group", "number", "origin", *SHAPE_FIELDS, "parameters", "share_of_teacher", "rung", "tokens", "score", "standard_error"]
    names += ["kl", "kl_standard_error", "loss", "state", "verified"]
    tasks = [f"{task}{suffix}" for task in task_names for suffix in ("", "_standard_error")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, *tasks])
    for row in board.rows:
        values = {"state": None, "num_experts": None, **row.shape.as_dict(), **dict(row), "verified": is_verified(dict(row).get("confirmation"))}
        scores = [row.tasks.get(task, {}).get(key) for task in task_names for key in ("value", "standard_error")]
        writer.writerow([*(values[name] for name in names), *scores])
    return out.getvalue()
