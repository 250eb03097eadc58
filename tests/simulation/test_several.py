"""Several controllers under one made-up time: whoever dies, freezes, wakes or comes late, every search ends as it should, led without a long break."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.simulation.several import LEASE_SECONDS, LOOK_SECONDS, TICK_SECONDS, Fleet

Make = Callable[..., Fleet]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Fleet] = []

    def one(**arguments: Any) -> Fleet:
        made.append(Fleet(folder=tmp_path / str(len(made)), **arguments))
        return made[-1]

    yield one
    for fleet in made:
        fleet.close()


def test_searches_are_shared_and_each_is_led_by_one(make: Make) -> None:
    fleet = make(num_searches=0, num_trials=2, seed=0)
    for _ in range(3):
        fleet.join()
    fleet.round()
    fleet.submit(num=6)
    fleet.round()

    assert [len(member.searches) for member in fleet.members] == [2, 2, 2]
    assert Counter(search for member in fleet.members for search in member.searches) == Counter(fleet.search_ids)

    fleet.to_end()
    fleet.check()
    assert all(attempt.state != "lost" for search in fleet.search_ids for attempt in fleet.store.list_attempts(search))


def test_one_that_comes_late_gets_its_share_without_any_work_being_lost(make: Make) -> None:
    fleet = make(num_searches=6, num_trials=2, seed=1)
    fleet.join()
    for _ in range(5):
        fleet.round()
    late = fleet.join()
    most = 0
    while fleet.round():
        most = max(most, len(late.searches))

    assert most >= 3
    fleet.check()
    assert all(attempt.state != "lost" for search in fleet.search_ids for attempt in fleet.store.list_attempts(search))


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_what_one_led_is_led_by_others_within_the_time_of_a_lease(make: Make, how: str) -> None:
    fleet = make(num_searches=6, num_trials=2, seed=2)
    for _ in range(3):
        fleet.join()
    for _ in range(8):
        fleet.round()
    victim = fleet.members[0]
    led = victim.searches
    assert len(led) == 2
    if how == "kill":
        fleet.kill(victim)
    else:
        fleet.freeze(victim, seconds=20 * LEASE_SECONDS)

    fleet.to_end()

    assert fleet.most_unled_seconds <= LEASE_SECONDS + LOOK_SECONDS + len(fleet.members) * TICK_SECONDS
    fleet.check()
    others = {attempt.search_id for search in fleet.search_ids if search not in led for attempt in fleet.store.list_attempts(search) if attempt.state == "lost"}
    assert not others, "searches of others were disturbed"


def run_with_troubles(make: Make, *, seed: int) -> Counter[str]:
    fleet = make(num_searches=3, num_trials=3, seed=seed)
    for _ in range(2 + seed % 2):
        fleet.join()
    while fleet.round():
        fleet.trouble(rate=0.15)
    fleet.check()
    return fleet.happened


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_lost_and_nothing_counts_twice_whatever_happens(make: Make, seed: int) -> None:
    happened = run_with_troubles(make, seed=seed)

    assert happened["killed"] + happened["frozen"] >= 1
