"""What the API and the pages say of a search, worked out from its records: progress, cost, board. Pure; reads no store, knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from api.schemas.results import BundleAnswer
from api.schemas.searches import Best, Cost, Input, Progress, RungProgress, SearchAnswer, SearchSummary
from api.schemas.trials import MetricAnswer, RungAnswer, TrialAnswer
from nas.chain import is_stand_in
from nas.shape import Shape
from nas.store.records import BundleRecord, PointRecord, RungRecord, SearchRecord, SearchState, TrialCounts, TrialRecord


def summarise_search(search: SearchRecord, *, counts: TrialCounts) -> SearchSummary:
    teacher_parameters, budget = search.plan.get("teacher_parameters"), search.plan.get("max_parameters")
    by_state, teacher_search = counts.by_state, search.inputs.get("teacher", {}).get("search")
    proposed = sum(by_state.values())
    return SearchSummary(
        id=search.id,
        label=search.label,
        labels=search.labels,
        state=search.state,
        teacher=search.spec["teacher"],
        teacher_search=teacher_search,
        waits_for=teacher_search if is_stand_in(search.inputs) and not search.state.is_terminal else None,
        max_parameters=budget,
        share_of_teacher=budget / teacher_parameters if budget and teacher_parameters else None,
        progress=Progress(
            planned=proposed if search.state.is_terminal else max(planned_trials(search), proposed),
            proposed=proposed,
            settled=sum(number for state, number in by_state.items() if state.is_terminal),
            trials=by_state,
            seconds_left=_seconds_left(search),
        ),
        best=best_row(search),
        created_at=search.created_at,
        updated_at=search.updated_at,
        started_at=search.started_at,
        finished_at=search.finished_at,
    )


def describe_search(search: SearchRecord, *, counts: TrialCounts) -> SearchAnswer:
    return SearchAnswer(
        **dict(summarise_search(search, counts=counts)),
        spec=search.spec,
        plan=search.plan,
        inputs=describe_inputs(search.inputs),
        rungs=rung_progress(search, counts=counts),
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
    row = (search.board or {}).get("of_rows", {}).get("leader")
    return None if row is None else Best(trial=row["number"], score=row["score"], standard_error=row["standard_error"])


def rung_progress(search: SearchRecord, *, counts: TrialCounts) -> list[RungProgress]:
    spec = search.spec["rungs"]
    tokens = [0, *(spec["first_tokens"] * spec["factor"] ** step for step in range(spec["num_trained"]))]
    return [RungProgress(rung=rung, tokens=count, finished=counts.finished(rung), running=counts.running(rung)) for rung, count in enumerate(tokens)]


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


def describe_bundle(bundle: BundleRecord) -> BundleAnswer:
    return BundleAnswer(
        search=bundle.search_id,
        trial=bundle.trial,
        state=bundle.state,
        requested_at=bundle.requested_at,
        finished_at=bundle.finished_at,
        sha256=bundle.sha256,
        bytes=bundle.num_bytes,
        bundle_url=None if bundle.path is None else f"/v1/searches/{bundle.search_id}/trials/{bundle.trial}/bundle",
        error=None if bundle.path is not None else bundle.error,
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


def thin(points: Sequence[PointRecord], *, max_points: int) -> list[PointRecord]:
    """At most so many of the points, at even distances, with the first and the last."""
    if len(points) <= max_points:
        return list(points)
    return [points[step * (len(points) - 1) // (max_points - 1)] for step in range(max_points)]


def _without_documents(metric: Mapping[str, Any]) -> dict[str, Any]:
    return {name: metric[name] for name in ("value", "standard_error", "higher_is_better")}
