"""Several real controller processes on one database: killed, stopped beyond their lease and woken, while they share searches.

Whatever happens to them, every search ends once, with nothing lost and nothing counted twice. In the short tests their steps
only pretend (`pretending_controller.py`); in the long one they train.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from nas.spec import dump_spec, parse_spec
from nas.store.records import SearchState
from nas.submission import check_submission
from tests.faults.fleet import TRAINING, Fleet, submit_pretended
from tests.faults.summary import RecordProperty
from tests.simulation.several import View
from tests.waiting import BUSY_SECONDS, wait_until

pytestmark = pytest.mark.faults


def kill_now_and_then(fleet: Fleet, *, num_kills: int, seed: int) -> None:
    """One of two controllers after the other, at any moment; another one starts for it."""
    generator, living = random.Random(seed), [fleet.start(), fleet.start()]
    for _ in range(num_kills):
        fleet.wait_for_progress()
        time.sleep(generator.uniform(0.0, 0.5))
        victim = living.pop(generator.randrange(2))
        fleet.kill(victim)
        living.append(fleet.start())


def test_controllers_are_killed_at_any_moment(fleet: Fleet, record_property: RecordProperty) -> None:
    submit_pretended(fleet, num=6)

    kill_now_and_then(fleet, num_kills=3, seed=0)

    fleet.check(record_property)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(1, 3))
def test_controllers_are_killed_many_times(fleet: Fleet, seed: int, record_property: RecordProperty) -> None:
    submit_pretended(fleet, num=20)

    kill_now_and_then(fleet, num_kills=15, seed=seed)

    fleet.check(record_property)


def test_one_controller_is_stopped_and_wakes_and_the_other_is_killed(fleet: Fleet, record_property: RecordProperty) -> None:
    first, second = fleet.start(), fleet.start()
    wait_until(lambda: len(fleet.store.list_controllers()) == 2, what="both live")
    submit_pretended(fleet, num=6)
    wait_until(lambda: len(fleet.searches_of(first)) == len(fleet.searches_of(second)) == 3, what="fair shares")

    fleet.stop_beyond_the_lease(first)
    fleet.kill(second)
    fleet.check(record_property)

    first.terminate()
    assert first.wait(timeout=BUSY_SECONDS) == 0
    assert fleet.store.list_controllers() == []
    assert fleet.store.list_leases() == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("environment", ["postgresql"], indirect=True)
def test_the_same_with_steps_that_train(fleet: Fleet, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]) -> None:
    """What a stopped controller started goes on training meanwhile: its traces are refused."""
    fleet.module = TRAINING
    register_tiny(store=fleet.store, settings=fleet.settings)
    first, second = fleet.start(), fleet.start()
    wait_until(lambda: len(fleet.store.list_controllers()) == 2, what="both live")
    for number in range(6):
        rungs = {"first_tokens": 4096, "factor": 2, "num_trained": 1}
        spec = parse_spec(json.dumps(tiny_spec(seed=number // 2, sampler={"name": "random", "max_trials": 1}, rungs=rungs)))
        submission = check_submission(spec, store=fleet.store)
        fleet.search_ids.append(fleet.store.create_search(spec=dump_spec(spec), inputs=submission.inputs, plan=submission.plan, label="").id)
    fleet.wait_for_share(first)
    fleet.wait_for_share(second)
    wait_until(lambda: fleet.num_rungs() >= 1, what="the first rung", seconds=600.0)

    fleet.stop_beyond_the_lease(first)
    fleet.kill(second)

    wait_until(fleet.have_ended, what="every search ends", seconds=1200.0)
    for search_id in fleet.search_ids:
        assert fleet.store.get_search(search_id).state is SearchState.SUCCEEDED, fleet.store.get_search(search_id).error
        View(store=fleet.store, search_id=search_id, history=[]).check_attempts()
