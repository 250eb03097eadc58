"""Searches of thousands of trials, made up: the rows that a real one would have left in the store, and its board."""

from __future__ import annotations

import random
from typing import Any

from sqlalchemy import insert

from nas.shape import Shape
from nas.store.records import AttemptState, SearchState, TrialState, utc_now
from nas.store.store import Store
from nas.store.tables import attempts, events, points, rungs, searches, trials

TASKS = ("pairs", "bits", "arc_easy", "hellaswag", "piqa")
RANKED_SHARE, FIRST_RUNG_SHARE = 0.05, 0.3
"""Of the trials: those at the last rung, and at least at the first trained one."""


def fill(store: Store, search_id: str, *, num_trials: int, seed: int = 0) -> None:
    """Give a search so many trials, with their results, numbers, events and board, and bring it to searching. A few have failed, run or wait."""
    draw, now = random.Random(seed), utc_now()
    made = [_trial(draw, number, num_trials=num_trials) for number in range(num_trials)]
    with store.write(fence=None) as connection:
        common = {"search_id": search_id, "created_at": now, "updated_at": now}
        connection.execute(insert(trials), [{**trial, **common} for trial in made])
        results = [_rung(trial, rung) for trial in made for rung in range(0 if trial["rung"] is None else trial["rung"] + 1)]
        tries = [_attempt(search_id, result, number) for number, result in enumerate(results)]
        connection.execute(insert(attempts), [{**one, "started_at": now, "finished_at": now} for one in tries])
        curves = [{"search_id": search_id, **point} for result in results if result["rung"] for point in _points(result)]
        connection.execute(insert(points), curves)
        numbered = [{**result, "search_id": search_id, "sequence": sequence, "finished_at": now} for sequence, result in enumerate(results, start=1)]
        connection.execute(insert(rungs), numbered)
        add_events(store, search_id, number=2 * num_trials, connection=connection)
    store.recount_trials(search_id, fence=None)
    store.change_search(search_id, to=SearchState.SEARCHING, expected=[SearchState.QUEUED], fence=None)
    store.save_board(search_id, make_board([trial for trial in made if trial["rung"] is not None], seed=seed), fence=None)


def add_events(store: Store, search_id: str, *, number: int, connection: Any) -> None:
    """So many events behind those that are there."""
    there = connection.execute(searches.select().with_only_columns(searches.c.num_events).where(searches.c.id == search_id)).scalar_one()
    common = {"search_id": search_id, "type": "trial.rung_finished", "created_at": utc_now()}
    data = {"rung": 1, "tokens": 1000, "state": "waiting", "kl": 0.5, "loss": 2.5}
    rows = [{**common, "sequence": there + step, "data": {"trial": step, **data}} for step in range(1, number + 1)]
    connection.execute(insert(events), rows)
    connection.execute(searches.update().where(searches.c.id == search_id).values(num_events=there + number))


def make_board(ranked: list[dict[str, Any]], *, seed: int = 0) -> dict[str, Any]:
    """A board of these trials (rows of the table), of the size that the real one has."""
    draw = random.Random(seed)
    last = [trial for trial in ranked if trial["state"] == TrialState.COMPLETED]
    others = sorted((trial for trial in ranked if trial["state"] != TrialState.COMPLETED), key=lambda trial: (-trial["rung"], _kl(trial, trial["rung"])))
    scores = sorted((draw.uniform(0.2, 0.9) for _ in last), reverse=True)
    rows = []
    for place, (trial, score) in enumerate(zip(last, scores, strict=True)):
        group = place // 3
        rows.append(make_row(trial, rank=3 * group + 1, tie_group=group + 1, score=score))
    rows += [make_row(trial, rank=None, tie_group=None, score=draw.uniform(0.0, 0.5)) for trial in others]
    leader = rows[0]["number"] if last else None
    cost = {"tokens": 10**9, "seconds": {"prepare": 60.0, "distil": 1e5}, "device_seconds": 1e6, "cpus": 1.0, "gpus": 8.0, "decisions": []}
    front = [row["number"] for row in rows[: min(20, len(last))]]
    return {"rows": rows, "leader": leader, "winner": None, "finalists": [], "pareto": front, "agreement": [], "controls": None, "cost": cost}


def make_row(trial: dict[str, Any], *, rank: int | None, tie_group: int | None, score: float) -> dict[str, Any]:
    interval = {"value": -0.1, "standard_error": 0.02, "low": -0.14, "high": -0.06}
    kl = _kl(trial, trial["rung"])
    return {
        "rank": rank,
        "tie_group": tie_group,
        "tied": rank is not None,
        "number": trial["number"],
        "origin": trial["origin"],
        "is_control": False,
        "shape": trial["shape"],
        "parameters": trial["parameters"],
        "share_of_teacher": 0.5,
        "rung": trial["rung"],
        "tokens": 1000 * trial["rung"],
        "score": score,
        "standard_error": 0.0123456789,
        "difference": interval if rank is not None else None,
        "kl": kl,
        "kl_standard_error": 0.0123456789,
        "kl_by_rung": [_kl(trial, rung) for rung in range(trial["rung"] + 1)],
        "loss": 1 + kl,
        "tasks": {task: {"value": 0.123456789 + score, "standard_error": 0.0123456789, "higher_is_better": True, "share": score} for task in TASKS},
        "costs": {"parameters": float(trial["parameters"]), "memory_bytes": 4.0 * trial["parameters"], "flops_per_token": 6.0 * trial["parameters"]},
        "state": trial["state"],
        "verified": None,
        "probability_best": None,
        "confirmation": None,
    }


def _trial(draw: random.Random, number: int, *, num_trials: int) -> dict[str, Any]:
    shape = {"num_hidden_layers": 1 + number % 4, "hidden_size": 8 * (1 + number // 4 % 8), "intermediate_size": 8 + number // 32}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    state, rung = TrialState.STOPPED, 0 if draw.random() > FIRST_RUNG_SHARE else 1
    if number < RANKED_SHARE * num_trials:
        state, rung = TrialState.COMPLETED, 2
    elif num_trials - number <= 6:
        state, rung = [(TrialState.FAILED, None), (TrialState.RUNNING, None), (TrialState.WAITING, 0)][number % 3]
    return {
        "number": number,
        "origin": "sampler",
        "shape": shape,
        "shape_key": Shape.from_dict(shape).key,
        "choices": {"mlp_fill": draw.random()},
        "parameters": 50_000 + draw.randrange(50_000),
        "budget": 0,
        "state": state,
        "rung": rung,
        "failure": {"stage": "rung 0", "reason": "out_of_memory", "message": "no room", "attempts": 3} if state is TrialState.FAILED else None,
    }


def _attempt(search_id: str, result: dict[str, Any], number: int) -> dict[str, Any]:
    step = {"stage": "rung", "trial": result["trial"], "rung": result["rung"]}
    return {"id": f"att_{search_id.removeprefix('srch_')}{number:06}", "search_id": search_id, **step, "state": AttemptState.SUCCEEDED}


def _points(result: dict[str, Any]) -> list[dict[str, Any]]:
    speeds = {"learning_rate": 1e-3, "tokens_per_second": 1e4}
    return [{"trial": result["trial"], "rung": result["rung"], "tokens": 500 * step, "loss": 2.0 / step, **speeds} for step in (1, 2)]


def _kl(trial: dict[str, Any], rung: int) -> float:
    return 2.0 / (1 + rung) + 1e-5 * (trial["number"] * 7919 % 10_007)


def _rung(trial: dict[str, Any], rung: int) -> dict[str, Any]:
    def metric(value: float) -> dict[str, Any]:
        return {"value": value, "standard_error": 0.0123456789, "higher_is_better": False}

    kl = _kl(trial, rung)
    tasks = {task: metric(kl) for task in TASKS[:2]} if rung else {}
    facts = {"rung": rung, "tokens": 1000 * rung, "parameters": trial["parameters"], "seconds": {"distil": 2.0}, "details": {}}
    measured = {"kl": metric(kl), "loss": metric(1 + kl), "tasks": tasks}
    values = {"documents": [kl - 0.1, kl + 0.1]}
    documents = {"kl": values, "loss": values, **({"tasks": dict.fromkeys(tasks, values)} if tasks else {})}
    return {"trial": trial["number"], "rung": rung, "summary": {**facts, **measured}, "documents": documents}
