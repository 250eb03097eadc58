"""Counts and rates of a plan, and plans that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.compress.train_plan import TrainPlan, trunk_rate
from tests.compress.training_values import SEQUENCE_LENGTH, plan


@given(tokens=st.integers(1, 10_000), decay_share=st.floats(0, 1), batch_size=st.integers(1, 9), warmup_tokens=st.integers(0, 5000))
@settings(max_examples=50, deadline=None)
def test_rates_rise_stay_and_fall_within_the_steps(tokens: int, decay_share: float, batch_size: int, warmup_tokens: int) -> None:
    train = TrainPlan(tokens=tokens, learning_rate=1.0, batch_size=batch_size, warmup_tokens=warmup_tokens, decay_tokens=int(decay_share * tokens), seed=0)
    steps, trunk = train.steps(SEQUENCE_LENGTH), train.trunk_steps(SEQUENCE_LENGTH)
    assert 0 <= tokens - (steps - 1) * batch_size * SEQUENCE_LENGTH <= batch_size * SEQUENCE_LENGTH
    assert 0 <= trunk <= steps
    rates = [train.rate(step, sequence_length=SEQUENCE_LENGTH) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:trunk] == sorted(rates[:trunk])
    if warmup_tokens == 0:
        assert rates[:trunk] == [1.0] * trunk
        assert rates[trunk:] == sorted(rates[trunk:], reverse=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens: expected more than 0, got 0"),
        ({"learning_rate": math.nan}, "learning_rate: expected more than 0, got nan"),
        ({"decay_tokens": 10**9}, "decay_tokens: expected 0 to tokens"),
        ({"micro_batch_size": 0}, "micro_batch_size: expected at least 1"),
    ],
)
def test_an_impossible_plan_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_a_rate_that_is_given_stays_constant() -> None:
    assert trunk_rate(3e-3, teacher_hidden_size=64) == (3e-3, False)


@pytest.mark.parametrize(("hidden_size", "published"), [(4096, 1e-4), (5120, 1e-4), (6144, 2e-4)])
def test_the_automatic_rate_is_near_the_published_ones(hidden_size: int, published: float) -> None:
    rate, follows = trunk_rate(None, teacher_hidden_size=hidden_size)
    assert follows
    assert published / 2.5 < rate * 0.3**0.25 < published * 2.5
