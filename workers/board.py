"""The leaderboard as it is stored: the ranking, with confirmations, baselines and the cost of each decision. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nas.estimate import total_work
from nas.search.confirmed import Confirmation
from nas.search.forecast import time_left
from nas.search.leaderboard import Board, board_as_dict
from nas.search.results import trained_tokens
from workers.family import Family
from workers.search_run import SearchRun


def make_board(family: Family, *, prepared: dict[str, Any], confirmations: Mapping[int, Confirmation]) -> dict[str, Any]:
    """All results so far as plain JSON, without the documents' scores.

    The board is that of the first budget, with what the search as a whole cost. Those of further budgets are its `more_budgets`, in their order;
    `winners` has the winner of each budget.
    """
    rankings = family.boards(prepared, confirmations=confirmations)
    boards = [_one_board(run, ranking=ranking) for run, ranking in zip(family.runs, rankings, strict=True)]
    signals = family.signals(prepared)
    whole = {
        "weak_tasks": [signal.task for signal in signals if not signal.clear],
        "task_signals": [signal.as_dict() for signal in signals],
        "teacher": _baseline(prepared, "teacher"),
        "random": _baseline(prepared, "random"),
        "winners": [ranking.winner for ranking in rankings],
        "cost": count_cost(family, boards=rankings, prepared=prepared),
        "time_left": _time_left(family),
    }
    return {**boards[0], **whole, "end_reason": family.end_reason(), "more_budgets": boards[1:]}


def _one_board(run: SearchRun, *, ranking: Board) -> dict[str, Any]:
    board = board_as_dict(ranking)
    for row in board["rows"]:
        found = run.trials[row["number"]].confirmation
        row["confirmation"] = {**found, "held_out": without_documents(found["held_out"])} if found and "held_out" in found else found
    return {**board, "end_reason": run.end_reason()}


def without_documents(result: dict[str, Any]) -> dict[str, Any]:
    """A result's numbers without the long lists."""

    def short(metric: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in metric.items() if name != "documents"}

    return {
        **{name: value for name, value in result.items() if name not in ("details", "likelihoods")},
        "kl": short(result["kl"]),
        "loss": short(result["loss"]),
        "tasks": {name: short(metric) for name, metric in result["tasks"].items()},
        "likelihoods": {task: {form: short(metric) for form, metric in forms.items()} for task, forms in result.get("likelihoods", {}).items()},
    }


def _baseline(prepared: dict[str, Any], name: str) -> dict[str, Any]:
    return {"search": without_documents(prepared[name]), "held_out": without_documents(prepared[f"{name}_held_out"])}


def count_cost(run: Family, *, boards: Sequence[Board], prepared: dict[str, Any]) -> dict[str, Any]:
    """Tokens trained on and device seconds of all finished steps: in all, by step, and for each decision what it took to make it.

    A decision is a rung (who goes on) or the confirm step (who wins). Device seconds are wall seconds times the devices of a step: its GPUs, or its CPU
    cores where it has none.
    """
    devices = run.spec.resources.gpus or run.spec.resources.cpus
    seconds: dict[str, float] = {"prepare": sum(prepared.get("seconds", {}).values())}
    trained = {
        number: trained_tokens({rung: result.reused_from is not None for rung, result in found.items()}, spec=run.spec) for number, found in run.results.items()
    }
    decisions = []
    every = run.results
    for rung in range(run.last_rung + 1):
        results = {number: found[rung] for number, found in every.items() if rung in found}
        wall = 0.0
        for result in results.values():
            wall += sum(result.seconds.values())
            for name, value in result.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + value
        chosen = sum(len(board.finalists) for board in boards) if rung == run.last_rung else sum(rung + 1 in every[number] for number in results)
        tokens = sum(trained[number][rung] for number in results)
        decisions.append(_decision(f"rung {rung}", trials=len(results), chosen=chosen, tokens=tokens, device_seconds=wall * devices))
    confirmed = [trial.confirmation for trial in run.trials.values() if trial.confirmation is not None]
    seconds["confirm"] = sum(sum(found.get("seconds", {}).values()) for found in confirmed)
    chosen = sum(board.winner is not None for board in boards)
    decisions.append(_decision("confirm", trials=len(confirmed), chosen=chosen, tokens=0, device_seconds=seconds["confirm"] * devices))
    return {
        "tokens": sum(decision["tokens"] for decision in decisions),
        "device_seconds": sum(seconds.values()) * devices,
        "seconds": seconds,
        "decisions": decisions,
        "cpus": run.spec.resources.cpus,
        "gpus": run.spec.resources.gpus,
    }


def _decision(name: str, *, trials: int, chosen: int, tokens: int, device_seconds: float) -> dict[str, Any]:
    return {
        "decision": name,
        "trials": trials,
        "chosen": chosen,
        "tokens": tokens,
        "device_seconds": device_seconds,
        "tokens_per_chosen": tokens / chosen if chosen else None,
        "device_seconds_per_chosen": device_seconds / chosen if chosen else None,
    }


def _time_left(run: Family) -> dict[str, Any] | None:
    """Of the search stage, at its own speed so far; None while nothing is known, or nothing left."""
    work = total_work(run.spec, plans=run.plan["budgets"]) if "budgets" in run.plan else []
    seconds: dict[int, list[Mapping[str, float]]] = {}
    for results in run.results.values():
        for rung, result in results.items():
            seconds.setdefault(rung, []).append(result.seconds)
    left = time_left(run.spec, work=work, seconds=seconds)
    return None if left is None or run.is_finished() else left.as_dict()
