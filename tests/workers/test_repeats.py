"""Repeats of an anchor in a simulated search: they measure the spread between seeds, and do nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.search.results import RungResult, is_repeat
from nas.search.rungs import projected_spread
from nas.store.records import TrialState
from nas.warm_start import Known, Memory
from tests.workers.test_search_run import NAMED, Simulation, make_record, make_result
from workers.actions import Advance
from workers.search_run import SearchRun

REPEATED = {"num_random": 1, "num_repeats": 2}


def outcome(simulation: Simulation) -> list[tuple[str, str, int]]:
    """What became of every trial that is no repeat."""
    run = simulation.run
    return [(trial.origin, run.shape_of(number).key, run.reached[number]) for number, trial in run.trials.items() if not is_repeat(trial.origin)]


def runs_apart(*, factor: float) -> Callable[[SearchRun, int, int], RungResult]:
    """Results of which each repeat's KL is so many times the one before; the blocks agree about it."""

    def result_of(run: SearchRun, trial: int, rung: int) -> RungResult:
        if not is_repeat(run.trials[trial].origin):
            return make_result(run, trial, rung)
        anchor = make_result(run, run.evidence.runs[0], rung)
        scale = factor ** (run.seed_of(trial) - run.spec.seed) if rung else 1.0
        documents = tuple(scale * value for value in anchor.kl.documents)
        return replace(anchor, kl=replace(anchor.kl, value=scale * anchor.kl.value, documents=documents))

    return result_of


def test_they_come_after_the_named_shapes_with_a_seed_each_and_reach_the_last_rung() -> None:
    simulation = Simulation(make_record(controls=REPEATED, shapes=[NAMED], seed=7)).to_end(parallel=3)

    run = simulation.run
    origins = [trial.origin for trial in run.trials.values()]
    first = origins.index("repeat:1")
    assert origins[first - 1 : first + 2] == ["user", "repeat:1", "repeat:2"]
    uniform = run.space.anchors()["uniform"]
    assert [(run.shape_of(number), run.seed_of(number)) for number in (first, first + 1)] == [(uniform, 8), (uniform, 9)]
    assert {run.seed_of(number) for number, trial in run.trials.items() if not is_repeat(trial.origin)} == {7}
    assert all(run.trials[number].state is TrialState.COMPLETED for number in (first, first + 1))
    assert sum(origin in ("sampler", "user") or origin.startswith("anchor") for origin in origins) == run.spec.sampler.max_trials
    assert origins.count("control") == 1


@given(seed=st.integers(0, 2**16), keep=st.sampled_from([0.1, 0.34, 0.5]), sampler=st.sampled_from(["random", "tpe", "enumerate"]))
@settings(max_examples=20, deadline=None)
def test_without_a_spread_they_change_nothing_for_the_others(seed: int, keep: float, sampler: str) -> None:
    """They teach the sampler nothing, take no place, make nobody a certain loser and count nowhere."""
    settings_of: dict[str, Any] = {"rungs": {"num_trained": 3, "keep": keep, "seed_spread": 0.0}, "sampler": {"name": sampler, "max_trials": 10}, "seed": seed}

    without, with_them = (
        Simulation(make_record(controls={"num_random": 1, "num_repeats": number}, **settings_of)).to_end(parallel=1, seed=seed) for number in (0, 3)
    )

    assert sum(is_repeat(trial.origin) for trial in with_them.run.trials.values()) == 3
    assert outcome(with_them) == outcome(without)


def test_what_they_show_is_pooled_with_the_prior_at_every_trained_rung() -> None:
    record = make_record(controls=REPEATED, rungs={"num_trained": 3})
    far, near = (Simulation(record, result_of=runs_apart(factor=factor)).to_end() for factor in (1.2, 1.0001))

    spec = far.run.spec.rungs
    for rung in (1, 2, 3):
        prior = spec.seed_spread if rung == 3 else projected_spread(spec.seed_spread, rung=rung, spec=spec)
        spreads = [simulation.run.evidence.seed_spread(rung) for simulation in (near, far)]
        assert [spread.num_runs for spread in spreads] == [3, 3]
        assert [spread.prior for spread in spreads] == [prior, prior]
        assert spreads[0].value < prior < spreads[1].value
    assert far.run.evidence.seed_spread(0).num_runs == 0  # nothing is trained there


def test_a_spread_that_they_show_takes_more_along_for_a_tie() -> None:
    rungs = {"num_trained": 2, "keep": 0.2, "max_tie_growth": 10.0, "keep_depth": 0.0, "keep_untrained": 1.0, "stop_losers": False}
    record = make_record(controls={"num_repeats": 3}, rungs=rungs, sampler={"name": "random", "max_trials": 20})
    far, near = (Simulation(record, result_of=runs_apart(factor=factor)).to_end(parallel=1) for factor in (1.5, 1.0))

    up = [{number for number, rung in simulation.run.reached.items() if rung == 2} for simulation in (near, far)]
    assert up[0] < up[1]


@pytest.mark.parametrize("state", [TrialState.FAILED, TrialState.CANCELLED])
def test_an_anchor_that_failed_is_not_repeated_and_the_search_ends(state: TrialState) -> None:
    simulation = Simulation(make_record(controls=REPEATED))
    while not simulation.running:
        simulation.fill(parallel=1)
        if simulation.run.evidence.runs:
            simulation.set_state(simulation.run.evidence.runs[0], state=state)
            simulation.running.clear()
            break
        simulation.finish(0)
    simulation.to_end()

    repeats = [trial for trial in simulation.run.trials.values() if is_repeat(trial.origin)]
    assert len(repeats) == (0 if state is TrialState.FAILED else 2)


def test_memory_answers_the_anchor_and_never_its_repeats() -> None:
    """An earlier search knows the shape at every rung."""
    record = make_record(controls=REPEATED)
    earlier = Simulation(record).to_end()
    known = {
        result.tokens: [Known(search="srch_0", trial=number, shape=earlier.run.shape_of(number), result=result, is_answer=True)]
        for number in earlier.run.evidence.runs[:1]
        for result in earlier.run.results[number].values()
    }
    run = SearchRun(record, trials=list(earlier.run.trials.values()), rungs=[], attempts=[], memory=Memory(by_tokens=known))

    anchor, *repeats = run.evidence.runs
    assert run.known_result(Advance(trial=anchor, rung=0)) is not None
    assert all(run.known_result(Advance(trial=number, rung=rung)) is None for number in repeats for rung in (0, 1))
