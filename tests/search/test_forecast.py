from __future__ import annotations

import pytest

from nas.estimate import rung_work
from nas.search.forecast import time_left
from nas.spec import BudgetSpec, CorpusPart, CorpusSpec, ResourceSpec, RungSpec, SearchSpec, TaskSpec

SPEC = SearchSpec(
    teacher="tiny",
    corpus=CorpusSpec(parts=(CorpusPart(name="words"),)),
    tasks=(TaskSpec(name="choice"),),
    budget=BudgetSpec(max_fraction=0.6),
    rungs=RungSpec(first_tokens=1000, factor=4, num_trained=2, keep_untrained=0.5, keep=0.5),
    resources=ResourceSpec(max_parallel_trials=2),
)
WORK = rung_work(SPEC, searched=8, forced=0)


def test_nothing_is_foretold_before_a_trained_rung_has_told_the_speed() -> None:
    assert time_left(SPEC, work=WORK, seconds={}) is None
    assert time_left(SPEC, work=WORK, seconds={0: [{"evaluate": 1.0}] * 8}) is None


def test_what_is_left_is_the_expected_trials_at_the_measured_speed() -> None:
    found = time_left(SPEC, work=WORK, seconds={0: [{"evaluate": 1.0}] * 8, 1: [{"distil": 10.0, "evaluate": 2.0}]})
    assert found is not None
    # Three more of rung 1, and two of rung 2, which trains 3,000 new tokens and 300 of the decay branch again at 10 ms each.
    assert [(rung.rung, rung.trials) for rung in found.rungs] == [(0, 0), (1, 3), (2, 2)]
    assert found.seconds == pytest.approx((3 * 12 + 2 * (33 + 2)) / 2)


def test_more_trials_than_expected_leave_nothing_rather_than_less() -> None:
    found = time_left(SPEC, work=WORK, seconds={rung: [{"distil": 1.0, "evaluate": 1.0}] * 9 for rung in range(3)})
    assert found is not None
    assert found.seconds == 0.0


def test_a_result_that_was_known_before_is_through_but_tells_no_speed() -> None:
    measured = time_left(SPEC, work=WORK, seconds={0: [{"evaluate": 1.0}] * 8, 1: [{"distil": 10.0, "evaluate": 2.0}]})
    with_known = time_left(SPEC, work=WORK, seconds={0: [{}] * 4 + [{"evaluate": 1.0}] * 4, 1: [{"distil": 10.0, "evaluate": 2.0}, {}, {}]})

    assert measured is not None
    assert with_known is not None
    assert [(rung.trials, rung.seconds_per_trial) for rung in with_known.rungs] == [
        (rung.trials - (2 if rung.rung == 1 else 0), rung.seconds_per_trial) for rung in measured.rungs
    ]
    assert time_left(SPEC, work=WORK, seconds={1: [{}]}) is None
