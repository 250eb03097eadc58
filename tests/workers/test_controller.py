"""A whole search under the real controller on a real store; steps run in this process, one after the other."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nas.compress.teacher import check_teacher
from nas.errors import StoreUnavailable
from nas.search import confirm
from nas.settings import Settings
from nas.spec import dump_spec, parse_spec
from nas.store.records import AttemptRecord, AttemptState, SearchRecord, SearchState, TrialState, all_winners
from nas.store.store import Store
from nas.submission import check_submission
from workers import watch as watch_module
from workers.controller import Controller
from workers.liveness import BEAT, STOP
from workers.logs import LOG
from workers.metrics import REGISTRY
from workers.step import PROGRESS, RESULT, Outcome, Step, execute

RUNGS = {"first_tokens": 2048, "factor": 2, "num_trained": 2, "keep": 0.5}


class InlineExecutor:
    """Runs a step when it is waited for. A test may put its hands on the step before, or take the step's place."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.history: list[Step] = []
        self.before: Callable[[Step], Outcome | None] = lambda step: None
        self.closed = False

    def start(self, step: Step) -> None:
        self.steps.append(step)
        self.history.append(step)

    def wait(self, *, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        if not self.steps:
            return []
        step = self.steps.pop(0)
        return [(step.key, self.before(step) or execute(step))]

    def kill(self, key: str) -> None:
        self.steps = [step for step in self.steps if step.key != key]

    def close(self) -> None:
        self.steps.clear()
        self.closed = True

    def ran(self, *, trial: int, rung: int) -> int:
        """How often a rung of a trial was started."""
        return sum(is_rung(step, trial=trial, rung=rung) for step in self.history)


def is_rung(step: Step, *, trial: int, rung: int) -> bool:
    return step.stage == "rung" and step.request["rung"] == rung and Path(step.request["trial_folder"]).name == str(trial)


@dataclasses.dataclass
class Service:
    """A store, its data folder, and controllers on it."""

    settings: Settings
    store: Store
    make_spec: Callable[..., dict[str, Any]]
    executor: InlineExecutor = dataclasses.field(default_factory=InlineExecutor)

    def submit(self, **changes: Any) -> str:
        spec = parse_spec(json.dumps(self.make_spec(**changes)))
        submission = check_submission(spec, store=self.store)
        return self.store.create_search(spec=dump_spec(spec), inputs=submission.inputs, plan=submission.plan, label="").id

    def run(self, search_id: str, *, until: Callable[[SearchRecord], bool] | None = None, seconds: float = 120.0) -> SearchRecord:
        """A controller of its own, until the search has ended (or the condition holds): as if it was killed there."""
        controller = Controller(store=self.store, executor=self.executor, settings=self.settings)
        deadline = time.monotonic() + seconds
        until = until or (lambda record: record.state.is_terminal)
        while not until(record := self.store.get_search(search_id)):
            assert time.monotonic() < deadline, f"search {record.state} after {seconds} s"
            controller.tick(timeout_seconds=0.0)
        self.executor.steps.clear()
        return record

    def board(self, search: SearchRecord) -> dict[str, Any]:
        """The whole board."""
        board = self.store.whole_board(search.id)
        assert board is not None
        return board

    def expire_lease(self) -> None:
        time.sleep(self.settings.lease_seconds + 0.05)

    def folder(self, search_id: str) -> Path:
        return self.settings.searches_folder / search_id


@pytest.fixture
def service(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    register_tiny: Callable[..., None],
    tiny_spec: Callable[..., dict[str, Any]],
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Service]:
    if request.function is not test_a_search_runs_to_its_bundle:
        # A fresh process for each finalist takes three times as long as all the rest of a search.
        monkeypatch.setattr(confirm, "verify", partial(_verify_here, confirm.verify))
    settings = dataclasses.replace(Settings.from_environment({"NAS_DATA": str(tmp_path / "data")}), lease_seconds=0.3)
    settings.data_folder.mkdir()
    settings.prepared_folder.symlink_to(prepared)
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    yield Service(settings=settings, store=store, make_spec=tiny_spec)
    store.close()


def _verify_here(verify: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return verify(*arguments, **{**named, "with_reload": False})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared folders, shared by the tests: the digest in their names keeps them apart."""
    return tmp_path_factory.mktemp("prepared")


def is_state(state: SearchState) -> Callable[[SearchRecord], bool]:
    return lambda record: record.state is state


def test_a_search_runs_to_its_bundle(service: Service) -> None:
    search_id = service.submit(controls={"anchors": False, "num_random": 1})

    search = service.run(search_id)

    assert search.state is SearchState.SUCCEEDED, search.error
    board = service.board(search)
    assert search.winner is not None
    trials = service.store.list_trials(search_id)
    assert all(trial.state in (TrialState.COMPLETED, TrialState.STOPPED) for trial in trials)
    assert sorted(row["number"] for row in board["rows"]) == [trial.number for trial in trials]
    assert {row["number"]: row["state"] for row in board["rows"]} == {trial.number: trial.state for trial in trials}
    finalists = [row for row in board["rows"] if row["number"] in board["finalists"]]
    assert all(row["verified"] and row["confirmation"]["deployability"]["tensor_parallel_sizes"][0] == 1 for row in finalists)
    assert sum(row["probability_best"] for row in finalists) == pytest.approx(1.0)
    assert search.winner["trial"] == board["winner"] == board["leader"] in board["finalists"]
    assert "documents" not in {key for row in board["rows"] for key in _keys(row)}
    assert (service.settings.data_folder / search.winner["bundle"]).is_file()
    assert all(attempt.state is AttemptState.SUCCEEDED for attempt in service.store.list_attempts(search_id))
    assert service.store.list_points(search_id, trial=search.winner["trial"])


def _keys(value: Any) -> Iterator[str]:
    for key, item in value.items() if isinstance(value, dict) else ():
        yield key
        yield from _keys(item)


def test_a_repeat_is_the_same_shape_trained_in_another_order_and_stands_apart(service: Service) -> None:
    search = service.run(service.submit(sampler={"name": "random", "max_trials": 1}, controls={"num_repeats": 1}))

    assert search.state is SearchState.SUCCEEDED, search.error
    board, trials = service.board(search), service.store.list_trials(search.id)
    repeat = next(trial for trial in trials if trial.origin == "repeat:1")
    anchor = next(trial for trial in trials if trial.shape == repeat.shape)
    assert sorted(row["number"] for row in board["rows"]) == [trial.number for trial in trials if trial is not repeat]
    (shown,) = board["repeats"]
    assert (shown["number"], shown["seed"], shown["rung"]) == (repeat.number, search.spec["seed"] + 1, 2)
    ours, theirs = shown["kl_by_rung"], next(row["kl_by_rung"] for row in board["rows"] if row["number"] == anchor.number)
    assert ours[0] == theirs[0]
    assert all(one != other for one, other in zip(ours[1:], theirs[1:], strict=True))
    assert [spread["num_runs"] for spread in board["seed_spreads"]] == [2, 2]
    assert board["seed_spread"] == board["seed_spreads"][-1]["value"] != search.spec["rungs"]["seed_spread"]
    assert repeat.confirmation is None


def test_what_each_decision_cost_adds_up(service: Service) -> None:
    sampler = {"name": "random", "max_trials": 8, "num_startup_trials": 2}
    rungs = {"first_tokens": 512, "factor": 2, "num_trained": 1, "keep": 0.5, "keep_untrained": 1.0}
    search = service.run(service.submit(sampler=sampler, rungs=rungs, controls={"anchors": False, "num_random": 0}))

    board = service.board(search)
    assert sum(board["importances"].values()) == pytest.approx(1.0)
    assert "mlp_fill" in board["importances"]
    cost = board["cost"]
    decisions = cost["decisions"]
    spec = parse_spec(json.dumps(search.spec))
    assert [decision["decision"] for decision in decisions] == [*(f"rung {rung}" for rung in range(spec.rungs.num_trained + 1)), "confirm"]
    assert [decision["trials"] for decision in decisions[:1]] == [8]
    assert [decision["chosen"] for decision in decisions[:-2]] == [decision["trials"] for decision in decisions[1:-1]]
    assert decisions[-1]["chosen"] == 1
    assert cost["tokens"] == sum(decision["tokens"] for decision in decisions) > 0
    prepare = cost["seconds"]["prepare"] * spec.resources.cpus
    assert cost["device_seconds"] == pytest.approx(prepare + sum(decision["device_seconds"] for decision in decisions))
    assert decisions[-1]["device_seconds"] > 0


def test_an_ended_search_leaves_its_bundle_and_the_students_that_were_verified(service: Service) -> None:
    search_id = service.submit(sampler={"name": "random", "max_trials": 1})

    service.run(search_id)

    assert sorted(path.name for path in service.folder(search_id).iterdir() if path.is_file() or any(path.iterdir())) == ["trials", "winner"]
    kept = {int(path.name) for path in (service.folder(search_id) / "trials").iterdir()}
    assert kept == {trial.number for trial in service.store.list_trials(search_id) if trial.confirmation and trial.confirmation["verified"]}


def test_a_cancelled_search_ends_with_every_trial_cancelled_or_finished(service: Service) -> None:
    search_id = service.submit()
    service.run(search_id, until=lambda record: len(service.store.list_rungs(record.id)) >= 2)
    service.expire_lease()
    service.store.request_cancel(search_id)

    search = service.run(search_id)

    assert search.state is SearchState.CANCELLED
    assert all(trial.state.is_terminal for trial in service.store.list_trials(search_id))
    assert any(trial.state is TrialState.CANCELLED for trial in service.store.list_trials(search_id))
    assert not (service.folder(search_id) / "trials").exists()


def test_a_running_step_is_asked_to_stop_when_its_search_is_cancelled(service: Service) -> None:
    search_id = service.submit()
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)
    while not any(step.request.get("rung") == 1 for step in service.executor.steps):
        controller.tick(timeout_seconds=0.0)
    service.store.request_cancel(search_id)
    service.executor.before, waited = lambda step: None, service.executor.wait
    service.executor.wait = lambda timeout_seconds: []  # type: ignore[method-assign]

    controller.tick(timeout_seconds=0.0)
    service.executor.wait = waited  # type: ignore[method-assign]
    controller.tick(timeout_seconds=0.0)

    attempt = service.store.list_attempts(search_id)[-1]
    assert attempt.state is AttemptState.CANCELLED
    assert (attempt.reason or "").startswith("stopped")
    assert service.store.get_search(search_id).state is SearchState.CANCELLED


def test_a_cancel_between_two_writes_does_not_end_the_controller(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    search_id = service.submit()
    change = service.store.change_search

    def cancel_first(search: str, **arguments: Any) -> SearchRecord:
        if arguments["to"] is SearchState.SEARCHING:
            service.store.request_cancel(search_id)
        return change(search, **arguments)

    monkeypatch.setattr(service.store, "change_search", cancel_first)

    assert service.run(search_id).state is SearchState.CANCELLED


def test_a_failing_trial_is_tried_so_often_and_recorded_with_its_reason(service: Service) -> None:
    search_id = service.submit(limits={"max_attempts": 2})
    failure = Outcome(succeeded=False, reason="out_of_memory", message="no room")
    service.executor.before = lambda step: failure if is_rung(step, trial=0, rung=1) else None

    search = service.run(search_id)

    trial = service.store.get_trial(search_id, 0)
    assert search.state is SearchState.SUCCEEDED
    assert trial.state is TrialState.FAILED
    assert trial.failure == {"stage": "rung 1", "reason": "out_of_memory", "message": "no room", "attempts": 2, "log": ""}
    assert service.executor.ran(trial=0, rung=1) == 2


def test_a_trial_that_diverges_is_not_tried_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from nas.compress.distillation import Diverged
    from nas.search import trial as trial_module

    start = trial_module.start_student

    def start_or_diverge(spec: Any, *, shared: Any, shape: Any, **arguments: Any) -> Any:
        if shape.num_hidden_layers == shared.sorting.architecture.shape.num_hidden_layers:
            raise Diverged(step=3, tokens=512)
        return start(spec, shared=shared, shape=shape, **arguments)

    monkeypatch.setattr(trial_module, "start_student", start_or_diverge)
    search_id = service.submit()

    search = service.run(search_id)

    failed = [trial for trial in service.store.list_trials(search_id) if trial.state is TrialState.FAILED]
    assert search.state is SearchState.SUCCEEDED
    assert failed
    assert all(trial.failure and trial.failure["reason"] == "diverged" and trial.failure["attempts"] == 1 for trial in failed)


def test_a_search_with_too_many_failed_trials_fails_with_their_reasons(service: Service) -> None:
    search_id = service.submit(limits={"max_failed_trials": 2, "max_attempts": 1})
    service.executor.before = lambda step: Outcome(succeeded=False, reason="error", message="boom") if step.stage == "rung" else None

    search = service.run(search_id)

    assert search.state is SearchState.FAILED
    assert search.error is not None
    assert search.error["reason"] == "too_many_failed_trials"
    assert "trial 0: error" in search.error["message"]
    assert all(trial.state.is_terminal for trial in service.store.list_trials(search_id))


@pytest.mark.parametrize("retryable", [True, False])
def test_a_crash_after_the_last_failure_gives_no_further_try(service: Service, monkeypatch: pytest.MonkeyPatch, retryable: bool) -> None:
    search_id = service.submit(limits={"max_attempts": 1 if retryable else 3})

    def fail(step: Step) -> Outcome | None:
        if not is_rung(step, trial=0, rung=0):
            return None
        outcome = Outcome(succeeded=False, reason="error", message="boom", retryable=retryable)
        Path(step.folder).mkdir(parents=True, exist_ok=True)
        (Path(step.folder) / RESULT).write_text(json.dumps(outcome.as_dict()))
        return outcome

    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    service.executor.before = fail
    with monkeypatch.context() as patch:
        patch.setattr(service.store, "change_trial", die)
        with pytest.raises(Killed):
            service.run(search_id)
    service.expire_lease()
    assert service.store.get_trial(search_id, 0).state is TrialState.WAITING

    search = service.run(search_id)

    assert search.state is SearchState.SUCCEEDED
    assert service.store.get_trial(search_id, 0).state is TrialState.FAILED
    assert service.executor.ran(trial=0, rung=0) == 1


@pytest.mark.parametrize("max_attempts", [1, 3])
def test_a_step_that_cannot_be_started_is_a_failed_try(service: Service, monkeypatch: pytest.MonkeyPatch, max_attempts: int) -> None:
    def refuse(step: Step) -> None:
        raise ValueError("the precision of a fractional quantity is too high")

    monkeypatch.setattr(service.executor, "start", refuse)
    search_id = service.submit(limits={"max_attempts": max_attempts})

    search = service.run(search_id, seconds=20)

    assert search.state is SearchState.FAILED
    message = "the step could not be started: ValueError: the precision of a fractional quantity is too high"
    assert search.error == {"reason": "error", "message": f"prepare: {message}"}
    attempts = service.store.list_attempts(search_id)
    assert [(attempt.state, attempt.reason) for attempt in attempts] == [(AttemptState.FAILED, f"error: {message}")] * max_attempts


def test_a_step_that_is_not_started_once_is_tried_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    start, full = service.executor.start, iter([False, True])

    def start_or_raise(step: Step) -> None:
        if next(full, False):
            raise OSError("no space left on device")
        start(step)

    monkeypatch.setattr(service.executor, "start", start_or_raise)
    search_id = service.submit(sampler={"name": "random", "max_trials": 1})

    assert service.run(search_id).state is SearchState.SUCCEEDED


def test_an_attempt_whose_start_was_written_and_not_answered_is_lost(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers import controller as module

    monkeypatch.setattr(module, "TROUBLE_SECONDS", 0.05)
    start, away = service.store.start_attempt, iter([False, True])

    def start_and_raise(*arguments: Any, **named: Any) -> AttemptRecord:
        attempt = start(*arguments, **named)
        if next(away, False):
            raise OSError("connection reset")
        return attempt

    monkeypatch.setattr(service.store, "start_attempt", start_and_raise)
    search_id = service.submit(sampler={"name": "random", "max_trials": 1})

    assert service.run(search_id, seconds=30).state is SearchState.SUCCEEDED
    states = [attempt.state for attempt in service.store.list_attempts(search_id)]
    assert states.count(AttemptState.LOST) == 1
    assert AttemptState.RUNNING not in states


def test_a_step_that_can_never_run_fails_its_search_at_the_first_try(service: Service) -> None:
    """Also when its executor refused it, and no worker left an outcome in its folder."""
    search_id = service.submit(limits={"max_attempts": 3})
    service.executor.before = lambda step: Outcome(succeeded=False, reason="unavailable", message="64 of 1 CPUs", retryable=False)

    search = service.run(search_id)

    assert search.error == {"reason": "unavailable", "message": "prepare: 64 of 1 CPUs"}
    assert len(service.store.list_attempts(search_id)) == 1


def test_a_worker_that_outlives_its_controller_is_asked_to_stop(service: Service) -> None:
    search_id = service.submit()
    service.run(search_id, until=lambda _: any(step.request.get("rung") == 1 for step in service.executor.steps))
    orphan = next(step for step in service.executor.history if step.request.get("rung") == 1)
    service.expire_lease()

    service.run(search_id, until=lambda _: (Path(orphan.folder) / STOP).exists())

    assert execute(orphan).reason == "superseded"


def test_a_step_without_a_sign_of_life_is_said_to_wait_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "WAITING_SECONDS", 0.05)
    search_id = service.submit(sampler={"name": "random", "max_trials": 1})
    monkeypatch.setattr(service.executor, "wait", lambda timeout_seconds: [])
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)
    for pause in (0.0, 0.0, 0.1, 0.1):
        time.sleep(pause)
        controller.tick(timeout_seconds=0.0)

    (attempt,) = service.store.list_attempts(search_id)
    waiting = [event.data for event in service.store.list_events(search_id) if event.type == "attempt.waiting"]
    assert waiting == [{"attempt": attempt.id, "stage": "prepare", "trial": None, "rung": None, "reason": waiting[0]["reason"]}]
    assert waiting[0]["reason"].startswith("not begun yet")


def test_a_step_that_finished_under_a_dead_controller_is_not_run_again(service: Service) -> None:
    search_id = service.submit()
    service.run(search_id, until=lambda _: any(step.request.get("rung") == 1 for step in service.executor.steps))
    orphan = next(step for step in service.executor.history if step.request.get("rung") == 1)
    execute(orphan)
    service.expire_lease()

    search = service.run(search_id)

    assert search.state is SearchState.SUCCEEDED
    assert {attempt.id: attempt.state for attempt in service.store.list_attempts(search_id)}[orphan.key] is AttemptState.SUCCEEDED


@pytest.mark.parametrize("num_rungs", [1, 4, 7])
def test_a_search_that_was_interrupted_ends_like_one_that_was_not(service: Service, undisturbed: list[list[Any]], num_rungs: int) -> None:
    if not undisturbed:
        undisturbed.append(figures(service, service.run(service.submit())))
        service.expire_lease()
    search_id = service.submit()
    service.run(search_id, until=lambda record: len(service.store.list_rungs(record.id)) >= num_rungs)
    service.expire_lease()

    interrupted = service.run(search_id)

    assert figures(service, interrupted) == undisturbed[0]
    attempts = [(attempt.stage, attempt.trial, attempt.rung) for attempt in service.store.list_attempts(search_id) if attempt.state is AttemptState.SUCCEEDED]
    assert len(attempts) == len(set(attempts))


@pytest.fixture(scope="module")
def undisturbed() -> list[list[Any]]:
    """The figures of the search that nothing interrupted, once it was run."""
    return []


def figures(service: Service, search: SearchRecord) -> list[Any]:
    return [(row["number"], row["rank"], row["shape"], row["score"], row["kl"], row["loss"], row["state"]) for row in service.board(search)["rows"]]


def test_a_bug_in_one_search_fails_it_and_leaves_the_others_alone(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers import controller as module
    from workers.search_run import SearchRun

    monkeypatch.setattr(module, "TROUBLE_SECONDS", 0.05)
    broken, sound = service.submit(), service.submit(sampler={"name": "random", "max_trials": 1})
    next_action = SearchRun.next_action

    def raise_for_one(run: SearchRun) -> Any:
        if run.id == broken:
            raise ZeroDivisionError("a bug")
        return next_action(run)

    monkeypatch.setattr(SearchRun, "next_action", raise_for_one)

    search = service.run(sound)

    assert search.state is SearchState.SUCCEEDED
    failed = service.store.get_search(broken)
    assert failed.state is SearchState.FAILED
    assert failed.error == {"reason": "internal_error", "message": "ZeroDivisionError: a bug"}


def test_a_store_that_is_away_for_a_moment_fails_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers import controller as module

    monkeypatch.setattr(module, "TROUBLE_SECONDS", 0.05)
    search_id = service.submit(sampler={"name": "random", "max_trials": 1})
    record, away = service.store.record_rung, iter([True, False, True])

    def record_or_raise(*arguments: Any, **named: Any) -> Any:
        if next(away, False):
            raise OSError("connection reset")
        return record(*arguments, **named)

    monkeypatch.setattr(service.store, "record_rung", record_or_raise)

    assert service.run(search_id).state is SearchState.SUCCEEDED
    assert all(attempt.state is AttemptState.SUCCEEDED for attempt in service.store.list_attempts(search_id))


def test_a_store_that_refuses_one_searchs_writes_for_long_fails_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: what is small still fits, and a rung's result does not."""
    from workers import controller as module

    monkeypatch.setattr(module, "TROUBLE_SECONDS", 0.02)
    search_id = service.submit(sampler={"name": "random", "max_trials": 1})
    record, refusals = service.store.record_rung, iter(range(3 * module.MAX_TROUBLES))

    def record_or_raise(*arguments: Any, **named: Any) -> Any:
        if next(refusals, None) is not None:
            raise StoreUnavailable("the database does not answer")
        return record(*arguments, **named)

    monkeypatch.setattr(service.store, "record_rung", record_or_raise)

    assert service.run(search_id).state is SearchState.SUCCEEDED
    assert next(refusals, None) is None


def test_a_store_that_stays_away_ends_the_controller(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers import controller as module

    monkeypatch.setattr(module, "STORE_PATIENCE_SECONDS", 0.2)
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("connection refused")

    monkeypatch.setattr(service.store, "active_searches", refuse)

    with pytest.raises(OSError, match="connection refused"):
        controller.run()
    assert service.executor.closed


def test_a_search_whose_lease_is_lost_is_dropped_with_its_steps_and_the_others_go_on(service: Service) -> None:
    lost, kept = service.submit(), service.submit(seed=1)
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)
    while len(service.executor.steps) < 2:
        controller.tick(timeout_seconds=0.0)
        service.executor.wait = lambda timeout_seconds: []  # type: ignore[method-assign]
    service.expire_lease()
    assert service.store.claim(lost, owner="another", seconds=60) is not None
    events = service.store.list_events(lost)

    controller.tick(timeout_seconds=0.0)

    assert [step.folder.split("/")[-3] for step in service.executor.steps] == [kept]
    assert service.store.list_events(lost) == events
    assert set(controller._conductors) == {kept}


def test_a_search_is_dropped_when_a_write_is_refused_before_the_lease_was_looked_at(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    search_id = service.submit()
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)
    controller.tick(timeout_seconds=0.0)
    monkeypatch.setattr(service.store, "renew", lambda record, seconds: list(controller._membership.fences.values()))
    service.expire_lease()
    assert service.store.claim(search_id, owner="another", seconds=60) is not None

    while controller._conductors:
        controller.tick(timeout_seconds=0.0)

    assert service.executor.steps == []
    assert service.store.get_search(search_id).state is SearchState.PREPARING


def hang(service: Service, *, hangs: Callable[[Step], bool]) -> list[Step]:
    """Steps of which `hangs` says so beat once and never end; returns them as they come."""
    hung: list[Step] = []
    executor = service.executor

    def wait(*, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        for step in [step for step in executor.steps if hangs(step)]:
            executor.steps.remove(step)
            (Path(step.folder) / BEAT).write_text("0")
            hung.append(step)
        return InlineExecutor.wait(executor, timeout_seconds=timeout_seconds)

    executor.wait = wait  # type: ignore[method-assign]
    return hung


def test_a_step_that_falls_silent_is_run_again_and_what_it_says_later_is_not_heard(service: Service) -> None:
    search_id = service.submit()
    hung = hang(service, hangs=lambda step: step.request.get("rung") == 1 and not hung)
    settings = dataclasses.replace(service.settings, attempt_lease_seconds=0.3)
    zombie_ended: list[Outcome] = []

    def wake(_: SearchRecord) -> bool:
        if hung and not zombie_ended and len(service.store.list_attempts(search_id)) > 6:
            zombie_ended.append(execute(hung[0]))
            result = {**zombie_ended[0].as_dict(), "succeeded": True, "result": {"lies": 1}}
            (Path(hung[0].folder) / RESULT).write_text(json.dumps(result))
        return service.store.get_search(search_id).state.is_terminal

    search = dataclasses.replace(service, settings=settings).run(search_id, until=wake)

    assert search.state is SearchState.SUCCEEDED, search.error
    assert [outcome.reason for outcome in zombie_ended] == ["superseded"]
    attempts = {attempt.id: attempt for attempt in service.store.list_attempts(search_id)}
    lost = attempts[hung[0].key]
    assert (lost.state, lost.reason) == (AttemptState.LOST, "preempted: no sign of life for 0.3 s")
    assert service.executor.ran(trial=lost.trial or 0, rung=1) == 2
    assert [attempt.state for attempt in attempts.values() if attempt is not lost] == [AttemptState.SUCCEEDED] * (len(attempts) - 1)
    assert not any("lies" in rung.result for rung in service.store.list_rungs(search_id))


def test_a_step_that_is_lost_too_often_fails_as_preempted_and_the_search_goes_on(service: Service) -> None:
    search_id = service.submit(limits={"max_preemptions": 3, "max_attempts": 1})
    hung = hang(service, hangs=lambda step: is_rung(step, trial=1, rung=1))

    search = dataclasses.replace(service, settings=dataclasses.replace(service.settings, attempt_lease_seconds=0.1)).run(search_id)

    trial = service.store.get_trial(search_id, 1)
    assert search.state is SearchState.SUCCEEDED, search.error
    assert trial.state is TrialState.FAILED
    assert trial.failure is not None
    assert (trial.failure["reason"], trial.failure["attempts"], len(hung)) == ("preempted", 3, 3)


def test_a_controller_that_slept_gives_no_step_up_that_slept_with_it(service: Service) -> None:
    """A machine, or a container, that was stopped as a whole: only time in which the controller looked counts."""
    search_id = service.submit()
    clock = [0.0]
    hung = hang(service, hangs=lambda step: step.request.get("rung") == 1)
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings, clock=lambda: clock[0])
    while not hung:
        controller.tick(timeout_seconds=0.0)
    for seconds in (6.0, 6.0, 1000.0, 6.0):
        clock[0] += seconds
        controller.tick(timeout_seconds=0.0)
    assert service.store.list_attempts(search_id)[-1].state is AttemptState.RUNNING

    for _ in range(11):
        clock[0] += 6.0
        controller.tick(timeout_seconds=0.0)
    lost = [attempt for attempt in service.store.list_attempts(search_id) if attempt.state is AttemptState.LOST]
    assert {(attempt.id, attempt.reason) for attempt in lost} == {(hung[0].key, "preempted: no sign of life for 60 s")}


def test_a_point_that_is_not_finite_is_not_kept(service: Service) -> None:
    search_id = service.submit(sampler={"name": "random", "max_trials": 1})

    def report_infinity(step: Step) -> None:
        if step.request.get("rung") == 1:
            Path(step.folder).mkdir(parents=True, exist_ok=True)
            line = {"step": 1, "tokens": 7, "loss": math.inf, "learning_rate": 1.0, "tokens_per_second": 1.0}
            (Path(step.folder) / PROGRESS).write_text(json.dumps(line) + "\nnot json\n")

    service.executor.before = report_infinity

    assert service.run(search_id).state is SearchState.SUCCEEDED
    points = service.store.list_points(search_id, trial=0)
    assert points
    assert 7 not in [point.tokens for point in points]


def test_a_teacher_no_better_than_random_weights_is_refused_before_any_trial(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    save = service.store.save_prepared
    monkeypatch.setattr(service.store, "save_prepared", lambda search, facts, **named: save(search, {**facts, "teacher": facts["random"]}, **named))
    search_id = service.submit()

    search = service.run(search_id)

    assert search.state is SearchState.FAILED
    assert search.error is not None
    assert search.error["reason"] == "spec_refused"
    assert "a task on which the teacher is better than random weights by 2 standard errors" in search.error["message"]
    (weak,) = [event.data for event in service.store.list_events(search_id) if event.type == "task.weak"]
    assert (weak["task"], weak["in_objective"]) == ("choice", False)
    assert service.store.list_trials(search_id) == []


def test_two_searches_never_fill_one_prepared_folder_together(service: Service) -> None:
    first, second = service.submit(), service.submit()
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)
    for _ in range(3):
        controller.tick(timeout_seconds=0.0)
        assert sum(step.stage == "prepare" for step in service.executor.steps) <= 1
    assert {service.store.get_search(search_id).state for search_id in (first, second)} != {SearchState.QUEUED}


def test_a_search_that_starts_from_another_trains_no_shape_twice(service: Service) -> None:
    earlier = service.submit()
    won = service.run(earlier).winner
    assert won is not None
    stopped = next(trial for trial in service.store.list_trials(earlier) if trial.state is TrialState.STOPPED and trial.rung == 1)
    service.expire_lease()
    service.executor.history.clear()

    search_id = service.submit(warm_start_from=[earlier], shapes=[won["shape"], stopped.shape])
    search = service.run(search_id)

    assert search.state is SearchState.SUCCEEDED, search.error
    # The winner's student is still there; the stopped one goes on from the rung that it had reached.
    assert [service.executor.ran(trial=0, rung=rung) for rung in range(3)] == [0, 0, 0]
    assert [service.executor.ran(trial=1, rung=rung) for rung in range(3)] == [0, 0, 1]
    before = {row.rung: row.result for row in service.store.list_rungs(earlier, trial=won["trial"])}
    origin = {"search": earlier, "trial": won["trial"]}
    for row in service.store.list_rungs(search_id, trial=0):
        # Costs are those under the workload of the search that asks.
        assert row.result == before[row.rung] | {"seconds": {}, "reused_from": origin, "costs": row.result["costs"]}
    events = [event.data for event in service.store.list_events(search_id, after=0) if event.type == "trial.rung_finished" and event.data["trial"] == 0]
    assert [data["reused_from"] for data in events] == [origin] * 3
    confirmation = service.store.get_trial(search_id, 0).confirmation
    assert confirmation is not None
    assert confirmation["verified"]
    spec = parse_spec(json.dumps(search.spec))
    trained = [step for step in service.executor.history if step.stage == "rung" and step.request["rung"] > 0]
    from_start = [step for step in trained if step.request["rung"] == 2 and step.request["trial_folder"].endswith("/1")]
    tokens = spec.rungs.tokens(2) * len(from_start) + sum(spec.trained_tokens(step.request["rung"]) for step in trained if step not in from_start)
    board = service.board(search)
    assert board["cost"]["tokens"] == tokens


def test_a_shape_over_a_latency_ceiling_ends_at_rung_0_and_is_no_failure(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_costs(model: Any, **_: Any) -> dict[str, float]:
        return {"decode_ms:chat": 1.0 + (model.config.num_hidden_layers > 1), "prefill_ms:chat": 1.0}

    monkeypatch.setattr("nas.search.trial.measured_costs", fake_costs)
    chat = {"name": "chat", "prompt_tokens": 4, "new_tokens": 2, "max_decode_ms": 1.5}
    space = {"num_hidden_layers": {"min": 1}}
    search = service.run(service.submit(budget={"max_fraction": 0.9, "latency": [chat]}, space=space, limits={"max_failed_trials": 1}))

    trials = {trial.number: trial for trial in service.store.list_trials(search.id)}
    dear = [trial for trial in trials.values() if trial.shape["num_hidden_layers"] > 1]
    assert search.state is SearchState.SUCCEEDED
    assert search.winner is not None
    assert trials[search.winner["trial"]].shape["num_hidden_layers"] == 1
    assert dear
    assert {(trial.state, trial.rung) for trial in dear} == {(TrialState.STOPPED, 0)}
    assert {trial.failure["message"] for trial in dear if trial.failure} == {"decode_ms:chat: expected at most 1.5 ms, got 2 ms"}
    rows = {row["number"]: row["costs"] for row in service.board(search)["rows"]}
    assert all({"parameters", "memory_bytes", "flops_per_token", "decode_ms:chat", "prefill_ms:chat"} == costs.keys() for costs in rows.values())


def test_a_search_whose_shapes_are_all_too_slow_says_so(service: Service) -> None:
    chat = {"name": "chat", "prompt_tokens": 4, "new_tokens": 2, "max_prefill_ms": 1e-6}
    search = service.run(service.submit(budget={"max_fraction": 0.7, "latency": [chat]}, sampler={"max_trials": 1}))

    assert search.state is SearchState.FAILED
    assert search.error is not None
    assert search.error["reason"] == "no_trial_completed"
    assert "over a measured ceiling (trial 0: prefill_ms:chat: expected at most 1e-06 ms" in search.error["message"]


def test_a_family_has_a_winner_and_a_bundle_for_each_budget(service: Service) -> None:
    """The first budget's board is the search's; each of the others has its own board, ranks and winner."""
    search = service.run(service.submit(budget={"max_fraction": 0.8}, more_budgets=[{"max_fraction": 0.5}], sampler={"name": "random", "max_trials": 2}))

    assert search.state is SearchState.SUCCEEDED, search.error
    board = service.board(search)
    assert search.winner is not None
    trials = {trial.number: trial for trial in service.store.list_trials(search.id)}
    boards = [board, *board["more_budgets"]]
    winners = all_winners(search)
    assert [winner["budget"] for winner in winners] == [0, 1]
    assert [winner["trial"] for winner in winners] == board["winners"] == [its["winner"] for its in boards]
    for budget, (its, winner) in enumerate(zip(boards, winners, strict=True)):
        assert {trials[row["number"]].budget for row in its["rows"]} == {budget}
        assert its["rows"][0]["rank"] == 1
        assert (service.settings.data_folder / winner["bundle"]).is_file()
        assert its["importances"] == winner["importances"]
    told = [event.data for event in service.store.list_events(search.id, limit=10_000) if event.type == "search.winner"]
    assert told == [{"trial": winner["trial"], "budget": winner["budget"]} for winner in winners]
    assert winners[1]["parameters"] <= 0.5 * search.plan["teacher_parameters"] < winners[0]["parameters"]
    assert board["cost"]["decisions"][0]["trials"] == len(trials)


def test_with_several_objectives_the_whole_front_is_confirmed_and_the_winner_scores_best_of_the_finalists(service: Service) -> None:
    search = service.run(
        service.submit(objectives=["parameters"], sampler={"name": "nsga2", "max_trials": 6, "num_startup_trials": 2}, rungs={**RUNGS, "keep": 1.0})
    )

    assert search.state is SearchState.SUCCEEDED, search.error
    board = service.board(search)
    assert search.winner is not None
    rows = {row["number"]: row for row in board["rows"]}
    front = board["pareto"]
    assert len(front) >= 1
    assert all(rows[number]["confirmation"]["verified"] for number in front)
    assert [rows[number]["parameters"] for number in front] == sorted(rows[number]["parameters"] for number in front)
    assert search.winner["trial"] in board["finalists"]


def test_a_failed_trial_says_its_last_lines_when_its_files_are_gone(service: Service) -> None:
    search_id = service.submit(limits={"max_attempts": 1})

    def fail(step: Step) -> Outcome | None:
        if not is_rung(step, trial=0, rung=1):
            return None
        Path(step.folder).mkdir(parents=True, exist_ok=True)
        (Path(step.folder) / LOG).write_text("".join(f"line {number}\n" for number in range(100)), encoding="utf-8")
        return Outcome(succeeded=False, reason="worker_died", message="process ended with code -11")

    service.executor.before = fail
    ended = {"stage": "rung", "state": "failed", "reason": "worker_died"}
    before = REGISTRY.get_sample_value("nas_attempts_ended_total", ended) or 0.0
    service.run(search_id)
    shutil.rmtree(service.folder(search_id))

    assert REGISTRY.get_sample_value("nas_attempts_ended_total", ended) == before + 1
    assert (REGISTRY.get_sample_value("nas_device_seconds_total", {"stage": "rung"}) or 0.0) > 0

    failure = service.store.get_trial(search_id, 0).failure
    assert failure is not None
    assert failure["log"].splitlines() == [f"line {number}" for number in range(80, 100)]
    logs = {attempt.id: service.store.read_log(attempt.id) for attempt in service.store.list_attempts(search_id)}
    assert all(log is not None for log in logs.values()), "an attempt without a log"
    assert all("begins" in log.text and f"attempt_id={key}" in log.text for key, log in logs.items() if log and "line 99" not in log.text)


# -- chains: the teacher is the winner of another search -------------------------------------------------------------------------


def test_a_search_waits_for_its_teacher_to_win_and_then_prunes_it_again(service: Service) -> None:
    first = service.submit(sampler={"name": "random", "max_trials": 1})
    tasks = [{"name": "choice", "insist": True}]  # a tiny winner knows next to nothing
    second = service.submit(teacher=first, tasks=tasks, budget={"max_fraction": 0.9}, sampler={"name": "random", "max_trials": 1})

    service.run(first)
    waiting = service.store.get_search(second)
    assert (waiting.state, waiting.started_at) == (SearchState.QUEUED, None)
    service.expire_lease()
    search = service.run(second)

    assert search.state is SearchState.SUCCEEDED, search.error
    won, again = service.store.get_search(first).winner, search.winner
    assert won is not None
    assert again is not None
    bundle = (service.settings.data_folder / won["bundle"]).with_suffix("")
    assert search.inputs["teacher"]["digest"] == won["as_teacher"]["digest"] == check_teacher(bundle).digest
    assert search.plan["teacher_parameters"] == won["parameters"]
    assert again["parameters"] <= search.plan["max_parameters"] == math.floor(0.9 * won["parameters"])
    assert again["provenance"]["teacher"] == {"name": first, "digest": won["as_teacher"]["digest"]}
    assert [event.data for event in service.store.list_events(second) if event.type == "search.teacher_known"] == [
        {"search": first, "parameters": won["parameters"]}
    ]


def test_a_search_whose_teacher_never_wins_fails_and_says_so(service: Service) -> None:
    first = service.submit()
    waiting = service.submit(teacher=first)
    chained = service.submit(teacher=waiting)
    service.store.request_cancel(first)

    search = service.run(chained)

    assert [service.store.get_search(search_id).state for search_id in (waiting, chained)] == [SearchState.FAILED] * 2
    assert search.error is not None
    assert search.error["reason"] == "teacher_unavailable"
    assert waiting in search.error["message"]


def test_a_waiting_search_is_paused_and_cancelled_as_any_that_is_queued(service: Service) -> None:
    first = service.submit()
    service.store.request_pause(first)
    waiting = service.submit(teacher=first)
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)
    for _ in range(3):
        controller.tick(timeout_seconds=0.0)
    assert service.store.get_search(waiting).state is SearchState.QUEUED

    assert service.store.request_pause(waiting).state is SearchState.PAUSED
    controller.tick(timeout_seconds=0.0)
    assert service.store.request_cancel(waiting).state is SearchState.CANCELLED
    assert service.executor.history == []


def test_what_the_winner_cannot_be_pruned_to_fails_the_search_that_waited(service: Service) -> None:
    first = service.submit(sampler={"name": "random", "max_trials": 1})
    largest = service.store.get_search(first).plan["budgets"][0]["space"]["largest"]["parameters"]
    second = service.submit(teacher=first, budget={"max_parameters": largest - 1})

    search = service.run(second)

    won = service.store.get_search(first).winner
    assert won is not None
    assert won["parameters"] < largest - 1, "the case that is tested"
    assert search.error is not None
    assert search.error["reason"] == "spec_refused"
    assert "budget.max_parameters" in search.error["message"]
