"""The leaderboard as it is stored: the ranking, with confirmations, baselines and the cost of the decision. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nas.search.ranking import board_as_dict, weak_tasks
from nas.search.results import RungResult
from workers.search_run import SearchRun


def make_board(run: SearchRun, *, prepared: dict[str, Any], confirmations: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """All results so far as plain JSON."""
    board = board_as_dict(run.board(prepared))
    for row in board["rows"]:
        row["confirmation"] = confirmations.get(row["number"])
    # Verified or not ranked first: until a row is confirmed it may lead, one that failed the confirmation never does.
    leads = [row for row in board["rows"] if row["rank"] is not None and not row["is_control"] and (row["confirmation"] or {"verified": True})["verified"]]
    board["winner"] = leads[0]["number"] if leads else None
    teacher, random = (RungResult.from_dict(prepared[name]) for name in ("teacher", "random"))
    board["weak_tasks"] = list(weak_tasks(run.spec.tasks, teacher=teacher, random=random))
    return {**board, "teacher": _baseline(prepared, "teacher"), "random": _baseline(prepared, "random"), "cost": _cost(run, prepared=prepared)}


def without_documents(result: dict[str, Any]) -> dict[str, Any]:
    """A result's numbers without the long lists."""

    def short(metric: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in metric.items() if name != "documents"}

    return {
        **{name: value for name, value in result.items() if name != "details"},
        "kl": short(result["kl"]),
        "loss": short(result["loss"]),
        "tasks": {name: short(metric) for name, metric in result["tasks"].items()},
    }


def _baseline(prepared: dict[str, Any], name: str) -> dict[str, Any]:
    return {"search": without_documents(prepared[name]), "held_out": without_documents(prepared[f"{name}_held_out"])}


def _cost(run: SearchRun, *, prepared: dict[str, Any]) -> dict[str, Any]:
    """Tokens trained on and seconds on the workers by step, of the prepare step and all finished rungs; confirmations are not in it."""
    seconds: dict[str, float] = {"prepare": sum(prepared.get("seconds", {}).values())}
    tokens = 0
    for results in run.results.values():
        tokens += sum(run.spec.trained_tokens(rung) for rung in results)
        for result in results.values():
            for name, value in result.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + value
    return {"tokens": tokens, "seconds": seconds, "cpus": run.spec.resources.cpus, "gpus": run.spec.resources.gpus}
