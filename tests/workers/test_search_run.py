"""Decisions of a whole search, simulated: results are made up from the shape, and nothing is trained."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.cost import count_parameters
from nas.search import study
from nas.search.results import Metric, RungResult, is_repeat
from nas.search.rungs import Standing, project, projected_spread, promotable
from nas.space import forced_anchors
from nas.spec import dump_spec, parse_spec
from nas.store.records import OVER_BUDGET, AttemptRecord, AttemptState, RungRecord, SearchRecord, SearchState, TrialRecord, TrialState, utc_now
from nas.warm_start import Known, Memory
from workers import proposals
from workers.actions import Advance, NewTrial
from workers.search_run import SearchRun

CONFIG = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
NAMED = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
NOW = utc_now()


def make_record(**changes: Any) -> SearchRecord:
    values = {
        "teacher": "t",
        "corpus": {"parts": [{"name": "c"}]},
        "tasks": [{"name": "q"}],
        "budget": {"max_fraction": 0.6},
        "sampler": {"name": "random", "max_trials": 10},
        "rungs": {"num_trained": 2},
        **changes,
    }
    spec = parse_spec(json.dumps(values))
    inputs = {"teacher": {"name": "t", "digest": "d", "path": "", "config": CONFIG}, "corpora": [], "tasks": []}
    empty: dict[str, Any] = {"plan": {}, "board": None, "winner": None, "error": None, "started_at": None, "finished_at": None}
    return SearchRecord(
        id="srch_1", label="", state=SearchState.SEARCHING, spec=dump_spec(spec), inputs=inputs, created_at=NOW, updated_at=NOW, version=1, **empty
    )


def make_result(run: SearchRun, trial: int, rung: int) -> RungResult:
    """KL of a shape at a rung: noise of the shape's own, and of a repeat's own seed, smaller the deeper the rung."""
    of_repeat = [run.seed_of(trial)] if is_repeat(run.trials[trial].origin) and rung else []
    generator = np.random.default_rng([sum(map(ord, run.shape_of(trial).key)), rung, *of_repeat])
    level = generator.uniform(0.5, 1.5) / (1 + rung)
    kl = Metric.from_documents(tuple(float(value) for value in level + 0.05 * generator.standard_normal(8)), higher_is_better=False)
    return RungResult(rung=rung, tokens=run.spec.rungs.tokens(rung), kl=kl, loss=kl, tasks={}, parameters=1, seconds={}, details={})


@dataclass
class Simulation:
    """What the controller does to a SearchRun, with results out of the air."""

    record: SearchRecord
    result_of: Callable[[SearchRun, int, int], RungResult] = make_result
    run: SearchRun = field(init=False)
    rungs: list[RungRecord] = field(default_factory=list)
    attempts: list[AttemptRecord] = field(default_factory=list)
    running: list[Advance] = field(default_factory=list)
    proposals: list[NewTrial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run = SearchRun(self.record, trials=[], rungs=[], attempts=[])

    def rebuilt(self) -> SearchRun:
        """As a controller that takes over makes it."""
        return SearchRun(self.record, trials=list(self.run.trials.values()), rungs=self.rungs, attempts=self.attempts)

    def set_state(self, number: int, **changes: Any) -> None:
        self.run.set_trial(replace(self.run.trials[number], **changes))

    def fill(self, *, parallel: int) -> None:
        """Start what should run, up to `parallel` steps."""
        while len(self.running) < parallel and (action := self.run.next_action()) is not None:
            if isinstance(action, NewTrial):
                self.propose(action)
            else:
                assert self.run.trials[action.trial].state is TrialState.WAITING
                assert self.run.trials[action.trial].rung == (None if action.rung == 0 else action.rung - 1)
                self.start(action)

    def start(self, action: Advance) -> None:
        self.set_state(action.trial, state=TrialState.RUNNING)
        self.run.add_start(action.trial, rung=action.rung)
        key, state = f"att_{len(self.attempts)}", AttemptState.RUNNING  # how it ends decides nothing
        ends: dict[str, Any] = {"reason": None, "started_at": NOW, "finished_at": None}
        self.attempts.append(AttemptRecord(id=key, search_id="srch_1", stage="rung", trial=action.trial, rung=action.rung, state=state, **ends))
        self.running.append(action)

    def propose(self, new: NewTrial) -> None:
        number = len(self.run.trials)
        self.proposals.append(new)
        trial = TrialRecord(
            search_id="srch_1",
            number=number,
            origin=new.origin,
            shape=new.shape.as_dict(),
            choices=new.choices.as_dict() if new.choices else None,
            parameters=count_parameters(self.run.space.architecture, new.shape).total,
            state=TrialState.WAITING,
            rung=None,
            failure=None,
            confirmation=None,
            created_at=NOW,
            updated_at=NOW,
        )
        self.run.set_trial(trial)

    def finish(self, index: int, *, fails: bool = False, is_dear: bool = False) -> None:
        step = self.running.pop(index % len(self.running))
        if fails:
            self.set_state(step.trial, state=TrialState.FAILED)
        else:
            result = self.result_of(self.run, step.trial, step.rung)
            sequence = len(self.rungs) + 1
            self.rungs.append(RungRecord(search_id="srch_1", trial=step.trial, rung=step.rung, sequence=sequence, result=result.as_dict(), finished_at=NOW))
            state = TrialState.COMPLETED if step.rung == self.run.last_rung else TrialState.WAITING
            if is_dear:
                self.set_state(step.trial, state=TrialState.STOPPED, rung=step.rung, failure={"reason": OVER_BUDGET})
            else:
                self.set_state(step.trial, state=state, rung=step.rung)
            self.run.add_result(step.trial, result)
        self.stop_left_behind()

    def stop_left_behind(self) -> None:
        for number in self.run.left_behind():
            self.set_state(number, state=TrialState.STOPPED)

    def rounds(self, *, parallel: int = 1, seed: int = 0, failure_rate: float = 0.0) -> Iterator[None]:
        """Runs to the end; yields whenever a controller might die: after something was started, before it ends."""
        generator = random.Random(seed)
        for _ in range(2000):
            self.fill(parallel=parallel)
            yield
            if not self.running:
                self.stop_left_behind()
                if self.run.is_finished():
                    return
                assert self.run.next_action() is not None, "nothing runs, nothing is next, and the search is not finished"
                continue
            self.finish(generator.randrange(len(self.running)), fails=generator.random() < failure_rate)
        raise AssertionError("the search does not end")

    def to_end(self, **arguments: Any) -> Simulation:
        for _ in self.rounds(**arguments):
            pass
        return self


def reached(simulation: Simulation, rung: int) -> set[int]:
    return {row.trial for row in simulation.rungs if row.rung == rung}


def of_origin(simulation: Simulation, *origins: str) -> set[int]:
    return {trial.number for trial in simulation.run.trials.values() if trial.origin.split(":")[0] in origins}


interleavings = given(
    parallel=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    failure_rate=st.sampled_from([0.0, 0.0, 0.15, 0.5, 1.0]),
    keep=st.sampled_from([0.1, 0.34, 0.5, 1.0]),
    num_trained=st.integers(1, 3),
)
few = settings(max_examples=40, deadline=None)


@interleavings
@few
def test_every_interleaving_ends_with_every_trial_ended_once(parallel: int, seed: int, failure_rate: float, keep: float, num_trained: int) -> None:
    record = make_record(rungs={"num_trained": num_trained, "keep": keep}, controls={"num_random": 2}, shapes=[NAMED], seed=seed)

    simulation = Simulation(record).to_end(parallel=parallel, seed=seed, failure_rate=failure_rate)

    trials = simulation.run.trials.values()
    assert all(trial.state.is_terminal for trial in trials)
    assert sum(trial.origin != "control" for trial in trials) == 10
    pairs = [(row.trial, row.rung) for row in simulation.rungs]
    assert len(pairs) == len(set(pairs)), "a finished rung ran again"


@interleavings
@few
def test_shapes_are_unique_and_within_the_budget(parallel: int, seed: int, failure_rate: float, keep: float, num_trained: int) -> None:
    simulation = Simulation(make_record(controls={"num_random": 2}, seed=seed)).to_end(parallel=parallel, seed=seed, failure_rate=failure_rate)

    shapes = [proposal.shape for proposal in simulation.proposals]
    assert len({shape.key for shape in shapes}) == len(shapes)
    assert all(simulation.run.space.explain(shape) == () for shape in shapes)
    assert simulation.run.space.architecture.shape not in shapes


@interleavings
@few
def test_named_shapes_and_controls_reach_the_last_rung(parallel: int, seed: int, failure_rate: float, keep: float, num_trained: int) -> None:
    record = make_record(rungs={"num_trained": num_trained, "keep": keep}, controls={"num_random": 2}, shapes=[NAMED], seed=seed)

    simulation = Simulation(record).to_end(parallel=parallel, seed=seed, failure_rate=failure_rate)

    run = simulation.run
    uniform = {number for number in run.trials if run.shape_of(number) == run.space.anchors()["uniform"]}
    forced = uniform | of_origin(simulation, "user", "control")
    failed = {trial.number for trial in simulation.run.trials.values() if trial.state is TrialState.FAILED}
    assert forced - failed <= reached(simulation, num_trained)
    assert len(of_origin(simulation, "control")) == 2


def test_named_shapes_are_evaluated_even_where_they_are_more_than_max_trials() -> None:
    record = make_record(sampler={"name": "random", "max_trials": 1}, shapes=[NAMED])

    simulation = Simulation(record).to_end()

    assert [proposal.origin for proposal in simulation.proposals] == [*(f"anchor:{name}" for name in simulation.run.space.anchors()), "user"]


@interleavings
@few
def test_controls_come_after_everything_else_has_ended(parallel: int, seed: int, failure_rate: float, keep: float, num_trained: int) -> None:
    simulation = Simulation(make_record(controls={"num_random": 2}, seed=seed))

    for _ in simulation.rounds(parallel=parallel, seed=seed, failure_rate=failure_rate):
        trials = simulation.run.trials.values()
        if any(trial.origin == "control" for trial in trials):
            assert all(trial.state.is_terminal for trial in trials if trial.origin != "control")


@interleavings
@few
def test_no_more_go_up_than_the_share_and_its_ties(parallel: int, seed: int, failure_rate: float, keep: float, num_trained: int) -> None:
    """An asynchronous promotion is made on fewer results than there are in the end, so each may add to the final share."""
    record = make_record(rungs={"num_trained": num_trained, "keep": keep, "max_tie_growth": 1.0, "stop_losers": False}, controls={"anchors": False}, seed=seed)

    simulation = Simulation(record).to_end(parallel=1, seed=seed)

    for rung in range(1, num_trained):
        arrived = [row.trial for row in simulation.rungs if row.rung == rung]
        up = reached(simulation, rung + 1)
        share = max(1, int(np.ceil(keep * len(arrived) - 1e-9)))
        assert share <= len(up)
        final = set(sorted(arrived, key=lambda number: (simulation.run.evidence.projected(number, rung=rung).value, number))[:share])
        assert final <= up, "one of the best stayed behind"
        for extra in up - final:
            # Whoever is up and not among the best was so among those that had arrived before it left.
            left = next(row.sequence for row in simulation.rungs if (row.trial, row.rung) == (extra, rung + 1))
            there = [row.trial for row in simulation.rungs if row.rung == rung and row.sequence < left]
            better = sum(
                simulation.run.evidence.projected(other, rung=rung).value < simulation.run.evidence.projected(extra, rung=rung).value for other in there
            )
            assert better < max(1, keep * len(there))


def test_without_training_a_share_of_every_depth_goes_on() -> None:
    record = make_record(controls={"anchors": False}, sampler={"name": "random", "max_trials": 16}, rungs={"num_trained": 1, "keep_untrained": 0.5})

    simulation = Simulation(record).to_end()

    depths = {number: simulation.run.shape_of(number).num_hidden_layers for number in simulation.run.trials}
    for depth in set(depths.values()):
        members = {number for number, its in depths.items() if its == depth}
        assert members & reached(simulation, 1)


def computed_again(run: SearchRun) -> list[tuple[bool, set[int]]]:
    """Of each rung whether more may reach it and who goes on from it, by their definition: from all trials and results, without an index."""
    ladder: list[tuple[bool, set[int]]] = []
    complete = run.proposals.are_all()
    coming = set(run.trials)
    for rung in range(run.last_rung):
        waited = [run.trials[number] for number in coming if number not in forced_of(run)]
        waited = [trial for trial in waited if not trial.is_out and trial.state not in (TrialState.STOPPED, TrialState.CANCELLED)]
        complete = complete and all(trial.rung is not None and trial.rung >= rung for trial in waited)
        results = {number: found for number, found in run.results.items() if rung in found and not run.trials[number].is_out}
        standings = [run.evidence.standing(number, rung=rung) for number in results]
        spread = run.evidence.seed_spread(rung).value
        best = promotable(rung, standings, spec=run.spec.rungs, complete=complete, seed_spread=spread)
        coming = {*best, *(number for number in results if run.reached.get(number, 0) > rung)}
        ladder.append((complete, coming))
    return ladder


def forced_of(run: SearchRun) -> set[int]:
    anchors = run.space.anchors() if run.spec.controls.anchors else {}
    keys = {shape.key for shape in forced_anchors(run.spec, anchors=anchors).values()}
    always = ("user", "control", "repeat")
    return {
        number
        for number, trial in run.trials.items()
        if trial.origin.split(":")[0] in always or ("anchor" in trial.origin and run.shape_of(number).key in keys)
    }


@interleavings
@few
def test_who_goes_on_is_what_all_results_say_however_they_came(parallel: int, seed: int, failure_rate: float, keep: float, num_trained: int) -> None:
    simulation = Simulation(make_record(rungs={"num_trained": num_trained, "keep": keep, "stop_losers": False}, controls={"num_random": 1, "num_repeats": 2}))

    for _ in simulation.rounds(parallel=parallel, seed=seed, failure_rate=failure_rate):
        run = simulation.run
        steps = run.ladder.steps(all_proposed=run.proposals.are_all())
        assert [(step.complete, set(step.promoted)) for step in steps] == computed_again(run)


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "enumerate"])
@pytest.mark.parametrize("failure_rate", [0.0, 0.2])
def test_a_controller_that_takes_over_decides_alike(sampler: str, failure_rate: float) -> None:
    record = make_record(sampler={"name": sampler, "max_trials": 8, "num_startup_trials": 3}, controls={"num_random": 1, "num_repeats": 2})
    simulation = Simulation(record)

    for _ in simulation.rounds(parallel=2, seed=1, failure_rate=failure_rate):
        rebuilt = simulation.rebuilt()
        assert rebuilt.next_action() == simulation.run.next_action()
        assert rebuilt.left_behind() == simulation.run.left_behind()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_with_one_worker_a_lost_step_is_the_next_one(sampler: str) -> None:
    simulation = Simulation(make_record(sampler={"name": sampler, "max_trials": 8, "num_startup_trials": 3}, controls={"num_random": 1}))

    for _ in simulation.rounds(parallel=1):
        if not simulation.running:
            continue
        (lost,) = simulation.running
        simulation.set_state(lost.trial, state=TrialState.WAITING)
        rebuilt = simulation.rebuilt()
        simulation.set_state(lost.trial, state=TrialState.RUNNING)
        assert lost.trial not in rebuilt.left_behind()
        assert rebuilt.next_action() == lost


@given(seed=st.integers(0, 2**16))
@few
def test_a_lost_step_is_never_left_behind_nor_run_twice(seed: int) -> None:
    """With several workers others may have overtaken it; it is resumed or stopped, and the search ends."""
    simulation = Simulation(make_record(seed=seed))
    generator = random.Random(seed)

    for _ in simulation.rounds(parallel=3, seed=seed):
        if simulation.running and generator.random() < 0.2:
            for step in simulation.running:
                simulation.set_state(step.trial, state=TrialState.WAITING)
            simulation.running.clear()
            simulation.run = simulation.rebuilt()

    pairs = [(row.trial, row.rung) for row in simulation.rungs]
    assert len(pairs) == len(set(pairs))
    assert all(trial.state.is_terminal for trial in simulation.run.trials.values())


def test_a_trial_that_fails_leaves_its_place_to_the_next_best() -> None:
    """Three fail at the last rung, as many as go up at first: the search goes on to those that waited, and does not end with nothing."""
    sampler, rungs = {"name": "random", "max_trials": 10}, {"num_trained": 2, "keep": 0.3, "max_tie_growth": 1.0}
    simulation = Simulation(make_record(controls={"anchors": False}, sampler=sampler, rungs=rungs, seed=1))
    failures = 0

    for _ in range(200):
        simulation.fill(parallel=1)
        if not simulation.running:
            break
        fails = simulation.running[0].rung == 2 and failures < 3
        failures += fails
        simulation.finish(0, fails=fails)

    assert failures == 3
    assert simulation.run.is_finished()
    assert any(trial.state is TrialState.COMPLETED for trial in simulation.run.trials.values())


def trained_when_last_was_proposed(sampler: str) -> int:
    """Trials that have been trained on before the last shape is begun with, one worker."""
    simulation = Simulation(make_record(sampler={"name": sampler, "max_trials": 12}, controls={"anchors": False, "num_random": 0}))
    trained = []
    for _ in range(400):
        num_proposals = len(simulation.proposals)
        simulation.fill(parallel=1)
        if len(simulation.proposals) > num_proposals:
            trained.append(sum(row.rung > 0 for row in simulation.rungs))
        if not simulation.running:
            return trained[-1]
        simulation.finish(0)
    raise AssertionError("the search does not end")


def test_an_enumerated_space_is_seen_untrained_before_anything_is_trained() -> None:
    assert trained_when_last_was_proposed("enumerate") == 0
    assert trained_when_last_was_proposed("random") > 0


def up_to_date(simulation: Simulation, rung: int) -> set[int]:
    """Whom a rung promotes with all results at hand, of those that did not fail."""
    run, spec = simulation.run, simulation.run.spec.rungs
    standings = [
        Standing(
            trial=number,
            depth=run.shape_of(number).num_hidden_layers,
            kl=project(results[rung].kl, below=results[rung - 1].kl, rung=rung, spec=spec) if rung else results[rung].kl,
            forced=run.evidence.is_forced(number),
        )
        for number, results in run.results.items()
        if rung in results and run.trials[number].state is not TrialState.FAILED
    ]
    return set(promotable(rung, standings, spec=spec, complete=True, seed_spread=projected_spread(spec.seed_spread, rung=rung, spec=spec)))


@given(parallel=st.integers(1, 6), seed=st.integers(0, 2**16), failure_rate=st.sampled_from([0.0, 0.1, 0.3]), keep=st.sampled_from([0.1, 0.34, 0.5]))
@settings(max_examples=25, deadline=None)
def test_in_the_end_every_place_is_taken_by_one_that_did_not_fail(parallel: int, seed: int, failure_rate: float, keep: float) -> None:
    """Whatever the order of arrival and whenever trials fail."""
    rungs = {"num_trained": 3, "keep": keep, "stop_losers": False}
    record = make_record(rungs=rungs, sampler={"name": "random", "max_trials": 12}, controls={"anchors": False}, seed=seed)

    simulation = Simulation(record).to_end(parallel=parallel, seed=seed, failure_rate=failure_rate)

    for rung in range(3):
        assert up_to_date(simulation, rung) <= reached(simulation, rung + 1)


@given(seed=st.integers(0, 2**16), keep=st.sampled_from([0.1, 0.34, 0.5]))
@settings(max_examples=20, deadline=None)
def test_one_worker_promotes_from_trained_rungs_only_whom_the_whole_rung_would(seed: int, keep: float) -> None:
    record = make_record(rungs={"num_trained": 3, "keep": keep, "stop_losers": False}, sampler={"name": "random", "max_trials": 12}, seed=seed)

    simulation = Simulation(record).to_end(parallel=1)

    for rung in (1, 2):
        assert up_to_date(simulation, rung) == reached(simulation, rung + 1)


@pytest.mark.parametrize("stop_losers", [True, False])
def test_a_certain_loser_is_not_trained_to_the_last_rung(stop_losers: bool) -> None:
    """Every KL halves at the last rung: with three results there, who is more than 5 % above the best cannot catch up."""

    def halving(run: SearchRun, trial: int, rung: int) -> RungResult:
        level = (1 + trial / 10) * 0.5**rung
        return replace(make_result(run, trial, rung), kl=Metric.from_documents((level, level), higher_is_better=False))

    rungs = {"num_trained": 2, "keep": 1.0, "keep_untrained": 1.0, "stop_losers": stop_losers}
    record = make_record(rungs=rungs, sampler={"name": "random", "max_trials": 8}, controls={"anchors": False})

    simulation = Simulation(record, result_of=halving).to_end()

    assert len(reached(simulation, 2)) == (3 if stop_losers else 8)
    assert all(trial.state.is_terminal for trial in simulation.run.trials.values())


def test_a_worker_that_would_wait_for_a_straggler_promotes_instead() -> None:
    record = make_record(rungs={"num_trained": 2, "keep": 0.34}, sampler={"name": "random", "max_trials": 8}, controls={"anchors": False})
    simulation = Simulation(record)
    straggler: Advance | None = None

    for _ in range(200):  # the straggler never ends; the other worker goes on while there is something to do
        simulation.fill(parallel=2)
        straggler = straggler or next((step for step in simulation.running if step.rung == 1), None)
        others = [index for index, step in enumerate(simulation.running) if step != straggler]
        if not others:
            break
        simulation.finish(others[0])

    assert straggler in simulation.running
    assert reached(simulation, 2), "nothing was promoted beside the straggler"


@given(seed=st.integers(0, 2**16))
@few
def test_a_promotion_holds_when_its_step_is_tried_again(seed: int) -> None:
    """With several workers better ones may have arrived meanwhile: whoever had started a rung finishes it."""
    sampler, rungs = {"name": "random", "max_trials": 12}, {"num_trained": 2, "keep": 0.34, "max_tie_growth": 1.0}
    simulation = Simulation(make_record(controls={"anchors": False}, sampler=sampler, rungs=rungs, seed=seed))
    generator = random.Random(seed)
    for _ in simulation.rounds(parallel=4, seed=seed):
        for step in [step for step in simulation.running if generator.random() < 0.2]:
            simulation.running.remove(step)
            simulation.set_state(step.trial, state=TrialState.WAITING)
            simulation.run = simulation.rebuilt()
            simulation.stop_left_behind()

    started = {(attempt.trial, attempt.rung) for attempt in simulation.attempts}
    assert started == {(row.trial, row.rung) for row in simulation.rungs}


def watch_proposals(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def propose(space: Any, **arguments: Any) -> Any:
        calls.append(arguments)
        return study.propose(space, **arguments)

    monkeypatch.setattr(proposals, "propose", propose)
    return calls


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_the_sampler_is_asked_once_there_are_enough_results(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ask = study._ask_unseen
    monkeypatch.setattr(study, "_ask_unseen", lambda *arguments, **named: (asked.append(len(named["observations"])), ask(*arguments, **named))[1])

    Simulation(make_record(sampler={"name": sampler, "max_trials": 12, "num_startup_trials": 4}, controls={"anchors": False})).to_end()

    assert len(asked) >= 4
    assert min(asked) >= 4


@interleavings
@few
def test_the_sampler_never_sees_a_mixture_of_rungs_nor_a_control(parallel: int, seed: int, failure_rate: float, keep: float, num_trained: int) -> None:
    record = make_record(rungs={"num_trained": num_trained, "keep": keep}, sampler={"name": "random", "max_trials": 10, "num_startup_trials": 2})
    simulation = Simulation(record)

    for _ in simulation.rounds(parallel=parallel, seed=seed, failure_rate=failure_rate):
        observations = simulation.run.proposals.observations()
        by_rung = [
            {
                round(-float(np.log(simulation.run.evidence.projected(number, rung=rung).value)), 9)
                for number, results in simulation.run.results.items()
                if rung in results
            }
            for rung in range(1, num_trained + 1)
        ]
        told = {round(observation.value, 9) for observation in observations}
        assert any(told <= values for values in by_rung)


def test_what_mattered_is_asked_of_a_rung_with_enough_results() -> None:
    """The last rung has enough to teach the sampler, and too few to say which choices mattered."""
    rungs = {"keep": 0.2, "num_trained": 2}
    simulation = Simulation(make_record(rungs=rungs, sampler={"name": "random", "max_trials": 24, "num_startup_trials": 1}, controls={"anchors": False}))
    simulation.to_end()

    assert 1 <= len(simulation.run.proposals.observations()) < study.MIN_FOR_IMPORTANCE
    assert study.MIN_FOR_IMPORTANCE <= len(simulation.run.observations(most=100)) <= 24


def test_a_failed_shape_is_told_as_the_worst_seen() -> None:
    simulation = Simulation(
        make_record(sampler={"name": "random", "max_trials": 6, "num_startup_trials": 1}, controls={"anchors": False}, rungs={"num_trained": 1})
    )
    for index, _ in enumerate(simulation.rounds()):
        if index == 7:
            break
    simulation.fill(parallel=1)
    simulation.finish(0, fails=True)

    values = [observation.value for observation in simulation.run.proposals.observations()]
    (failed,) = [trial.number for trial in simulation.run.trials.values() if trial.state is TrialState.FAILED]
    choices = simulation.run.space.choices_of(simulation.run.shape_of(failed))
    assert [observation.value for observation in simulation.run.proposals.observations() if observation.choices == choices] == [min(values)]


def test_the_minitron_preset_trains_every_legal_shape_to_the_same_tokens() -> None:
    space = {"num_hidden_layers": {"min": 2, "max": 4}, "hidden_size": {"multiple": 16, "min": 32}, "intermediate_size": {"multiple": 32}}
    record = make_record(preset="minitron", space=space, rungs={"first_tokens": 1000}, budget={"max_fraction": 0.6}, controls={"anchors": False})
    simulation = Simulation(record).to_end()

    legal = {shape.key for shape in simulation.run.space.shapes()}
    assert 1 < len(legal) < 500
    assert {proposal.shape.key for proposal in simulation.proposals} == legal
    assert reached(simulation, 1) == set(simulation.run.trials)
    assert all(trial.state is TrialState.COMPLETED for trial in simulation.run.trials.values())
    assert {row.result["tokens"] for row in simulation.rungs if row.rung == 1} == {1000}


TINY = {
    "num_hidden_layers": {"min": 3, "max": 4},
    "hidden_size": {"min": 48, "max": 48},
    "num_key_value_heads": {"min": 2},
    "query_heads_per_kv": {"min": 2},
    "intermediate_size": {"multiple": 48},
}
"""A space of few shapes."""


@pytest.mark.parametrize("sampler", ["auto", "gp", "tpe", "nsga2", "random", "enumerate"])
def test_an_exhausted_space_ends_the_search_and_says_so(sampler: str) -> None:
    record = make_record(space=TINY, sampler={"name": sampler, "max_trials": 50, "num_startup_trials": 2}, controls={"anchors": False, "num_random": 2})
    simulation = Simulation(record)
    assert simulation.run.end_reason() is None

    simulation.to_end()

    shapes = {shape.key for shape in simulation.run.space.shapes()}
    assert {simulation.run.shape_of(number).key for number in simulation.run.trials} == shapes
    assert of_origin(simulation, "control") == set()
    assert simulation.run.end_reason() == simulation.rebuilt().end_reason() == "space_exhausted"


def test_controls_are_drawn_from_what_a_nearly_exhausted_space_has_left() -> None:
    count = Simulation(make_record(space=TINY, controls={"anchors": False})).run.space.count()
    record = make_record(space=TINY, sampler={"max_trials": count - 1}, controls={"anchors": False, "num_random": 2})

    simulation = Simulation(record).to_end()

    assert len(of_origin(simulation, "control")) == 1
    assert simulation.run.end_reason() == "space_exhausted"


def test_a_search_that_spent_its_trials_says_so() -> None:
    assert Simulation(make_record(controls={"num_random": 1})).to_end().run.end_reason() == "max_trials"


@given(st.integers(0, 200))
@settings(max_examples=10, deadline=None)
def test_with_several_objectives_the_cheapest_and_the_best_both_go_up(seed: int) -> None:
    record = make_record(
        objectives=["parameters"], seed=seed, controls={"anchors": False}, sampler={"name": "random", "max_trials": 12}, rungs={"num_trained": 2, "keep": 0.34}
    )

    simulation = Simulation(record).to_end()

    at_first = {number: simulation.run.evidence.projected(number, rung=1).value for number, results in simulation.run.results.items() if 1 in results}
    parameters = {number: simulation.run.trials[number].parameters for number in at_first}
    up = [number for number in at_first if 2 in simulation.run.results[number]]
    assert min(at_first, key=lambda number: (at_first[number], number)) in up
    assert min(parameters.values()) in [parameters[number] for number in up]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_with_several_objectives_every_sampler_is_told_the_costs(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    propose = proposals.propose
    monkeypatch.setattr(proposals, "propose", lambda *args, **kwargs: told.append(kwargs["observations"]) or propose(*args, **kwargs))
    record = make_record(objectives=["parameters"], sampler={"name": sampler, "max_trials": 12, "num_startup_trials": 4})

    simulation = Simulation(record).to_end()

    last = {observation.costs for observation in told[-1]}
    assert last <= {(float(trial.parameters),) for trial in simulation.run.trials.values()}
    assert len(last) > 1


def test_a_shape_over_a_measured_ceiling_takes_no_place_and_is_learnt_as_the_worst() -> None:
    """The same search with its dear shapes as failed ones: who goes on, and what the sampler is asked for, are the same."""
    dear, failed = (Simulation(make_record(sampler={"name": "tpe", "max_trials": 12, "num_startup_trials": 4})) for _ in range(2))
    for simulation, how in ((dear, {"is_dear": True}), (failed, {"fails": True})):
        for _ in range(500):
            simulation.fill(parallel=1)
            if not simulation.running:
                break
            step = simulation.running[0]
            is_hit = step.rung == 0 and simulation.run.shape_of(step.trial).num_hidden_layers == 4
            simulation.finish(0, **(how if is_hit else {}))

    out = [number for number, trial in dear.run.trials.items() if trial.is_out]
    assert out
    assert all(dear.run.reached[number] == 0 for number in out)
    assert [new.shape for new in dear.proposals] == [new.shape for new in failed.proposals]
    assert dear.run.reached == failed.run.reached
    assert dear.run.proposals.observations() == failed.run.proposals.observations() == dear.rebuilt().proposals.observations()
    assert dear.run.is_finished()


def remembered(simulation: Simulation) -> Memory:
    """What a later search recalls of this one, under another seed: nothing of it is an answer."""
    known = defaultdict(list)
    for row in simulation.rungs:
        result, shape = RungResult.from_dict(row.result), simulation.run.shape_of(row.trial)
        known[result.tokens].append(Known(search="srch_0", trial=row.trial, shape=shape, result=result, is_answer=False))
    return Memory(by_tokens=known)


def first_told(record: SearchRecord, *, memory: Memory | None, monkeypatch: pytest.MonkeyPatch) -> list[study.Observation]:
    """What the sampler is told before anything of the search itself has finished."""
    told: list[list[study.Observation]] = []
    propose = proposals.propose
    monkeypatch.setattr(proposals, "propose", lambda *args, **kwargs: told.append(kwargs["observations"]) or propose(*args, **kwargs))
    assert SearchRun(record, trials=[], rungs=[], attempts=[], memory=memory).next_action() is not None
    monkeypatch.undo()
    return told[0]


def test_earlier_searches_teach_the_sampler_before_anything_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = Simulation(make_record(sampler={"name": "random", "max_trials": 12}, seed=3)).to_end()
    record = make_record(sampler={"name": "tpe", "max_trials": 8, "num_startup_trials": 4}, controls={"anchors": False})

    told = first_told(record, memory=remembered(earlier), monkeypatch=monkeypatch)

    assert first_told(record, memory=None, monkeypatch=monkeypatch) == []
    legal = {shape.key for shape in earlier.run.space.shapes()}
    at_last = [number for number, results in earlier.run.results.items() if 2 in results and earlier.run.shape_of(number).key in legal]
    at_first = [number for number, results in earlier.run.results.items() if 1 in results and earlier.run.shape_of(number).key in legal]
    expected, rung = (at_last, 2) if len(at_last) >= 4 else (at_first, 1)
    values = sorted(-math.log(earlier.run.evidence.projected(number, rung=rung).value) for number in expected)
    assert sorted(observation.value for observation in told) == pytest.approx(values)


def test_a_rung_of_other_tokens_teaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = Simulation(make_record(sampler={"name": "random", "max_trials": 12}, seed=3)).to_end()
    record = make_record(sampler={"name": "tpe", "max_trials": 8, "num_startup_trials": 4}, controls={"anchors": False}, rungs={"first_tokens": 3_000_000})

    assert first_told(record, memory=remembered(earlier), monkeypatch=monkeypatch) == []
