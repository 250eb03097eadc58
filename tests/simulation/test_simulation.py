"""Whole searches on pretended workers: whatever happens to the workers and to the controller, every promise of `simulator.check` holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.store.records import SearchState, TrialState
from tests.simulation.simulator import Simulation, check, make_simulation

Make = Callable[..., Simulation]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Simulation] = []

    def one(**arguments: Any) -> Simulation:
        made.append(make_simulation(tmp_path / str(len(made)), **arguments))
        return made[-1]

    yield one
    for simulation in made:
        simulation.close()


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_is_lost_and_nothing_done_twice(make: Make, seed: int) -> None:
    simulation = make(num_trials=60, num_workers=12, seed=seed)

    simulation.to_end()

    check(simulation)


def test_a_controller_that_takes_over_goes_on_as_the_one_that_died_would_have(make: Make) -> None:
    simulation, generator = make(num_trials=40, num_workers=8, seed=2), random.Random(2)
    restarts = 0
    while simulation.tick():
        if simulation.conductor.record.state is not SearchState.SEARCHING or generator.random() > 0.06:
            continue
        heir = simulation.rebuilt()
        assert heir.next_action() == simulation.run.next_action()
        assert heir.left_behind() == simulation.run.left_behind()
        if restarts < 5:
            simulation.restart()
            restarts += 1

    assert restarts == 5
    check(simulation)


def test_a_controller_that_was_replaced_writes_nothing_more(make: Make) -> None:
    simulation = make(num_trials=20, num_workers=5, seed=3)
    while not simulation.cluster.history or simulation.cluster.history[-1].step.stage != "rung":
        simulation.tick()
    replaced = simulation.conductor
    simulation.restart()
    with pytest.raises(Exception, match="another controller has it"):
        replaced._books.end_trials()

    simulation.to_end()

    check(simulation)


def test_a_cancelled_search_leaves_nothing_running(make: Make) -> None:
    simulation = make(num_trials=50, num_workers=10, seed=4)
    while len(simulation.store.list_rungs(simulation.search_id)) < 20:
        simulation.tick()
    simulation.store.request_cancel(simulation.search_id)

    search = simulation.to_end()

    assert search.state is SearchState.CANCELLED
    assert all(trial.state.is_terminal for trial in simulation.store.list_trials(search.id))
    assert any(trial.state is TrialState.CANCELLED for trial in simulation.store.list_trials(search.id))
    assert not simulation.cluster.num_running


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_trials_on_a_thousand_workers(make: Make) -> None:
    simulation = make(num_trials=10_000, num_workers=1000, seed=5)

    simulation.to_end()

    check(simulation)
