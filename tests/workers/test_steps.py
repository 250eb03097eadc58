"""Steps under the real controller: tried, judged, lost, waited for, stopped; workers are replaced by this process."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from nas.store.records import AttemptRecord, AttemptState, SearchRecord, SearchState, TrialState
from tests.workers.inline_service import Service, hang, is_rung
from workers import watch as watch_module
from workers.conductor import Conductor
from workers.controller import Controller
from workers.liveness import STOP
from workers.logs import LOG
from workers.metrics import REGISTRY
from workers.outcome import RESULT, Outcome
from workers.step import PROGRESS, Step, execute
from workers.verdicts import Undecided


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


def test_a_result_that_cannot_be_checked_keeps_no_cancel_waiting(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student behind a URL that does not answer is not counted; the search ends all the same."""
    monkeypatch.setattr(watch_module, "CANCEL_GRACE_SECONDS", 0.2)
    asked: list[str] = []

    def away(conductor: Conductor, attempt: AttemptRecord, result: dict[str, Any]) -> None:
        if attempt.stage == "rung":
            asked.append(attempt.id)
            raise Undecided

    monkeypatch.setattr(Conductor, "check_result", away)
    search_id = service.submit()
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)
    deadline = time.monotonic() + 60
    while not asked:
        assert time.monotonic() < deadline, "no result of a rung"
        controller.tick(timeout_seconds=0.0)

    service.store.request_cancel(search_id)
    while not service.store.get_search(search_id).state.is_terminal:
        assert time.monotonic() < deadline, "the cancel waits for ever"
        controller.tick(timeout_seconds=0.05)

    assert service.store.get_search(search_id).state is SearchState.CANCELLED
    assert service.store.list_rungs(search_id) == []
