"""How fast a search decides, and what that costs the workers: the product's own decisions, on workers that only pretend (tests/simulation).

Proposals per second at 100, 1,000 and 10,000 finished trials; then a whole search under the real controller and store, on a clock that also moves while
the controller thinks, and every promise of a search is checked. `python -m tests.benchmarks.simulation 10000 1000` simulates ten thousand trials.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from nas.spec import dump_spec, parse_spec
from nas.store.records import RungRecord, SearchRecord, SearchState, TrialRecord, TrialState, utc_now
from tests.simulation.cluster import Clock, measure
from tests.simulation.simulator import INPUTS, check, make_simulation, make_spec
from workers.actions import NewTrial
from workers.board import make_board
from workers.family import Family

FINISHED = (100, 1_000, 10_000)
NUM_PROPOSALS = 20
NUM_TRIALS, NUM_WORKERS = 600, 100
MAX_TRIAL_SHARE = 0.3
"""Of the finished trials: those with a result at the second trained rung."""

console = Console(width=120)


def bench() -> bool:
    logging.disable(logging.ERROR)  # workers that pretend to refuse a step are part of it
    table = Table("finished trials", "proposals/s", "decisions what is next/s", "seconds of a leaderboard", box=None)
    for number in FINISHED:
        proposals, decisions, board = _speeds(number)
        table.add_row(f"{number:,}", f"{proposals:.1f}", f"{decisions:,.0f}", f"{board:.2f}")
    console.print(table)
    return _simulate(NUM_TRIALS, NUM_WORKERS)


def _speeds(num_finished: int) -> tuple[float, float, float]:
    """Proposals and decisions per second, and seconds of one leaderboard; of processor time, since other programs are none of ours."""
    run = _finished_run(num_finished)
    started = time.process_time()
    for _ in range(NUM_PROPOSALS):
        action = run.next_action()
        assert isinstance(action, NewTrial)
        run.set_trial(_trial(len(run.trials), shape=action.shape.as_dict(), state=TrialState.RUNNING, rung=None))
    proposals = NUM_PROPOSALS / (time.process_time() - started)
    decisions = []
    for number in range(num_finished, num_finished + NUM_PROPOSALS):  # each comes back from rung 0, and goes on
        started = time.process_time()
        result = measure(run.shape_of(number), rung=0, tokens=0, tasks=[])
        run.set_trial(replace(run.trials[number], state=TrialState.WAITING, rung=0))
        run.add_result(number, result)
        run.left_behind()
        run.next_action()
        decisions.append(time.process_time() - started)
        run.set_trial(replace(run.trials[number], state=TrialState.STOPPED))
    teacher = measure(run.runs[0].space.architecture.shape, rung=0, tokens=0, tasks=["one", "two"]).as_dict()
    random = json.loads(json.dumps(teacher), parse_float=lambda text: float(text) * 0.5)
    prepared = {"teacher": teacher, "teacher_held_out": teacher, "random": random, "random_held_out": random, "seconds": {}}
    started = time.process_time()
    make_board(run, prepared=prepared, confirmations={})
    return proposals, NUM_PROPOSALS / sum(decisions), time.process_time() - started


def _finished_run(num_finished: int) -> Family:
    """A search with so many trials that were stopped after the first trained rung, some after the next."""
    spec = dump_spec(parse_spec(json.dumps(make_spec(num_trials=2 * num_finished, num_workers=100, controls={"anchors": False}))))
    empty = {"plan": {}, "board": None, "winner": None, "error": None, "started_at": None, "finished_at": None}
    record = SearchRecord(id="srch", label="", state=SearchState.SEARCHING, spec=spec, inputs=INPUTS, created_at=_NOW, updated_at=_NOW, version=1, **empty)
    space = Family(record, trials=[], rungs=[], attempts=[]).runs[0].space
    generator = np.random.default_rng(0)
    shapes = {}
    while len(shapes) < num_finished:
        shape = space.draw(generator)
        shapes[shape.key] = shape
    trials, rungs = [], []
    for number, shape in enumerate(shapes.values()):
        last = 2 if number % 10 < 10 * MAX_TRIAL_SHARE else 1
        trials.append(_trial(number, shape=shape.as_dict(), state=TrialState.STOPPED, rung=last))
        for rung in range(last + 1):
            result = measure(shape, rung=rung, tokens=0, tasks=[]).as_dict()
            rungs.append(RungRecord(search_id="srch", trial=number, rung=rung, sequence=len(rungs) + 1, result=result, finished_at=_NOW))
    return Family(record, trials=trials, rungs=rungs, attempts=[])


_NOW = utc_now()


def _trial(number: int, *, shape: dict[str, int], state: TrialState, rung: int | None) -> TrialRecord:
    empty = {"choices": None, "failure": None, "confirmation": None, "created_at": _NOW, "updated_at": _NOW}
    return TrialRecord(search_id="srch", number=number, origin="sampler", shape=shape, parameters=1, state=state, rung=rung, **empty)


def _simulate(num_trials: int, num_workers: int) -> bool:
    """One search to its end; whether every promise held."""
    # In memory where the machine has such a folder: what is measured is the deciding, not the disk.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        simulation = make_simulation(Path(folder), num_trials=num_trials, num_workers=num_workers, seed=0, clock=Clock(is_charged=True))
        started = time.perf_counter()
        cluster, saturated = simulation.cluster, (0.0, 0.0)
        while simulation.tick():
            if len(simulation.run.trials) < num_trials:
                saturated = cluster.clock.seconds, cluster.busy_seconds + sum(cluster.clock.seconds - run.began for run in cluster.running)
        wall, clock = time.perf_counter() - started, cluster.clock.seconds
        first = next(run.began for run in cluster.history if run.step.stage == "rung")
        busy = saturated[1] / ((saturated[0] - first) * num_workers)
        console.print(
            f"{num_trials:,} trials on {num_workers:,} workers: {clock:,.0f} simulated s in {wall:,.0f} s ({len(cluster.history):,} steps, "
            f"{1000 * wall / len(cluster.history):.1f} ms each) · workers idle {1 - busy:.1%} until the last shape was proposed, "
            f"{1 - cluster.busy_seconds / (clock * num_workers):.1%} with the search's end"
        )
        try:
            check(simulation)
        except AssertionError as broken:
            console.print(f"a promise was broken: {broken}", style="red")
            return False
        finally:
            simulation.close()
        console.print("nothing lost, nothing twice, nothing over the budget, no promotion revoked, the best one won")
        return True


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # workers that pretend to refuse a step are part of it
    sys.exit(not _simulate(int(sys.argv[1]), int(sys.argv[2])))
