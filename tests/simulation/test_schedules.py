"""Thousands of schedules of controllers, users and faults: nothing is lost, nothing done twice, and without users all is found that would have been.

A schedule that fails is run alone by `NAS_SEEDS=417 pytest tests/simulation/test_schedules.py -k any_schedule`.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nas.store.store import Store
from tests.faults.history import Count, count
from tests.faults.summary import COUNTS, HAPPENED, SCHEDULES, SECONDS, RecordProperty
from tests.simulation.schedules import Dangers, World, figures
from tests.simulation.several import TimedStore

pytestmark = pytest.mark.faults

SEEDS = [int(seed) for seed in os.environ.get("NAS_SEEDS", "").split(",") if seed]
FEW, MANY, NUM_PARTS = 20, 2000, 8
POISON = frozenset({2})


class Worlds:
    """Makes worlds, one after the other: the database of each is an empty one under the same name, so that one engine serves them all."""

    def __init__(self, folder: Path) -> None:
        self._data, self._template = folder / "data", folder / "template.db"
        template = Store.open(f"sqlite:///{self._template}", migrate=True)
        template.close()
        self._store = TimedStore.open(f"sqlite:///{self._data}/nas.db")
        self.undisturbed: dict[str, list[Any]] = {}
        """What searches find when nothing happens, by plan."""

    def __call__(self, **arguments: Any) -> World:
        self._store.close()
        shutil.rmtree(self._data, ignore_errors=True)
        self._data.mkdir()
        shutil.copyfile(self._template, self._data / "nas.db")
        return World(folder=self._data, opened=self._store, poison=POISON, **arguments)


@pytest.fixture(autouse=True)
def no_logs() -> Iterator[None]:
    """What goes wrong by design fills a screen for each schedule."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def make() -> Iterator[Worlds]:
    # In memory where there is such a place: every commit waits for the disk.
    folder = Path(tempfile.mkdtemp(prefix="nas-schedules-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    worlds = Worlds(folder)
    yield worlds
    worlds._store.close()
    shutil.rmtree(folder, ignore_errors=True)


def any_schedule(make: Worlds, *, seed: int) -> World:
    """A schedule of this seed, checked."""
    drawn = random.Random(seed)
    dangers = Dangers.draw(drawn)
    plan = {
        "num_trials": drawn.randint(2, 4),
        "num_trained": drawn.choice((1, 1, 2)),
        "parallel": drawn.choice((1, 1, 2, 3)),
        "sampler": drawn.choice(("random", "random", "tpe")),
    }
    # One step after the other, and no user: then what is found does not depend on what goes wrong.
    is_settled = plan["parallel"] == 1 and not dangers.asks
    expected = undisturbed(make, **plan) if is_settled else None
    world = make(seed=seed, dangers=dangers, num_searches=1 if is_settled else drawn.choice((1, 1, 2)), **plan)
    try:
        world.run(num_members=drawn.choice((1, 1, 2, 3)))
        assert expected is None or expected == figures(world.store, world.search_ids[0]), "it found something else than a search that nothing disturbed"
    except BaseException as error:
        error.add_note(f"seed {seed}: {dangers}, so far {dict(world.happened)}")
        raise
    return world


def undisturbed(make: Worlds, **plan: Any) -> list[Any]:
    """What such a search finds when nothing happens."""
    key = str(sorted(plan.items()))
    if key not in make.undisturbed:
        world = make(seed=0, dangers=Dangers(), num_searches=1, **plan)
        world.run(num_members=1)
        make.undisturbed[key] = figures(world.store, world.search_ids[0])
    return make.undisturbed[key]


def run_schedules(make: Worlds, *, seeds: list[int], record_property: RecordProperty) -> Counter[str]:
    happened, began, totals = Counter[str](), time.perf_counter(), Count()
    for seed in seeds:
        world = any_schedule(make, seed=seed)
        happened += world.happened
        totals.add(count(list(world.histories.values())))
    record_property(SCHEDULES, {"drawn": len(seeds)})
    record_property(SECONDS, {"seconds": time.perf_counter() - began})
    record_property(HAPPENED, dict(happened))
    record_property(COUNTS, asdict(totals))
    return happened


def test_any_schedule(make: Worlds, record_property: RecordProperty) -> None:
    happened = run_schedules(make, seeds=SEEDS or list(range(FEW)), record_property=record_property)

    assert SEEDS or min(happened[name] for name in ("killed", "stalled", "store away", "unacknowledged", "request pause")) > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_many_schedules(make: Worlds, part: int, record_property: RecordProperty) -> None:
    size = MANY // NUM_PARTS
    run_schedules(make, seeds=list(range(1000 + part * size, 1000 + (part + 1) * size)), record_property=record_property)


# -- one crash, at every write ---------------------------------------------------------------------------------------------

PLAN = {"num_trials": 3, "num_trained": 2, "parallel": 1, "sampler": "random"}


def crash(make: Worlds, *, when: str, number: int) -> bool:
    """One controller dies before or after one write; another takes over. Whether there was such a write."""
    world = make(seed=0, dangers=Dangers(), num_searches=1, dies_at=(when, number), **PLAN)
    try:
        world.run(num_members=1)
        assert figures(world.store, world.search_ids[0]) == undisturbed(make, **PLAN)
    except BaseException as error:
        error.add_note(f"the controller died {when} write {number}")
        raise
    return world.num_writes >= number


def crash_at(make: Worlds, *, numbers: Iterable[int], record_property: RecordProperty) -> int:
    """Crashes at writes of these numbers, up to the last that there is; how many."""
    began, crashes = time.perf_counter(), 0
    for number in numbers:
        if not all(crash(make, when=when, number=number) for when in ("before", "after")):
            break
        crashes += 2
    record_property(SCHEDULES, {"with one crash at a write": crashes})
    record_property(SECONDS, {"seconds": time.perf_counter() - began})
    record_property(HAPPENED, {"killed": crashes})
    return crashes


def test_a_controller_may_die_at_a_write(make: Worlds, record_property: RecordProperty) -> None:
    assert crash_at(make, numbers=range(5, 1000, 23), record_property=record_property) >= 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_controller_may_die_at_any_write(make: Worlds, record_property: RecordProperty) -> None:
    assert crash_at(make, numbers=range(1, 1000), record_property=record_property) >= 150
