"""Several controllers on one store, that come, die, freeze and wake, under one made-up time, and what must be true of their searches.

Each has a cluster of its own. The lease clock is the made-up one too; everything that decides is the product's own.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from nas.settings import Settings
from nas.spec import dump_spec, parse_spec
from nas.store.records import AttemptState, SearchState
from nas.store.store import Store
from tests.simulation.cluster import Clock, FakeCluster, Run, Trouble
from tests.simulation.simulator import INPUTS, Simulation, check_promotions, check_trials, check_winner, make_spec
from workers.controller import Controller

LEASE_SECONDS = 10.0
TICK_SECONDS = 2.0
LOOK_SECONDS = LEASE_SECONDS / 4 + TICK_SECONDS
"""After so long a controller that ticks has renewed, and looked at the others."""


class TimedStore(Store):
    """A store whose lease clock is made up."""

    clock: Clock

    def _now(self, connection: Any) -> float:
        return 1000.0 + self.clock.seconds


AnyStore = TypeVar("AnyStore", bound=TimedStore)


@dataclass(kw_only=True, eq=False)
class Member:
    """A controller, and the workers that it started."""

    controller: Controller
    cluster: FakeCluster
    frozen_until: float = 0.0

    @property
    def owner(self) -> str:
        return self.controller._membership.owner

    @property
    def searches(self) -> set[str]:
        return {name for name in self.controller._membership.fences if name.startswith("srch_")}


@dataclass(kw_only=True)
class Fleet:
    """Searches, and whoever leads them."""

    folder: Path
    num_searches: int
    num_trials: int
    seed: int
    num_workers: int = 2
    database_url: str = ""
    """Another one than a SQLite file in the folder."""
    clock: Clock = field(default_factory=Clock)
    members: list[Member] = field(default_factory=list)
    clusters: list[FakeCluster] = field(default_factory=list)
    """Also those of controllers that died."""
    happened: Counter[str] = field(default_factory=Counter)
    most_unled_seconds: float = 0.0
    _unled_since: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = Settings.from_environment({"NAS_DATA": str(self.folder), **({"NAS_DATABASE_URL": self.database_url} if self.database_url else {})})
        self.settings = dataclasses.replace(settings, lease_seconds=LEASE_SECONDS, attempt_lease_seconds=2 * LEASE_SECONDS)
        self.store = self.open_store(TimedStore)
        self.random = random.Random(self.seed)
        self.search_ids: list[str] = []
        self.submit(num=self.num_searches)

    def open_store(self, kind: type[AnyStore]) -> AnyStore:
        """The database, under the made-up clock."""
        store = kind.open(self.settings.database_url, migrate=True)
        store.clock = self.clock
        return store

    def make_spec(self) -> dict[str, Any]:
        """The spec of the next search."""
        return make_spec(
            num_trials=self.num_trials,
            num_workers=self.num_workers,
            seed=len(self.search_ids) % 2,  # so that those of different controllers share a prepared folder
            rungs={"num_trained": 1},
            controls={"anchors": False, "num_random": 0},
            num_finalists=1,
            sampler={"name": "random", "max_trials": self.num_trials},
        )

    def submit(self, *, num: int) -> None:
        for _ in range(num):
            spec = parse_spec(json.dumps(self.make_spec()))
            self.search_ids.append(self.store.create_search(spec=dump_spec(spec), inputs=INPUTS, plan={}, label="").id)

    def join(self) -> Member:
        cluster = self.make_cluster(seed=100 * self.seed + len(self.clusters))
        self.clusters.append(cluster)
        member = self.make_member(cluster)
        self.members.append(member)
        self.happened["joined"] += 1
        return member

    def make_cluster(self, *, seed: int) -> FakeCluster:
        return FakeCluster(num_workers=1000, seed=seed, clock=self.clock, trouble=Trouble(unverified=0.0))

    def make_member(self, cluster: FakeCluster) -> Member:
        return Member(controller=Controller(store=self.store, executor=cluster, settings=self.settings, clock=self.clock), cluster=cluster)

    def kill(self, member: Member) -> None:
        member.cluster.lose_driver()
        self.members.remove(member)
        self.happened["killed"] += 1

    def freeze(self, member: Member, *, seconds: float) -> None:
        """It does nothing for a while; what it started goes on."""
        member.frozen_until = self.clock.seconds + seconds
        self.happened["frozen"] += 1

    def round(self) -> bool:
        """Everybody who can acts once, in any order; whether any search goes on."""
        for member in self.random.sample(self.members, len(self.members)):
            self.act(member)
        if all(self.clock.seconds < member.frozen_until for member in self.members):
            self.clock.seconds += TICK_SECONDS
        return self._note_led()

    def act(self, member: Member) -> None:
        """One round of a controller, if it can."""
        if self.clock.seconds < member.frozen_until:
            member.cluster.go_on_unwatched()
        else:
            member.controller.tick(timeout_seconds=self.random.random() * TICK_SECONDS)

    def _note_led(self) -> bool:
        """How long a search was led by nobody who could act."""
        active, now = self.store.active_searches(), self.clock.seconds
        led = {search for member in self.members if now >= member.frozen_until for search in member.searches}
        for search in active:
            if search in led:
                self._unled_since.pop(search, None)
            since = self._unled_since.setdefault(search, now) if search not in led else now
            self.most_unled_seconds = max(self.most_unled_seconds, now - since)
        return bool(active)

    def to_end(self) -> None:
        while self.round():
            pass

    def trouble(self, *, rate: float) -> None:
        """Now and then, something happens to somebody; there is always somebody who can act."""
        if self.random.random() >= rate:
            return
        able = [member for member in self.members if self.clock.seconds >= member.frozen_until]
        match self.random.choice(["kill", "freeze", "join"]):
            case "kill" if len(able) > 1:
                self.kill(self.random.choice(able))
            case "freeze" if len(able) > 1:
                self.freeze(self.random.choice(able), seconds=self.random.uniform(0.2, 5.0) * LEASE_SECONDS)
            case "join" if len(self.members) < 5:
                self.join()
            case _:
                pass

    def close(self) -> None:
        self.store.close()

    # -- what must be true ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Every search ended well, nothing was lost, and nothing counts twice. Reads the store and what the workers saw, no controller's memory."""
        history = [run for cluster in self.clusters for run in cluster.history]
        for search_id in self.search_ids:
            view = View(store=self.store, search_id=search_id, history=[run for run in history if search_id in run.step.folder])
            view.check()
            view.check_results()
        self._check_preparations([run for run in history if run.step.stage == "prepare"])

    def _check_preparations(self, runs: list[Run]) -> None:
        """No two searches fill one folder together, unless the first was lost and has to be told so."""
        lost = {attempt.id for search_id in self.search_ids for attempt in self.store.list_attempts(search_id) if attempt.state is AttemptState.LOST}
        folders = {run.step.request["prepared"] for run in runs}
        assert len(folders) < len(self.search_ids), "no two of them share a folder"
        for folder in folders:
            of_folder = [run for run in runs if run.step.request["prepared"] == folder and run.step.key not in lost]
            spans = sorted((run.began, run.began + run.seconds) for run in of_folder)
            assert all(before[1] <= after[0] + 1e-6 for before, after in pairwise(spans)), "two filled one folder together"


@dataclass(kw_only=True)
class View(Simulation):
    """One search, as the checks of a simulation read it."""

    history: list[Run]
    store: Store
    search_id: str
    folder: Path = Path()
    spec: dict[str, Any] = field(default_factory=dict)
    cluster: Any = None

    def __post_init__(self) -> None:
        pass

    def check(self) -> None:
        search, trials = self.store.get_search(self.search_id), self.store.list_trials(self.search_id)
        assert search.state is SearchState.SUCCEEDED, search.error
        events = self.store.list_events(self.search_id, limit=100_000)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1)), "events have gaps"
        check_trials(self, trials=trials, events=events)
        check_promotions(trials, events=events)
        check_winner(self, search=search, trials=trials)
        self.check_attempts()
        ends = [event.type for event in events if event.type in ("search.succeeded", "search.failed", "search.cancelled")]
        assert ends == ["search.succeeded"]

    def check_attempts(self) -> None:
        """For the store no step ever ran beside itself, none was tried more often than allowed, and every one that ran is accounted for."""
        attempts, limits = self.store.list_attempts(self.search_id), self.rebuilt().spec.limits
        assert all(attempt.state is not AttemptState.RUNNING for attempt in attempts), "an attempt never ended"
        failed = Counter((attempt.stage, attempt.trial, attempt.rung) for attempt in attempts if attempt.state is AttemptState.FAILED)
        assert max(failed.values(), default=0) <= limits.max_attempts
        running: dict[Any, str] = {}
        for event in self.store.list_events(self.search_id, limit=100_000):
            step = tuple(event.data.get(name) for name in ("stage", "trial", "rung"))
            if event.type in ("trial.started", "attempt.started"):
                assert step not in running, "a step was started beside itself"
                running[step] = event.data["attempt"]
            elif event.type in ("attempt.failed", "attempt.lost", "attempt.cancelled"):
                assert running.pop(step) == event.data["attempt"]
            elif event.type == "trial.rung_finished":
                running.pop(("rung", event.data["trial"], event.data["rung"]))
        succeeded = [(attempt.trial, attempt.rung) for attempt in attempts if attempt.stage == "rung" and attempt.state is AttemptState.SUCCEEDED]
        assert Counter((rung.trial, rung.rung) for rung in self.store.list_rungs(self.search_id)) == Counter(succeeded)
        assert max(Counter(succeeded).values()) == 1, "a rung that had a result ran again"
        assert {run.step.key for run in self.history} <= {attempt.id for attempt in attempts}

    def check_results(self) -> None:
        """Each result is that of the attempt that succeeded; whatever superseded attempts said is nowhere."""
        attempts = self.store.list_attempts(self.search_id)
        succeeded = {(attempt.trial, attempt.rung): attempt.id for attempt in attempts if attempt.stage == "rung" and attempt.state is AttemptState.SUCCEEDED}
        said = {run.step.key: run.outcome.result for run in self.history}
        assert all(said[succeeded[rung.trial, rung.rung]] == rung.result for rung in self.store.list_rungs(self.search_id))
