"""Schedules drawn from a seed: a few controllers and users on one store, and what may go wrong between any two of its transactions.

A controller may die before or after any write, or stall there beyond its lease while the others and the users go on; the store may be away, or may
have written what it could not acknowledge; steps hang, come late, are told twice, or outlive the controller that started them; users pause, resume,
cancel, retry and extend. After every round the history of each search is held against the tables, and in the end against what must be true.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Connection

from nas.errors import Conflict, StoreUnavailable
from nas.search.results import is_searched
from nas.store.machines import Fence
from nas.store.records import AttemptState, SearchState, TrialState
from nas.store.store import Store
from tests.faults.history import History
from tests.simulation.cluster import FakeCluster, Run, Trouble, pretended_result, trial_of
from tests.simulation.several import LEASE_SECONDS, Fleet, Member, TimedStore, View
from tests.simulation.simulator import check_promotions, check_winner, make_spec
from workers.controller import STORE_PATIENCE_SECONDS, Controller
from workers.liveness import BEAT, is_superseded
from workers.outcome import Outcome
from workers.step import Step
from workers.watch import PREEMPTED

MAX_SECONDS = 3000.0
"""Made-up time by which every search has ended, whatever happens; the longest undisturbed one takes 80."""


class Died(BaseException):
    """The process of a controller ends here, at once."""


class WatchedStore(TimedStore):
    """The store of one controller: something may happen before each of its transactions, and after each commit."""

    before: Callable[[bool], None] = staticmethod(lambda is_write: None)
    committed: Callable[[], None] = staticmethod(lambda: None)

    @classmethod
    def over(cls, store: TimedStore) -> WatchedStore:
        """Another's view of the same database. They share an engine, because every one compiles all queries anew."""
        watched = cls.__new__(cls)
        watched.__dict__.update(store.__dict__)
        return watched

    @contextmanager
    def read(self) -> Iterator[Connection]:
        if not self._is_inside:
            self.before(False)
        with super().read() as connection:
            yield connection

    @contextmanager
    def write(self, *, fence: Fence | None) -> Iterator[Connection]:
        is_inside = self._is_inside
        if not is_inside:
            self.before(True)
        with super().write(fence=fence) as connection:
            yield connection
        if not is_inside:
            self.committed()

    @property
    def _is_inside(self) -> bool:
        return getattr(self._local, "connection", None) is not None


@dataclass(frozen=True, kw_only=True)
class Dangers:
    """Chances. Of a controller at each of its transactions: it dies, it stalls, it finds the store away, or its write is not acknowledged. Of a user at
    each transaction of anybody: a request. Of each step: it falls silent, its end is told twice. Of each that runs when its controller dies: it survives."""

    dies: float = 0.0
    stalls: float = 0.0
    store_leaves: float = 0.0
    unacknowledged: float = 0.0
    asks: float = 0.0
    silent: float = 0.0
    repeated: float = 0.0
    survives: float = 0.0

    @classmethod
    def draw(cls, generator: Any) -> Dangers:
        """Some of them, in any strength."""
        most = {
            "dies": 0.02,
            "stalls": 0.02,
            "store_leaves": 0.01,
            "unacknowledged": 0.03,
            "asks": 0.02,
            "silent": 0.15,
            "repeated": 0.3,
            "survives": 1.0,
        }
        return cls(**{name: generator.choice((0.0, 1.0)) * generator.random() * value for name, value in most.items()})


@dataclass(kw_only=True)
class UnreliableCluster(FakeCluster):
    """Workers that also hang, are heard of twice, and go on when nobody leads them any more."""

    dangers: Dangers
    poison: frozenset[int] = frozenset()
    """Trials of which every try diverges."""
    _silent: set[str] = field(default_factory=set)
    _orphans: list[Run] = field(default_factory=list)
    _told: list[tuple[str, Outcome]] = field(default_factory=list)
    _chance: Any = None

    def __post_init__(self) -> None:
        self._chance = np.random.default_rng([self.seed, 1])

    def wait(self, *, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        ended = super().wait(timeout_seconds=timeout_seconds)
        self._told += ended
        if self._told and self._chance.random() < self.dangers.repeated:
            ended = [*ended, self._told[int(self._chance.integers(len(self._told)))]]
        return ended

    def kill(self, key: str) -> None:
        if key not in self._silent:  # its node does not answer
            super().kill(key)

    def heeding(self) -> list[str]:
        """Steps that run or wait, and would end if they were told to."""
        return [key for key in (*self._running, *(run.step.key for run in self._waiting)) if key not in self._silent]

    def lose_driver(self) -> None:
        for key in list(self._running):
            if self._chance.random() < self.dangers.survives:
                self._orphans.append(self._running.pop(key))
        super().lose_driver()

    def go_on_alone(self) -> list[str]:
        """Steps that outlived their controller, or were said to be dead: those that have ended by now leave their result, if they may; who did."""
        ended = [run for run in self._orphans if run.began + run.seconds <= self.clock.seconds]
        for run in ended:
            self._orphans.remove(run)
            super()._settle(run)
        published = {run.step.key: run.outcome for run in ended if run.outcome.succeeded}
        for run in self.history:
            run.outcome = published.get(run.step.key, run.outcome)
        return list(published)

    def _settle(self, run: Run) -> None:
        super()._settle(run)
        if run.outcome.reason == PREEMPTED:  # its node cannot be reached, and lives
            alive = Outcome(succeeded=True, result=pretended_result(run.step))
            self._orphans.append(dataclasses.replace(run, outcome=alive, seconds=run.seconds + float(self._chance.uniform(1.0, 20.0))))

    def _draw(self, step: Step) -> Run:
        run = super()._draw(step)
        if step.stage == "rung" and trial_of(step) in self.poison:
            run.outcome = Outcome(succeeded=False, reason="diverged", message="loss not finite", retryable=False)
        elif run.outcome.reason == "worker_died" and self._chance.random() < 0.5:
            run.outcome = dataclasses.replace(run.outcome, reason=PREEMPTED)
        elif run.outcome.succeeded and self._chance.random() < self.dangers.silent:
            self._silent.add(step.key)
            run.seconds = float(self._chance.uniform(10.0, 60.0))
        return run

    def _fill(self, now: float) -> None:
        super()._fill(now)
        for key in self._silent & self._running.keys():
            folder = Path(self._running[key].step.folder)
            if not is_superseded(folder):
                (folder / BEAT).write_text("the only one")


@dataclass(kw_only=True)
class World(Fleet):
    """One schedule. `run` goes through it and checks it; what happened is in `happened`, and in `histories`."""

    dangers: Dangers
    opened: TimedStore
    """An empty database of the present schema, in the folder."""
    parallel: int = 2
    num_trained: int = 2
    sampler: str = "random"
    poison: frozenset[int] = frozenset()
    histories: dict[str, History] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    """Searches whose cancel was accepted."""
    dies_at: tuple[str, int] | None = None
    """The one write, counted from 1, (before, n) or (after, n) which the controller dies."""
    num_writes: int = 0
    _acting: list[Member] = field(default_factory=list)
    _away_until: float = 0.0
    _failing_since: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.histories = {search_id: History(store=self.store, search_id=search_id) for search_id in self.search_ids}

    def open_store(self, kind: type[Any]) -> Any:
        self.opened.clock = self.clock
        return self.opened

    def make_spec(self) -> dict[str, Any]:
        return make_spec(
            num_trials=self.num_trials,
            num_workers=self.parallel,
            seed=len(self.search_ids),
            rungs={"num_trained": self.num_trained, "keep": 0.5},
            controls={"anchors": False, "num_random": 1},
            num_finalists=2,
            sampler={"name": self.sampler, "max_trials": self.num_trials, "num_startup_trials": 3},
            limits={"max_failed_trials": 100, "max_rung_seconds": 60.0, "max_attempts": 10, "max_preemptions": 1000},
        )

    def make_cluster(self, *, seed: int) -> FakeCluster:
        return UnreliableCluster(
            num_workers=1000,
            seed=seed,
            clock=self.clock,
            trouble=Trouble(unverified=0.0, diverged=0.0),
            rung_seconds=(1.0, 2.0, 4.0),
            other_seconds=2.0,
            dangers=self.dangers,
            poison=self.poison,
        )

    def make_member(self, cluster: FakeCluster) -> Member:
        store = WatchedStore.over(self.opened)
        member = Member(controller=Controller(store=store, executor=cluster, settings=self.settings, clock=self.clock), cluster=cluster)
        store.before, store.committed = lambda is_write: self._before(member, is_write=is_write), self._committed
        return member

    # -- what goes on ------------------------------------------------------------------------------------------------------

    def run(self, *, num_members: int) -> None:
        """To the end of every search, with all checks."""
        for _ in range(num_members):
            self.join()
        while self.round():
            assert self.clock.seconds < MAX_SECONDS, f"not ended after {MAX_SECONDS:g} s: {self.store.active_searches()}"
        self.dangers, self._away_until = Dangers(), 0.0
        for _ in range(4):  # those who led a search without knowing that it ended hear of it
            self.round()
        self.check()

    def round(self) -> bool:
        if not self.members:
            self.clock.seconds += self.random.random() * LEASE_SECONDS
            self.join()
        for member in self.random.sample(self.members, len(self.members)):
            if member in self.members:
                self.act(member)
        self._outlast()
        for search_id, history in self.histories.items():
            history.follow()
            if history.state is SearchState.PAUSED and self.random.random() < 0.3:
                self.store.request_resume(search_id)
        return any(history.state is None or not history.state.is_terminal for history in self.histories.values())

    def act(self, member: Member) -> None:
        self._acting.append(member)
        try:
            member.controller.tick(timeout_seconds=2.0)
            self._failing_since.pop(id(member), None)
        except Died:
            self.kill(member)
        except StoreUnavailable:  # what `Controller.run` does then
            self.clock.seconds += 1.0
            if self.clock.seconds - self._failing_since.setdefault(id(member), self.clock.seconds) > STORE_PATIENCE_SECONDS:
                self.kill(member)
        finally:
            self._acting.pop()

    def _outlast(self) -> None:
        for cluster in self.clusters:
            assert isinstance(cluster, UnreliableCluster)
            for key in cluster.go_on_alone():
                found = [attempt for search_id in self.search_ids for attempt in self.store.list_attempts(search_id) if attempt.id == key]
                assert found[0].state is AttemptState.RUNNING, "a step left its traces beside the one that took its place"

    # -- what goes wrong ---------------------------------------------------------------------------------------------------

    def _before(self, member: Member, *, is_write: bool) -> None:
        self.num_writes += is_write
        if is_write and self.dies_at == ("before", self.num_writes):
            raise Died
        if self.clock.seconds < self._away_until:
            raise StoreUnavailable("the database does not answer")
        if self._happens(self.dangers.asks):
            self.ask()
        if self._happens(self.dangers.dies):
            raise Died
        if self._happens(self.dangers.store_leaves):
            self.happened["store away"] += 1
            self._away_until = self.clock.seconds + self.random.choice((1.0, 5.0, 80.0)) * self.random.random()
            raise StoreUnavailable("the database ended the connection")
        if len(self._acting) == 1 and self._happens(self.dangers.stalls):
            self._stall(member)

    def _committed(self) -> None:
        if self.dies_at == ("after", self.num_writes) or self._happens(self.dangers.dies):
            raise Died
        if self._happens(self.dangers.unacknowledged):
            self.happened["unacknowledged"] += 1
            raise StoreUnavailable("the database ended the connection")

    def _happens(self, chance: float) -> bool:
        return chance > 0 and self.random.random() < chance

    def _stall(self, member: Member) -> None:
        """It hangs where it is; the others go on."""
        self.happened["stalled"] += 1
        until = self.clock.seconds + self.random.uniform(0.1, 3.0) * LEASE_SECONDS
        if len(self.members) == 1 and self.random.random() < 0.5:
            self.join()
        while self.clock.seconds < until:
            for other in [other for other in self.members if other not in self._acting]:
                self.act(other)
            self.clock.seconds += 1.0

    def ask(self) -> None:
        """A request of a user for some search."""
        search_id, request = self.random.choice(self.search_ids), self.random.choice(REQUESTS)
        try:
            name = request(self, search_id)
        except Conflict:
            name = "refused"
        self.happened[f"request {name}"] += 1

    # -- what must be true -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        runs = [run for cluster in self.clusters for run in cluster.history]
        for search_id, history in self.histories.items():
            search = self.store.get_search(search_id)
            assert search.state is (SearchState.CANCELLED if search_id in self.cancelled else SearchState.SUCCEEDED), f"{search.state}: {search.error}"
            assert history.losses() == []
            assert history.repeats == []
            view = View(store=self.store, search_id=search_id, history=[run for run in runs if search_id in run.step.folder])
            assert {run.step.key for run in view.history} <= {attempt.id for attempt in self.store.list_attempts(search_id)}, "a step that nobody knows of"
            view.check_results()
            if search.state is SearchState.SUCCEEDED:
                trials = self.store.list_trials(search_id)
                events = self.store.list_events(search_id, limit=100_000)
                assert sum(is_searched(trial.origin) for trial in trials) == search.spec["sampler"]["max_trials"]
                assert {trial.number for trial in trials if trial.state is TrialState.FAILED} <= self.poison
                check_promotions(trials, events=events)
                check_winner(view, search, trials=trials)
        for cluster in self.clusters:
            assert isinstance(cluster, UnreliableCluster)
            assert cluster.heeding() == [], "a step runs for no search"


def figures(store: Store, search_id: str) -> list[Any]:
    """What a search found: for comparison with one that nothing disturbed."""
    search, results = store.get_search(search_id), {(rung.trial, rung.rung): rung.result["kl"]["value"] for rung in store.list_rungs(search_id)}
    assert search.winner is not None
    trials = [(trial.number, trial.origin, trial.shape, trial.state, trial.rung) for trial in store.list_trials(search_id)]
    return [trials, results, search.winner["trial"], search.end_reason]


# -- what users ask --------------------------------------------------------------------------------------------------------


def _pause(world: World, search_id: str) -> str:
    world.store.request_pause(search_id)
    return "pause"


def _resume(world: World, search_id: str) -> str:
    world.store.request_resume(search_id)
    return "resume"


def _cancel(world: World, search_id: str) -> str:
    if world.random.random() < 0.9:
        return "none"
    world.store.request_cancel(search_id)
    world.cancelled.add(search_id)
    return "cancel"


def _retry(world: World, search_id: str) -> str:
    failed = [trial.number for trial in world.store.list_trials(search_id, states=[TrialState.FAILED])]
    if not failed:
        return "none"
    world.store.retry_trial(search_id, world.random.choice(failed))
    return "retry"


def _extend(world: World, search_id: str) -> str:
    search = world.store.get_search(search_id)
    world.store.update_search(search_id, version=search.version, max_trials=min(world.num_trials + 3, search.spec["sampler"]["max_trials"] + 1))
    return "extend"


def _widen(world: World, search_id: str) -> str:
    world.store.update_search(search_id, version=None, max_parallel_trials=world.random.randint(1, 4))
    return "change of parallel trials"


REQUESTS = (_pause, _resume, _cancel, _retry, _extend, _widen)
