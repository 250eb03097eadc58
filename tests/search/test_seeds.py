from __future__ import annotations

import math
from statistics import fmean, variance

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.search.results import Metric
from nas.search.seeds import MIN_RESULTS, PRIOR_DEGREES_OF_FREEDOM, pooled_spread, score_error

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


def runs_of(logs: list[float], *, noise: float = 0.0, seed: int = 0, num_blocks: int = 64) -> list[Metric]:
    """Runs of one shape whose true log KLs are these; each block of each is off by the noise."""
    generator = np.random.default_rng(seed)
    common = generator.uniform(0.5, 1.5, num_blocks)
    blocks = [math.exp(log) * common * (1 + noise * generator.standard_normal(num_blocks)) for log in logs]
    return [Metric.from_documents(tuple(float(value) for value in one), higher_is_better=False) for one in blocks]


logs = st.lists(st.floats(-0.3, 0.3), min_size=2, max_size=5)
priors = st.floats(1e-4, 0.2)


@given(logs=logs, prior=priors)
def test_where_the_blocks_agree_the_variances_are_pooled_by_their_degrees_of_freedom(logs: list[float], prior: float) -> None:
    found = pooled_spread(prior, runs=runs_of(logs))

    freedom = len(logs) - 1
    pooled = (PRIOR_DEGREES_OF_FREEDOM * prior**2 + freedom * variance(logs)) / (PRIOR_DEGREES_OF_FREEDOM + freedom)
    assert found.value == pytest.approx(math.sqrt(pooled), rel=1e-3)
    assert found.measured == pytest.approx(math.sqrt(variance(logs)), abs=1e-9)
    assert (found.num_runs, found.prior) == (len(logs), prior)


@given(logs=logs, prior=priors, noise=st.floats(0.0, 0.5))
def test_the_order_of_the_runs_and_the_level_of_their_kl_do_not_matter(logs: list[float], prior: float, noise: float) -> None:
    runs = runs_of(logs, noise=noise)
    louder = [Metric.from_documents(tuple(3 * value for value in run.documents), higher_is_better=False) for run in runs]

    assert pooled_spread(prior, runs=runs[::-1]).value == pytest.approx(pooled_spread(prior, runs=runs).value)
    assert pooled_spread(prior, runs=louder).value == pytest.approx(pooled_spread(prior, runs=runs).value)


def test_runs_that_differ_no_more_than_their_blocks_leave_the_prior() -> None:
    """Blocks that are off by 40 % each hide a spread of 1 %."""
    found = [pooled_spread(0.01, runs=runs_of([0.0, 0.0, 0.0], noise=0.4, seed=seed)) for seed in range(20)]

    assert fmean(one.measured or 0.0 for one in found) > 0.03
    assert all(one.value == pytest.approx(0.01, rel=0.25) for one in found)
    assert fmean(one.value for one in found) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("prior", [0.005, 0.05])
def test_more_repeats_bring_a_wrong_prior_nearer_to_the_truth(prior: float) -> None:
    truth, generator = 0.02, np.random.default_rng(0)
    errors = []
    for num_runs in (1, 2, 4, 8):
        found = [pooled_spread(prior, runs=runs_of(list(truth * generator.standard_normal(num_runs)), noise=0.02, seed=draw)).value for draw in range(60)]
        errors.append(fmean(abs(math.log(value / truth)) for value in found))

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.75 * errors[0]


def test_without_repeats_or_with_a_spread_of_zero_the_prior_stays() -> None:
    alone = pooled_spread(0.01, runs=runs_of([0.0]))

    assert (alone.value, alone.measured, alone.num_runs) == (0.01, None, 0)
    assert pooled_spread(0.0, runs=runs_of([0.0, 0.5])).value == 0.0
