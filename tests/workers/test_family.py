"""Several budgets in one search, simulated as in test_search_run.py."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.shape import Shape
from nas.store.records import SearchRecord, TrialState
from tests.workers.test_search_run import CONFIG, NAMED, Simulation, make_record
from workers.actions import NewTrial
from workers.family import Family

SMALL = {"max_fraction": 0.3}


@dataclass
class FamilySimulation(Simulation):
    """What the controller does to a search of several budgets."""

    run: Family = field(init=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.run = Family(self.record, trials=[], rungs=[], attempts=[])

    def rebuilt(self) -> Family:  # type: ignore[override]
        return Family(self.record, trials=list(self.run.trials.values()), rungs=self.rungs, attempts=self.attempts)

    def propose(self, new: NewTrial) -> None:
        self.proposals.append(new)
        empty: dict[str, Any] = {"rung": None, "failure": None, "confirmation": None}
        template = Simulation(self.record)
        template.propose(new)
        self.run.set_trial(replace(template.run.trials[0], number=len(self.run.trials), budget=new.budget, **empty))


def shapes_of(simulation: Simulation, *, budget: int) -> list[Shape]:
    return [new.shape for new in simulation.proposals if new.budget == budget]


@settings(max_examples=15, deadline=None)
@given(parallel=st.integers(1, 4), seed=st.integers(0, 2**16), failure_rate=st.sampled_from([0.0, 0.2]))
def test_every_budget_gets_its_own_trials_to_the_last_rung_and_no_shape_comes_twice(parallel: int, seed: int, failure_rate: float) -> None:
    record = make_record(more_budgets=[SMALL], controls={"num_random": 1}, seed=seed)

    simulation = FamilySimulation(record).to_end(parallel=parallel, seed=seed, failure_rate=failure_rate)

    trials = list(simulation.run.trials.values())
    assert all(trial.state.is_terminal for trial in trials)
    assert len({Shape.from_dict(trial.shape).key for trial in trials}) == len(trials)
    for budget, run in enumerate(simulation.run.runs):
        own = [trial for trial in trials if trial.budget == budget]
        assert len(own) == 10 + 1
        assert all(run.space.explain(Shape.from_dict(trial.shape)) == () for trial in own)
        assert failure_rate or any(trial.state is TrialState.COMPLETED for trial in own)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_budget_is_searched_as_if_it_were_alone(sampler: str) -> None:
    """Same proposals and same promotions: budgets share workers, and nothing else, as long as they propose no shape in common."""
    settings_of = {"sampler": {"name": sampler, "max_trials": 10, "num_startup_trials": 4}}
    both = FamilySimulation(make_record(more_budgets=[SMALL], **settings_of)).to_end()
    alone = [Simulation(make_record(**settings_of)).to_end(), Simulation(make_record(budget=SMALL, **settings_of)).to_end()]

    for budget, single in enumerate(alone):
        assert shapes_of(both, budget=budget) == shapes_of(single, budget=0)
        outcome = sorted((both.run.shape_of(number).key, rung) for number, rung in both.run.runs[budget].reached.items())
        assert outcome == sorted((single.run.shape_of(number).key, rung) for number, rung in single.run.reached.items())


def test_budgets_take_turns() -> None:
    simulation = FamilySimulation(make_record(more_budgets=[SMALL])).to_end()

    assert [new.budget for new in simulation.proposals[:6]] == [0, 1, 0, 1, 0, 1]


def test_a_controller_that_takes_over_decides_the_same() -> None:
    simulation = FamilySimulation(make_record(more_budgets=[SMALL], controls={"num_random": 1}))

    for _ in simulation.rounds(parallel=2):
        assert simulation.rebuilt().next_action() == simulation.run.next_action()


def test_a_named_shape_belongs_to_the_first_budget_that_it_fits() -> None:
    large, small = NAMED | {"num_hidden_layers": 4, "intermediate_size": 96}, NAMED | {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 16}
    record: SearchRecord = make_record(budget=SMALL, more_budgets=[{"max_fraction": 0.9}], shapes=[large, small])

    simulation = FamilySimulation(record).to_end()

    assert {(new.budget, new.shape.intermediate_size) for new in simulation.proposals if new.origin == "user"} == {(0, 16), (1, 96)}


def test_the_search_is_exhausted_when_all_its_budgets_are() -> None:
    single = {name: {"min": CONFIG[name], "max": CONFIG[name]} for name in ("num_hidden_layers", "hidden_size", "num_key_value_heads")}
    space = {**single, "query_heads_per_kv": {"min": 2, "max": 2}, "intermediate_size": {"min": 16, "multiple": 16}, "min_mlp_fill": 0.01}
    record = make_record(
        budget={"max_fraction": 0.5}, more_budgets=[{"max_fraction": 0.9}], space=space, controls={"anchors": False}, sampler={"max_trials": 3}
    )

    simulation = FamilySimulation(record).to_end()

    reasons = [run.end_reason() for run in simulation.run.runs]
    assert reasons == ["space_exhausted", "max_trials"]
    assert simulation.run.end_reason() == "max_trials"
