"""What users ask at any moment, and what a search's limits end: whole searches on pretended workers, every promise checked."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from nas.errors import Conflict, PreconditionFailed
from nas.search.results import is_searched
from nas.store.records import AttemptState, SearchRecord, SearchState, TrialState
from tests.simulation.cluster import Trouble
from tests.simulation.simulator import Simulation, all_events, check, check_replay, make_simulation
from workers.watch import CANCEL_GRACE_SECONDS, KILL_GRACE_SECONDS

Make = Callable[..., Simulation]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Simulation] = []

    def one(*, trouble: Trouble | None = None, **arguments: Any) -> Simulation:
        simulation = make_simulation(tmp_path / str(len(made)), **arguments)
        simulation.cluster.trouble = trouble or simulation.cluster.trouble
        start = simulation.store.get_search(simulation.search_id).created_at
        # The database's clock is the simulated one.
        simulation.store.steady_time = lambda _, *, is_kept=False: start + timedelta(seconds=simulation.cluster.clock())  # type: ignore[method-assign]
        made.append(simulation)
        return simulation

    yield one
    for simulation in made:
        simulation.close()


def go_on(simulation: Simulation, *, until: Callable[[SearchRecord], bool] = lambda record: record.state.is_terminal, seconds: float = 60.0) -> SearchRecord:
    while not until(record := simulation.store.get_search(simulation.search_id)):
        simulation.controller.tick(timeout_seconds=seconds)
    return record


def is_in(state: SearchState) -> Callable[[SearchRecord], bool]:
    return lambda record: record.state is state


class User:
    """Asks for anything at any moment, by a seed; what is refused is refused for a reason that the model knows too."""

    def __init__(self, simulation: Simulation, *, seed: int) -> None:
        self.simulation, self.generator, self.asked = simulation, random.Random(seed), Counter[str]()

    def act(self, record: SearchRecord) -> None:
        store, generator = self.simulation.store, self.generator
        may_change = record.state not in (SearchState.CONFIRMING, SearchState.CANCELLING)
        match generator.choice(["pause", "resume", "resume", "retry", "extend", "restart", "nothing"]):
            case "pause" if self.asked["pause"] < 6:
                store.request_pause(record.id)
                self.asked["pause"] += 1
            case "resume":
                store.request_resume(record.id)
            case "retry" if failed := [trial.number for trial in store.list_trials(record.id) if trial.state is TrialState.FAILED]:
                self._try("retry", lambda: store.retry_trial(record.id, generator.choice(failed)), may_change=may_change)
            case "extend" if self.asked["extend"] < 4:
                wanted = record.spec["sampler"]["max_trials"] + generator.randint(1, 4)
                workers = generator.randint(1, 6)
                change = {"max_trials": wanted, "max_parallel_trials": workers}
                self._try("extend", lambda: store.update_search(record.id, version=record.version, **change), may_change=may_change)
                if self.asked["extend"]:
                    self.simulation.cluster.most_at_once = 0
            case "restart" if self.asked["restart"] < 4:
                self.simulation.restart()
                self.asked["restart"] += 1

    def _try(self, name: str, ask: Callable[[], object], *, may_change: bool) -> None:
        try:
            ask()
        except PreconditionFailed:
            self.asked["late"] += 1
        except Conflict as conflict:
            if may_change and "confirms its finalists" not in str(conflict):
                raise
        else:
            self.asked[name] += 1


def ask_for_anything(make: Make, *, seed: int) -> Counter[str]:
    """A search with such a user to its end; every promise is checked."""
    simulation = make(num_trials=8, num_workers=4, seed=seed, trouble=Trouble(failed=0.08, diverged=0.08, straggler=0), controls={"num_random": 1})
    user = User(simulation, seed=seed)
    while not (record := simulation.store.get_search(simulation.search_id)).state.is_terminal:
        if user.generator.random() < 0.4 or record.state is SearchState.PAUSED:
            user.act(record)
        simulation.controller.tick(timeout_seconds=60.0)
    simulation.cluster.most_at_once = 0  # max_parallel_trials went up and down
    check(simulation)
    return user.asked


@pytest.mark.parametrize("seed", range(2))
def test_whatever_users_ask_nothing_is_lost_and_nothing_done_twice(make: Make, seed: int) -> None:
    asked = ask_for_anything(make, seed=seed)

    assert asked["pause"] >= 1
    assert sum(asked.values()) >= 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(100, 160, 20))
def test_whatever_many_users_ask_nothing_is_lost_and_nothing_done_twice(make: Make, first: int) -> None:
    for seed in range(first, first + 20):
        ask_for_anything(make, seed=seed)


def test_a_paused_search_has_nothing_running_and_counts_no_failure(make: Make) -> None:
    simulation = make(num_trials=8, num_workers=4, seed=1, trouble=Trouble(preempted=0, failed=0, diverged=0, refused=0, straggler=0))
    go_on(simulation, until=lambda record: len(simulation.store.list_rungs(record.id)) >= 8)

    simulation.store.request_pause(simulation.search_id)
    paused = go_on(simulation, until=is_in(SearchState.PAUSED), seconds=1.0)
    num_attempts = len(simulation.store.list_attempts(paused.id))
    for _ in range(20):
        simulation.controller.tick(timeout_seconds=100.0)

    attempts = simulation.store.list_attempts(paused.id)
    assert not simulation.cluster.num_running
    assert len(attempts) == num_attempts
    assert paused.id not in simulation.controller._conductors, "a paused search takes no memory"
    stopped = [attempt for attempt in attempts if attempt.state is AttemptState.LOST]
    assert stopped
    assert {attempt.reason for attempt in stopped} == {"paused"}
    assert not any(attempt.state is AttemptState.FAILED for attempt in attempts)
    simulation.store.request_resume(paused.id)
    go_on(simulation)
    check(simulation)


@pytest.mark.parametrize("ask", ["request_pause", "request_cancel"])
def test_a_worker_that_heeds_nothing_delays_a_request_by_its_grace_and_no_longer(make: Make, monkeypatch: pytest.MonkeyPatch, ask: str) -> None:
    simulation = make(num_trials=8, num_workers=4, seed=2)
    go_on(simulation, until=lambda record: len(simulation.store.list_rungs(record.id)) >= 5)
    monkeypatch.setattr(simulation.cluster, "_heed_stops", lambda: None)
    monkeypatch.setattr(simulation.cluster, "kill", lambda key: None)
    monkeypatch.setattr(simulation.cluster, "_collect", lambda: simulation.cluster._ends.clear() or [])
    asked_at = simulation.cluster.clock()

    getattr(simulation.store, ask)(simulation.search_id)
    go_on(simulation, until=lambda record: record.state in (SearchState.PAUSED, SearchState.CANCELLED), seconds=0.25)

    assert simulation.cluster.clock() - asked_at <= CANCEL_GRACE_SECONDS + 5.0
    assert KILL_GRACE_SECONDS < 5.0
    assert all(attempt.state is not AttemptState.RUNNING for attempt in simulation.store.list_attempts(simulation.search_id))
    check_replay(simulation, events=all_events(simulation))


def test_a_retried_trial_is_trained_and_ranked_like_any_other(make: Make) -> None:
    simulation = make(num_trials=10, num_workers=4, seed=3, trouble=Trouble(diverged=0.3, failed=0, straggler=0))

    def failed() -> list[int]:
        return [trial.number for trial in simulation.store.list_trials(simulation.search_id) if trial.state is TrialState.FAILED]

    go_on(simulation, until=lambda _: len(failed()) >= 2)
    retried = failed()
    for number in retried:
        simulation.store.retry_trial(simulation.search_id, number)
    go_on(simulation)

    check(simulation)
    assert not set(retried) & set(failed())


def test_an_extended_search_proposes_more_and_keeps_every_promotion(make: Make) -> None:
    simulation = make(num_trials=8, num_workers=4, seed=4)
    go_on(simulation, until=lambda record: len(simulation.store.list_trials(record.id)) >= 8)

    simulation.store.update_search(simulation.search_id, version=None, max_trials=20)
    go_on(simulation)

    check(simulation)
    assert sum(is_searched(trial.origin) for trial in simulation.store.list_trials(simulation.search_id)) == 20


# -- limits ------------------------------------------------------------------------------------------------------------------


def limits(**changes: Any) -> dict[str, Any]:
    return {"max_failed_trials": 100_000, "max_rung_seconds": 1e6, **changes}


def test_a_search_ends_in_time_with_what_it_has_also_over_restarts(make: Make) -> None:
    simulation = make(num_trials=60, num_workers=4, seed=5, limits=limits(max_search_seconds=1500.0))
    for part in range(3):
        go_on(simulation, until=lambda _, part=part: simulation.cluster.clock() > 300 * (part + 1), seconds=10.0)
        simulation.restart()

    search = go_on(simulation, seconds=10.0)

    assert search.state is SearchState.SUCCEEDED, search.error
    assert search.end_reason == "time_limit"
    assert search.board is not None
    assert search.board["end_reason"] == "time_limit"
    last_begun = max(run.began for run in simulation.cluster.history if run.step.stage == "rung")
    assert last_begun <= 1500.0 + 10.0  # it waited in the queue for the first round
    trials = simulation.store.list_trials(search.id)
    unfinished = [trial for trial in trials if trial.state is TrialState.CANCELLED]
    assert unfinished
    assert {(trial.failure or {})["reason"] for trial in unfinished} == {"time_limit"}
    check_replay(simulation, events=all_events(simulation))


def test_a_pause_does_not_count_as_time_at_work(make: Make) -> None:
    simulation = make(num_trials=12, num_workers=6, seed=6, limits=limits(max_search_seconds=100_000.0))
    go_on(simulation, until=lambda record: len(simulation.store.list_rungs(record.id)) >= 5)
    simulation.store.request_pause(simulation.search_id)
    go_on(simulation, until=is_in(SearchState.PAUSED))
    simulation.cluster.clock.seconds += 200_000.0
    simulation.store.request_resume(simulation.search_id)

    search = go_on(simulation)

    assert search.end_reason == "max_trials", search.error


def test_a_search_that_completed_nothing_in_time_fails_with_its_limit(make: Make) -> None:
    simulation = make(num_trials=50, num_workers=2, seed=7, limits=limits(max_search_seconds=60.0))

    search = go_on(simulation)

    assert search.state is SearchState.FAILED
    assert search.error is not None
    assert search.error["reason"] == "time_limit"
    assert "limits.max_search_seconds=60 is reached" in search.error["message"]


def test_no_more_tokens_are_trained_than_allowed(make: Make) -> None:
    free = make(num_trials=8, num_workers=4, seed=8)
    go_on(free)
    whole = free.rebuilt().begun_tokens
    simulation = make(num_trials=8, num_workers=4, seed=8, limits=limits(max_tokens=int(whole * 0.97)))

    search = go_on(simulation)

    assert search.end_reason == "token_limit", search.error
    assert simulation.rebuilt().begun_tokens <= whole * 0.97


def test_device_seconds_of_failed_steps_count_too(make: Make) -> None:
    simulation = make(num_trials=60, num_workers=4, seed=9, trouble=Trouble(failed=0.3), limits=limits(max_device_seconds=1500.0))

    search = go_on(simulation, seconds=10.0)

    assert "device_seconds_limit" in (search.end_reason, (search.error or {}).get("reason"))
    used = sum(attempt.device_seconds or 0.0 for attempt in simulation.store.list_attempts(search.id) if attempt.stage in ("prepare", "rung"))
    assert 1500.0 <= used <= 1500.0 + 4 * (10.0 + CANCEL_GRACE_SECONDS)


def test_a_search_that_waited_too_long_in_the_queue_fails(make: Make) -> None:
    simulation = make(num_trials=4, num_workers=2, seed=10, limits=limits(max_queued_seconds=300.0))
    simulation.cluster.clock.seconds += 301.0

    search = go_on(simulation)

    assert search.error is not None
    assert search.error["reason"] == "queued_too_long"


def test_a_step_that_never_gets_a_worker_fails_with_that_reason(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = make(num_trials=4, num_workers=2, seed=11, limits=limits(max_wait_seconds=120.0, max_attempts=2))
    monkeypatch.setattr(simulation.cluster, "_fill", lambda now: None)

    search = go_on(simulation)

    assert search.error is not None
    assert search.error["reason"] == "no_resources"
    assert [(attempt.reason or "").split(":")[0] for attempt in simulation.store.list_attempts(search.id)] == ["no_resources"] * 2


@pytest.mark.parametrize(("stage", "limit"), [("prepare", "max_prepare_seconds"), ("rung", "max_rung_seconds"), ("confirm", "max_confirm_seconds")])
def test_a_step_that_hangs_is_ended_at_the_limit_of_its_stage(make: Make, stage: str, limit: str) -> None:
    bounds = {"max_attempts": 1, "max_prepare_seconds": 1e6, "max_confirm_seconds": 1e6, limit: 5.0}
    simulation = make(num_trials=4, num_workers=2, seed=12, trouble=Trouble(preempted=0, failed=0, diverged=0), limits=limits(**bounds))

    go_on(simulation, seconds=1.0)

    failed = [attempt for attempt in simulation.store.list_attempts(simulation.search_id) if attempt.state is AttemptState.FAILED]
    assert failed
    assert {attempt.stage for attempt in failed} == {stage}
    assert {attempt.reason for attempt in failed} == {f"timeout: {stage}: ran longer than limits.{limit}=5"}
