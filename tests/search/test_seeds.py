from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.search.seeds import MIN_RESULTS, score_error

spreads = st.floats(0.0, 0.2)


def test_a_score_that_falls_with_log_kl_has_that_slope_times_the_spread() -> None:
    results = [(math.exp(-step / 4), 0.2 + 0.1 * step / 4) for step in range(8)]

    assert score_error(results, seed_spread=0.02) == pytest.approx(0.1 * 0.02)


def test_one_odd_trial_does_not_move_the_slope() -> None:
    results = [(math.exp(-step / 4), 0.2 + 0.1 * step / 4) for step in range(8)]

    assert score_error([*results, (0.9, 5.0)], seed_spread=0.02) == pytest.approx(0.1 * 0.02, rel=0.3)


@given(st.lists(st.tuples(st.floats(0.01, 3.0), st.floats(-1.0, 1.0)), max_size=12), spreads)
def test_the_order_of_the_trials_does_not_matter(results: list[tuple[float, float]], spread: float) -> None:
    shuffled = sorted(results, key=lambda pair: hash(pair))

    assert score_error(shuffled, seed_spread=spread) == score_error(results, seed_spread=spread) >= 0


def test_too_few_trials_tell_no_slope() -> None:
    assert score_error([(0.1 + step, step) for step in range(MIN_RESULTS - 1)], seed_spread=0.1) == 0.0
    assert score_error([(0.1, step) for step in range(9)], seed_spread=0.1) == 0.0
