"""The controller: the one process that leads. It proposes, dispatches, records and recovers; only it writes trials into the store.

Every tick: renew the lease, adopt new searches, collect what ended, pass on progress, start what should run next. All of
its memory can be rebuilt from the store and the searches' folders, which is what a restart does.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nas.cost import count_parameters
from nas.errors import InvalidSpec
from nas.search.prepare import prepared_key
from nas.search.ranking import CONTROL, board_as_dict
from nas.search.results import RungResult
from nas.search.trial import clear_below
from nas.settings import Settings
from nas.store.records import AttemptRecord, AttemptState, PointRecord, SearchRecord, SearchState, TrialState
from nas.store.store import Store
from workers.executor import Executor
from workers.search_run import Advance, NewTrial, SearchRun
from workers.step import PROGRESS, STOP, Outcome, Step, read_outcome

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.25
CANCEL_GRACE_SECONDS = 10.0
"""A step that was asked to stop and has not is killed after this long."""


@dataclass(slots=True, kw_only=True)
class Running:
    """A step in flight."""

    attempt: AttemptRecord
    folder: Path
    started: float
    """time.monotonic()"""
    read_bytes: int = 0
    """How much of its progress file was passed on."""
    stop_asked: float | None = None
    killed: str | None = None
    """Why we ended it by force."""


@dataclass(slots=True, kw_only=True)
class Adopted:
    """A search that this controller runs."""

    run: SearchRun
    record: SearchRecord
    running: dict[str, Running] = field(default_factory=dict)
    confirmations: dict[int, dict[str, Any]] = field(default_factory=dict)


class Controller:
    """Owns the searches while it leads; `run` returns when it is asked to stop, or when it no longer leads."""

    def __init__(self, *, store: Store, executor: Executor, settings: Settings) -> None:
        self._store = store
        self._executor = executor
        self._settings = settings
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._fence: int | None = None
        self._renewed = 0.0
        self._adopted: dict[str, Adopted] = {}
        self._stopping = False

    def stop(self) -> None:
        """Ask `run` to return after the current tick; running steps are lost, and resumed by the next controller."""
        self._stopping = True

    def run(self) -> None:
        """Wait for leadership, recover, then tick."""
        while not self._stopping and not self._lead():
            time.sleep(min(1.0, self._settings.lease_seconds / 4))
        if not self._stopping:
            self._recover()
        while not self._stopping and self._lead():
            self.tick()
        self._executor.close()
        if self._fence is not None and self._stopping:
            self._store.release_leadership(self._fence)

    def tick(self, *, timeout_seconds: float = TICK_SECONDS) -> None:
        """One round of the loop."""
        for key, outcome in self._executor.wait(timeout_seconds=timeout_seconds) if self._any_running() else self._idle(timeout_seconds):
            self._settle(key, outcome)
        active = {record.id: record for record in self._store.active_searches()}
        for search_id in [search_id for search_id in self._adopted if search_id not in active]:
            del self._adopted[search_id]
        for record in active.values():
            adopted = self._adopt(record)
            if adopted is not None:
                self._pass_on_progress(adopted)
                self._enforce_limits(adopted)
                self._advance(adopted)

    def _any_running(self) -> bool:
        return any(adopted.running for adopted in self._adopted.values())

    @staticmethod
    def _idle(seconds: float) -> list[tuple[str, Outcome]]:
        time.sleep(seconds)
        return []

    # -- leadership and recovery -------------------------------------------------------------------------------------------

    def _lead(self) -> bool:
        now = time.monotonic()
        if self._fence is None:
            self._fence = self._store.claim_leadership(self._owner, seconds=self._settings.lease_seconds)
            if self._fence is not None:
                logger.info("leading", extra={"action": "lead", "owner": self._owner, "token": self._fence})
        elif now - self._renewed > self._settings.lease_seconds / 4 and not self._store.renew_leadership(self._fence, seconds=self._settings.lease_seconds):
            logger.error("no longer leading", extra={"action": "lead_lost", "owner": self._owner})
            return False
        else:
            return True
        self._renewed = now
        return self._fence is not None

    def _recover(self) -> None:
        """Take over from a controller that died: keep what its steps finished, count nothing else against them."""
        for record in self._store.active_searches():
            adopted = self._adopt(record)
            if adopted is None:
                continue
            for attempt in self._store.list_attempts(record.id):
                if attempt.state == AttemptState.RUNNING and (outcome := read_outcome(self._attempt_folder(attempt))) is not None:
                    adopted.running[attempt.id] = Running(attempt=attempt, folder=self._attempt_folder(attempt), started=time.monotonic())
                    self._settle(attempt.id, outcome)
        lost = self._store.lose_running_attempts(fence=self._fence)
        if lost:
            logger.warning("resuming %d lost attempts", len(lost), extra={"action": "recover", "attempts": [attempt.id for attempt in lost]})
        self._adopted.clear()  # read again: the lost attempts' trials wait once more

    def _adopt(self, record: SearchRecord) -> Adopted | None:
        adopted = self._adopted.get(record.id)
        if adopted is None:
            try:
                run = SearchRun(record, trials=self._store.list_trials(record.id), rungs=self._store.list_rungs(record.id))
            except InvalidSpec as invalid:
                # It was valid when it was submitted: this version of the code no longer takes it.
                self._fail(record.id, reason="spec_refused", message=str(invalid))
                return None
            confirmations = {trial.number: trial.confirmation for trial in run.trials.values() if trial.confirmation is not None}
            adopted = self._adopted[record.id] = Adopted(run=run, record=record, confirmations=confirmations)
        adopted.record = record
        return adopted

    # -- what ended --------------------------------------------------------------------------------------------------------

    def _settle(self, key: str, outcome: Outcome) -> None:
        """Record how a step ended, and decide whether it is tried again."""
        adopted = next((adopted for adopted in self._adopted.values() if key in adopted.running), None)
        if adopted is None:
            logger.warning("outcome of an unknown step", extra={"action": "outcome_ignored", "key": key})
            return
        self._pass_on_progress(adopted)
        running = adopted.running.pop(key)
        attempt = running.attempt
        if outcome.succeeded and outcome.result is not None:
            self._record(adopted, attempt, outcome.result)
            return
        reason = running.killed or outcome.reason or "error"
        cancelled = adopted.record.state == SearchState.CANCELLING
        state = AttemptState.CANCELLED if cancelled else AttemptState.LOST if reason == "stopped" else AttemptState.FAILED
        self._store.finish_attempt(attempt.id, state=state, reason=f"{reason}: {outcome.message}"[:4000], fence=self._fence)
        logger.warning(
            "attempt failed: %s", reason, extra={"action": "attempt_failed", "search_id": adopted.run.id, "attempt_id": attempt.id, "reason": reason}
        )
        tries = self._store.counted_attempts(adopted.run.id, stage=attempt.stage, trial=attempt.trial, rung=attempt.rung)
        if cancelled or (outcome.retryable and tries < adopted.run.spec.limits.max_attempts):
            if attempt.stage == "rung" and attempt.trial is not None:
                self._change_trial(adopted, attempt.trial, to=TrialState.WAITING)
            return
        self._give_up(adopted, attempt, reason=reason, message=outcome.message, tries=tries)

    def _record(self, adopted: Adopted, attempt: AttemptRecord, result: dict[str, Any]) -> None:
        search_id, number = adopted.run.id, attempt.trial
        match attempt.stage:
            case "prepare":
                self._store.finish_attempt(attempt.id, state=AttemptState.SUCCEEDED, reason=None, fence=self._fence)
                self._store.save_prepared(search_id, result, fence=self._fence)
                self._store.change_search(search_id, fence=self._fence, to=SearchState.SEARCHING, expected=[SearchState.PREPARING])
            case "rung":
                assert number is not None
                rung_result = RungResult.from_dict(result)
                state = TrialState.COMPLETED if rung_result.rung == adopted.run.last_rung else TrialState.WAITING
                self._store.record_rung(
                    attempt.id, search_id=search_id, trial=number, rung=rung_result.rung, result=result, trial_state=state, fence=self._fence
                )
                adopted.run.trials[number] = self._store.get_trial(search_id, number)
                adopted.run.add_result(number, rung_result)
                clear_below(self._trial_folder(search_id, number), rung=rung_result.rung)
                self._stop_left_behind(adopted)
                self._save_board(adopted)
            case "confirm":
                assert number is not None
                result = {**result, "held_out": _without_documents(result["held_out"])}
                self._store.save_confirmation(attempt.id, search_id=search_id, trial=number, confirmation=result, fence=self._fence)
                adopted.confirmations[number] = result
                self._save_board(adopted)
            case "bundle":
                self._store.finish_attempt(attempt.id, state=AttemptState.SUCCEEDED, reason=None, fence=self._fence)
                winner = {**result, "bundle": str(Path(result["bundle"]).relative_to(self._settings.data_folder))}
                self._store.save_winner(search_id, winner, fence=self._fence)
                self._store.change_search(search_id, fence=self._fence, to=SearchState.SUCCEEDED, expected=[SearchState.CONFIRMING])

    def _give_up(self, adopted: Adopted, attempt: AttemptRecord, *, reason: str, message: str, tries: int) -> None:
        """A step failed for good: a rung fails its trial, a confirmation leaves its trial unverified, the others fail the search."""
        if attempt.stage == "confirm" and attempt.trial is not None:
            confirmation = {"verified": False, "reason": f"{reason}: {message}"[:2000]}
            self._store.save_confirmation(None, search_id=adopted.run.id, trial=attempt.trial, confirmation=confirmation, fence=self._fence)
            adopted.confirmations[attempt.trial] = confirmation
        elif attempt.stage == "rung" and attempt.trial is not None:
            failure = {"stage": f"rung {attempt.rung}", "reason": reason, "message": message[:2000], "attempts": tries}
            self._change_trial(adopted, attempt.trial, to=TrialState.FAILED, failure=failure)
            failed = [trial for trial in adopted.run.trials.values() if trial.state == TrialState.FAILED]
            if len(failed) >= adopted.run.spec.limits.max_failed_trials:
                reasons = "; ".join(f"trial {trial.number}: {(trial.failure or {}).get('reason')}" for trial in failed[:3])
                self._fail(adopted.run.id, reason="too_many_failed_trials", message=f"{len(failed)} trials failed ({reasons})")
            self._stop_left_behind(adopted)
        else:
            self._fail(adopted.run.id, reason=reason, message=f"{attempt.stage}: {message}"[:4000])

    def _fail(self, search_id: str, *, reason: str, message: str) -> None:
        logger.error("search failed: %s", reason, extra={"action": "search_failed", "search_id": search_id, "reason": reason})
        expected = [SearchState.QUEUED, SearchState.PREPARING, SearchState.SEARCHING, SearchState.CONFIRMING]
        self._store.change_search(search_id, fence=self._fence, to=SearchState.FAILED, expected=expected, error={"reason": reason, "message": message})
        adopted = self._adopted.pop(search_id, None)
        for key, running in adopted.running.items() if adopted else ():
            self._store.finish_attempt(running.attempt.id, state=AttemptState.CANCELLED, reason="search failed", fence=self._fence)
            self._executor.kill(key)

    # -- what runs ---------------------------------------------------------------------------------------------------------

    def _pass_on_progress(self, adopted: Adopted) -> None:
        """Learning curves and prepare steps, from the steps' progress files into the store."""
        points: list[PointRecord] = []
        for running in adopted.running.values():
            path = running.folder / PROGRESS
            if not path.exists() or path.stat().st_size == running.read_bytes:
                continue
            with path.open("rb") as file:
                file.seek(running.read_bytes)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]  # the last line may still be being written
            running.read_bytes += len(whole)
            for line in (json.loads(line) for line in whole.splitlines()):
                attempt = running.attempt
                if "tokens" in line and attempt.trial is not None and attempt.rung is not None:
                    names = ("tokens", "loss", "learning_rate", "tokens_per_second")
                    points.append(PointRecord(search_id=adopted.run.id, trial=attempt.trial, rung=attempt.rung, **{name: line[name] for name in names}))
                elif "step" in line:
                    self._store.add_event(adopted.run.id, f"{attempt.stage}.step", {"step": line["step"]}, fence=self._fence)
        if points:
            self._store.add_points(points, fence=self._fence)

    def _enforce_limits(self, adopted: Adopted) -> None:
        """Stop what was cancelled, and kill what does not stop or takes too long."""
        now = time.monotonic()
        for key, running in adopted.running.items():
            if adopted.record.state == SearchState.CANCELLING and running.stop_asked is None:
                (running.folder / STOP).touch()
                running.stop_asked = now
            overdue = now - running.started > adopted.run.spec.limits.max_rung_seconds
            ignored = running.stop_asked is not None and now - running.stop_asked > CANCEL_GRACE_SECONDS
            if running.killed is None and (overdue or ignored):
                running.killed = "timeout" if overdue else "stopped"
                self._executor.kill(key)

    # -- what is next ------------------------------------------------------------------------------------------------------

    def _advance(self, adopted: Adopted) -> None:
        match adopted.record.state:
            case SearchState.QUEUED:
                self._store.change_search(adopted.run.id, fence=self._fence, to=SearchState.PREPARING, expected=[SearchState.QUEUED])
            case SearchState.PREPARING:
                key = prepared_key(adopted.run.spec, inputs=adopted.run.inputs)
                if not adopted.running and key not in self._preparing():
                    self._start(adopted, stage="prepare", request={})
            case SearchState.SEARCHING:
                self._search(adopted)
            case SearchState.CONFIRMING:
                self._confirm(adopted)
            case SearchState.CANCELLING if not adopted.running:
                for trial in adopted.run.trials.values():
                    if not trial.state.is_terminal:
                        self._change_trial(adopted, trial.number, to=TrialState.CANCELLED)
                self._store.change_search(adopted.run.id, fence=self._fence, to=SearchState.CANCELLED, expected=[SearchState.CANCELLING])
            case _:
                pass

    def _preparing(self) -> set[str]:
        """Prepared folders that are being filled now: two searches never fill one together."""
        return {
            prepared_key(other.run.spec, inputs=other.run.inputs)
            for other in self._adopted.values()
            if any(running.attempt.stage == "prepare" for running in other.running.values())
        }

    def _search(self, adopted: Adopted) -> None:
        run = adopted.run
        while len(adopted.running) < run.spec.resources.max_parallel_trials:
            action = run.next_action()
            if isinstance(action, NewTrial):
                self._propose(adopted, action)
            elif isinstance(action, Advance):
                self._start_rung(adopted, action)
            else:
                break
        if adopted.running:
            return
        self._stop_left_behind(adopted)
        if run.is_finished():
            if not any(trial.state == TrialState.COMPLETED for trial in run.trials.values()):
                self._fail(run.id, reason="no_trial_completed", message="no trial reached the last rung; see the trials' failures")
                return
            self._store.change_search(run.id, fence=self._fence, to=SearchState.CONFIRMING, expected=[SearchState.SEARCHING])

    def _propose(self, adopted: Adopted, new: NewTrial) -> None:
        run = adopted.run
        number = len(run.trials)
        run.trials[number] = self._store.add_trial(
            run.id,
            number=number,
            origin=new.origin,
            shape=new.shape.as_dict(),
            choices=new.choices.as_dict() if new.choices else None,
            parameters=count_parameters(run.space.architecture, new.shape).total,
            fence=self._fence,
        )

    def _start_rung(self, adopted: Adopted, action: Advance) -> None:
        run = adopted.run
        request = {"shape": run.trials[action.trial].shape, "rung": action.rung, "trial_folder": str(self._trial_folder(run.id, action.trial))}
        self._start(adopted, stage="rung", trial=action.trial, rung=action.rung, request=request)
        run.trials[action.trial] = self._store.get_trial(run.id, action.trial)

    def _confirm(self, adopted: Adopted) -> None:
        """Confirm every finalist, then bundle the first verified one that is not a control."""
        run = adopted.run
        board = run.board(adopted.record.prepared or {})
        finalists = run.finalists(board)
        busy = {running.attempt.trial for running in adopted.running.values()}
        for number in finalists:
            if len(adopted.running) >= run.spec.resources.max_parallel_trials:
                return
            if number not in adopted.confirmations and number not in busy:
                trial = run.trials[number]
                request = {"shape": trial.shape, "trial_folder": str(self._trial_folder(run.id, number)), "with_reload": trial.origin != CONTROL}
                self._start(adopted, stage="confirm", trial=number, request=request)
        if adopted.running:
            return
        winner = self._winner(adopted, finalists)
        if winner is None:
            reasons = "; ".join(f"trial {number}: {adopted.confirmations[number].get('reason')}" for number in finalists[:3])
            self._fail(run.id, reason="no_finalist_verified", message=reasons)
            return
        self._start(adopted, stage="bundle", trial=winner, request=self._bundle_request(adopted, winner))

    def _winner(self, adopted: Adopted, finalists: list[int]) -> int | None:
        searched = [number for number in finalists if adopted.run.trials[number].origin != CONTROL]
        return next((number for number in searched if adopted.confirmations[number]["verified"]), None)

    def _bundle_request(self, adopted: Adopted, number: int) -> dict[str, Any]:
        run = adopted.run
        return {
            "search_id": run.id,
            "trial": number,
            "shape": run.trials[number].shape,
            "trial_folder": str(self._trial_folder(run.id, number)),
            "bundle_folder": str(self._settings.searches_folder / run.id / "winner"),
            "result": {**run.results[number][run.last_rung].as_dict(), "documents": None},
            "confirmation": adopted.confirmations[number],
            "board": adopted.record.board,
        }

    def _start(self, adopted: Adopted, *, stage: Any, request: dict[str, Any], trial: int | None = None, rung: int | None = None) -> None:
        run = adopted.run
        attempt = self._store.start_attempt(run.id, stage=stage, trial=trial, rung=rung, fence=self._fence)
        folder = self._attempt_folder(attempt)
        prepared = self._settings.prepared_folder / prepared_key(run.spec, inputs=run.inputs)
        step = Step(
            key=attempt.id,
            stage=stage,
            folder=str(folder),
            request={"spec": adopted.record.spec, "inputs": run.inputs, "prepared": str(prepared), **request},
            cpus=run.spec.resources.cpus,
            gpus=run.spec.resources.gpus,
        )
        adopted.running[attempt.id] = Running(attempt=attempt, folder=folder, started=time.monotonic())
        self._executor.start(step)

    def _stop_left_behind(self, adopted: Adopted) -> None:
        for number in adopted.run.left_behind():
            self._change_trial(adopted, number, to=TrialState.STOPPED)
            shutil.rmtree(self._trial_folder(adopted.run.id, number), ignore_errors=True)

    def _change_trial(self, adopted: Adopted, number: int, *, to: TrialState, failure: dict[str, Any] | None = None) -> None:
        adopted.run.trials[number] = self._store.change_trial(adopted.run.id, number, to=to, failure=failure, fence=self._fence)

    def _save_board(self, adopted: Adopted) -> None:
        prepared = self._store.get_search(adopted.run.id).prepared
        if prepared is None:
            return
        board = board_as_dict(adopted.run.board(prepared))
        for row in board["rows"]:
            row["confirmation"] = adopted.confirmations.get(row["number"])
        board["teacher"] = _baseline(prepared, "teacher")
        board["random"] = _baseline(prepared, "random")
        board["cost"] = self._cost(adopted, prepared)
        self._store.save_board(adopted.run.id, board, fence=self._fence)

    def _cost(self, adopted: Adopted, prepared: dict[str, Any]) -> dict[str, Any]:
        """Tokens distilled and seconds on the workers, by step: what the decision cost."""
        spec = adopted.run.spec
        seconds: dict[str, float] = {"prepare": sum(prepared.get("seconds", {}).values())}
        tokens = 0
        for results in adopted.run.results.values():
            tokens += max(result.tokens for result in results.values())
            for result in results.values():
                for name, value in result.seconds.items():
                    seconds[name] = seconds.get(name, 0.0) + value
        return {"tokens": tokens, "seconds": seconds, "cpus": spec.resources.cpus, "gpus": spec.resources.gpus}

    # -- places ------------------------------------------------------------------------------------------------------------

    def _trial_folder(self, search_id: str, number: int) -> Path:
        return self._settings.searches_folder / search_id / "trials" / str(number)

    def _attempt_folder(self, attempt: AttemptRecord) -> Path:
        return self._settings.searches_folder / attempt.search_id / "attempts" / attempt.id


def _without_documents(result: dict[str, Any]) -> dict[str, Any]:
    """A result's numbers without the long lists."""

    def short(metric: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in metric.items() if name != "documents"}

    return {
        **{name: value for name, value in result.items() if name != "details"},
        "kl": short(result["kl"]),
        "loss": short(result["loss"]),
        "tasks": {name: short(metric) for name, metric in result["tasks"].items()},
    }


def _baseline(prepared: dict[str, Any], name: str) -> dict[str, Any]:
    return {"search": _without_documents(prepared[name]), "held_out": _without_documents(prepared[f"{name}_held_out"])}
