"""A whole search under the real controller, store, study and rungs, on workers that only pretend, and what must be true of it.

Everything that decides is the product's own; what is made up is the time, the workers and what they measure (`cluster.py`).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from nas.search.results import is_repeat, is_searched
from nas.settings import Settings
from nas.spec import dump_spec, parse_spec
from nas.store.records import AttemptState, EventRecord, SearchRecord, SearchState, TrialRecord, TrialState
from nas.store.store import Store
from tests.simulation.cluster import Clock, FakeCluster, Run
from workers.conductor import Conductor
from workers.controller import Controller
from workers.family import Family

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
INPUTS = {
    "teacher": {"name": "t", "digest": "d", "path": "", "config": CONFIG},
    "corpora": [{"name": "c", "digest": "d"}],
    "tasks": [{"name": name, "digest": "d", "card": {"default_metric": "acc"}} for name in ("one", "two")],
}
LEASE_SECONDS = 1e6
"""No lease expires here; a restart releases them, as their time running out would."""


def make_spec(*, num_trials: int, num_workers: int, **changes: Any) -> dict[str, Any]:
    """A search of so many trials on so many workers; changes replace whole sections."""
    return {
        "teacher": "t",
        "corpus": {"parts": [{"name": "c"}]},
        "tasks": [{"name": "one"}, {"name": "two"}],
        "budget": {"max_fraction": 0.5},
        "space": {"hidden_size": {"multiple": 64}, "intermediate_size": {"multiple": 64}},
        "sampler": {"name": "tpe", "max_trials": num_trials},
        "controls": {"num_random": 2, "num_repeats": 2},
        "limits": {"max_failed_trials": 100_000, "max_rung_seconds": 3600.0},
        "resources": {"max_parallel_trials": num_workers},
        **changes,
    }


@dataclass(kw_only=True)
class Simulation:
    """One search on a store of its own, and the controllers that came and went."""

    folder: Path
    spec: dict[str, Any]
    cluster: FakeCluster
    store: Store = field(init=False)
    settings: Settings = field(init=False)
    search_id: str = field(init=False)
    controller: Controller = field(init=False)
    started_at: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        environment = {"NAS_DATA": str(self.folder)}
        self.settings = dataclasses.replace(Settings.from_environment(environment), lease_seconds=LEASE_SECONDS)
        self.store = Store.open(self.settings.database_url, migrate=True)
        spec = parse_spec(json.dumps(self.spec))
        self.search_id = self.store.create_search(spec=dump_spec(spec), inputs=INPUTS, plan={}, label="").id
        self._take_over()

    def _take_over(self) -> None:
        self.controller = Controller(store=self.store, executor=self.cluster, settings=self.settings, clock=self.cluster.clock)

    @property
    def conductor(self) -> Conductor:
        return self.controller._conductors[self.search_id]

    @property
    def run(self) -> Family:
        """What the present controller has in memory."""
        return self.conductor._run

    def rebuilt(self) -> Family:
        """What a controller that takes over now would have."""
        record, store = self.store.get_search(self.search_id), self.store
        return Family(record, trials=store.list_trials(record.id), rungs=store.list_rungs(record.id), attempts=store.list_attempts(record.id))

    def tick(self, *, timeout_seconds: float = 10.0) -> bool:
        """One round of the controller; whether the search goes on. A real controller's rounds are shorter, and most of them empty."""
        self.controller.tick(timeout_seconds=timeout_seconds)
        return self.search_id in self.controller._conductors and not self.conductor.record.state.is_terminal

    def to_end(self) -> SearchRecord:
        while self.tick():
            pass
        return self.store.get_search(self.search_id)

    def restart(self) -> None:
        """The controller dies; another one takes over."""
        self.cluster.lose_driver()
        self.store.leave(self.controller._membership.owner)
        self._take_over()

    def close(self) -> None:
        self.store.close()


def make_simulation(folder: Path, *, num_trials: int, num_workers: int, seed: int, clock: Clock | None = None, **changes: Any) -> Simulation:
    """A simulation that is ready to tick."""
    spec = make_spec(num_trials=num_trials, num_workers=num_workers, seed=seed, **changes)
    return Simulation(folder=folder, spec=spec, cluster=FakeCluster(num_workers=num_workers, seed=seed, clock=clock or Clock()))


# -- what must be true of a search that has ended ------------------------------------------------------------------------------


def check(simulation: Simulation) -> None:
    """Every promise at once. Reads the store and what the cluster saw, never the controller's memory."""
    search, trials = simulation.store.get_search(simulation.search_id), simulation.store.list_trials(simulation.search_id)
    events = all_events(simulation)
    assert search.state is SearchState.SUCCEEDED, search.error
    check_replay(simulation, events=events)
    check_trials(simulation, trials=trials, events=events)
    check_attempts(simulation)
    check_results(simulation)
    check_promotions(trials, events=events)
    check_winner(simulation, search, trials=trials)


def all_events(simulation: Simulation) -> list[EventRecord]:
    events: list[EventRecord] = []
    while page := simulation.store.list_events(simulation.search_id, after=len(events), limit=10_000):
        events += page
    assert [event.sequence for event in events] == list(range(1, len(events) + 1)), "events have gaps"
    return events


def check_replay(simulation: Simulation, *, events: list[EventRecord]) -> None:
    """What the events tell is where the search and its trials stand."""
    state, trials = "queued", {}
    for event in events:
        kind, _, what = event.type.partition(".")
        if event.type == "search.resumed":
            state = "queued"
        elif kind == "search" and what in tuple(SearchState):
            state = what
        elif event.type in ("trial.proposed", "trial.retried"):
            trials[event.data["trial"]] = "waiting"
        elif event.type == "trial.started":
            trials[event.data["trial"]] = "running"
        elif event.type.startswith("attempt.") and event.data["stage"] == "rung" and what != "waiting":
            trials[event.data["trial"]] = "waiting"
        elif event.type == "trial.rung_finished":
            trials[event.data["trial"]] = event.data["state"]
        elif event.type in ("trial.stopped", "trial.failed", "trial.cancelled"):
            trials[event.data["trial"]] = what
    assert state == simulation.store.get_search(simulation.search_id).state
    assert trials == {trial.number: trial.state for trial in simulation.store.list_trials(simulation.search_id)}


def check_trials(simulation: Simulation, *, trials: list[TrialRecord], events: list[EventRecord]) -> None:
    """As many as were asked for, each a shape of its own within the budget but for repeats, and each ended exactly once."""
    run, searched = simulation.rebuilt(), [trial for trial in trials if is_searched(trial.origin)]
    repeats = Counter(trial.budget for trial in trials if is_repeat(trial.origin))
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert len(searched) == run.spec.sampler.max_trials * len(run.runs)
    assert max(repeats.values(), default=0) <= run.spec.controls.num_repeats
    assert len({run.shape_of(trial.number).key for trial in trials}) == len(trials) - repeats.total(), "a shape came twice"
    assert all(run.runs[trial.budget].space.explain(run.shape_of(trial.number)) == () for trial in trials), "over the budget"
    assert all(trial.state.is_terminal for trial in trials), "a trial never ended"
    ends = Counter(
        event.data["trial"]
        for event in events
        if event.type in ("trial.stopped", "trial.failed", "trial.cancelled") or (event.type == "trial.rung_finished" and event.data["state"] == "completed")
    )
    retried = Counter(event.data["trial"] for event in events if event.type == "trial.retried")
    assert ends - retried == Counter(trial.number for trial in trials), "a trial ended more than once"


def check_attempts(simulation: Simulation) -> None:
    """Never more at once than allowed, no step side by side with itself, none tried more often than allowed, and all accounted for."""
    attempts, run = simulation.store.list_attempts(simulation.search_id), simulation.rebuilt()
    assert simulation.cluster.most_at_once <= run.spec.resources.max_parallel_trials
    assert all(attempt.state is not AttemptState.RUNNING for attempt in attempts), "an attempt never ended"
    failed = Counter((attempt.stage, attempt.trial, attempt.rung) for attempt in attempts if attempt.state is AttemptState.FAILED and attempt.counts)
    assert max(failed.values(), default=0) <= run.spec.limits.max_attempts
    assert {run.step.key for run in simulation.cluster.history} <= {attempt.id for attempt in attempts}
    spans: defaultdict[Any, list[Run]] = defaultdict(list)
    for one in simulation.cluster.history:
        spans[one.key].append(one)
    for of_step in spans.values():
        ordered = sorted(of_step, key=lambda run: run.began)
        assert all(before.began + before.seconds <= after.began + 1e-6 or not before.is_over for before, after in pairwise(ordered)), "a step ran beside itself"


def check_results(simulation: Simulation) -> None:
    """Every rung that a worker finished is in the store once, unless its controller died before it could hear of it."""
    rungs, attempts = simulation.store.list_rungs(simulation.search_id), simulation.store.list_attempts(simulation.search_id)
    stored = Counter((rung.trial, rung.rung) for rung in rungs)
    assert max(stored.values()) == 1, "a result was stored twice"
    finished = [run for run in simulation.cluster.history if run.is_over and run.outcome.succeeded and run.step.stage == "rung"]
    assert {(run.key[1], run.key[2]) for run in finished} == set(stored), "a result was lost, or came from nowhere"
    assert len(finished) == len(rungs), "a finished rung ran again"
    succeeded = [attempt for attempt in attempts if attempt.stage == "rung" and attempt.state is AttemptState.SUCCEEDED]
    assert Counter((attempt.trial, attempt.rung) for attempt in succeeded) == stored
    results = {(run.key[1], run.key[2]): run.outcome.result for run in finished}
    assert all(results[rung.trial, rung.rung] == rung.result for rung in rungs), "a result changed on its way"


def check_promotions(trials: list[TrialRecord], *, events: list[EventRecord]) -> None:
    """Rung follows rung, and who was let go on has gone on: it ended there, or failed, never by being stopped below."""
    started: dict[int, int] = {}
    for event in events:
        if event.type == "trial.started":
            number, rung = event.data["trial"], event.data["rung"]
            assert rung in (started.get(number, 0), started.get(number, -1) + 1), "a rung was skipped, or gone back to"
            started[number] = rung
    for trial in trials:
        if trial.state in (TrialState.STOPPED, TrialState.COMPLETED):
            assert started[trial.number] == trial.rung, "a promotion was revoked"


def check_winner(simulation: Simulation, search: SearchRecord, *, trials: list[TrialRecord]) -> None:
    """The board holds every trial with a result. The winner is of the best tie group, and the best of its finalists on the held-out documents."""
    assert search.winner is not None
    board, prepared = simulation.store.whole_board(search.id), simulation.store.get_prepared(search.id)
    assert board is not None
    assert prepared is not None
    rows = board["rows"]
    finished = [trial for trial in trials if trial.rung is not None]
    assert {row["number"]: row["state"] for row in rows} == {trial.number: trial.state for trial in finished if not is_repeat(trial.origin)}
    assert {repeat["number"]: repeat["state"] for repeat in board["repeats"]} == {trial.number: trial.state for trial in finished if is_repeat(trial.origin)}
    ranked = [row for row in rows if row["rank"] is not None]
    completed = {trial.number for trial in trials if trial.state is TrialState.COMPLETED and not is_repeat(trial.origin)}
    assert {row["number"] for row in ranked} == completed
    standing = [row for row in ranked if not row["is_control"] and (row["confirmation"] or {"verified": True})["verified"]]
    finalists = [row for row in standing if row["tie_group"] == standing[0]["tie_group"]][: search.spec["num_finalists"]]
    assert all(row["confirmation"] is not None for row in finalists), "a finalist was not confirmed"
    teacher, random = prepared["teacher"]["tasks"], prepared["random"]["tasks"]
    shares = {}
    for row in finalists:
        held_out = row["confirmation"]["held_out"]["tasks"]
        shares[row["number"]] = sum((held_out[name]["value"] - random[name]["value"]) / (teacher[name]["value"] - random[name]["value"]) for name in held_out)
    assert search.winner["trial"] == board["winner"] == max(shares, key=lambda number: shares[number]), "a better one was confirmed"
