from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import limits
from api.limits import TokenBuckets


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    clock = Clock()
    buckets = TokenBuckets(rate=2.0, burst=3.0, clock=clock)

    assert [buckets.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    clock.now = 0.25
    assert buckets.take("a") == pytest.approx(0.25)
    clock.now = 0.5
    assert [buckets.take("a"), buckets.take("a")] == [0.0, 0.5]


def test_every_name_has_a_bucket_of_its_own() -> None:
    buckets = TokenBuckets(rate=1.0, burst=1.0, clock=Clock())

    assert [buckets.take(name) for name in ("a", "b", "a", "b")] == [0.0, 0.0, 1.0, 1.0]


@given(waits=st.lists(st.floats(min_value=0, max_value=5), min_size=1, max_size=60), rate=st.floats(0.1, 10), burst=st.integers(1, 10))
def test_nobody_gets_more_than_burst_and_rate_and_whoever_waits_as_told_is_served(waits: list[float], rate: float, burst: int) -> None:
    clock = Clock()
    buckets = TokenBuckets(rate=rate, burst=burst, clock=clock)
    served = 0
    for wait in waits:
        clock.now += wait
        told = buckets.take("a")
        served += told == 0.0
        assert served <= burst + rate * clock.now + 1e-6
    if told:
        clock.now += told + 1e-6
        assert buckets.take("a") == 0.0


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_NAMES", 3)
    buckets = TokenBuckets(rate=1.0, burst=1.0, clock=Clock())
    for name in "abc":
        buckets.take(name)
    buckets.take("a")
    buckets.take("d")  # b was asked for longest ago

    assert [buckets.take(name) > 0 for name in "acd"] == [True, True, True]
    assert buckets.take("b") == 0.0
