"""Carries out one full distillation: one step, tried until it succeeds or is given up. To the controller it is as a search is to a `Conductor`.

Everything follows from the store: a result that is kept ends it, whatever else was written before a crash.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from nas.distillations import DistillationRequest, parse_distillation, winner_of
from nas.errors import Conflict, NotFound
from nas.search.layout import BUNDLE, prepared_key
from nas.spec import parse_spec
from nas.store.records import WORKING, ActiveSearch, AttemptRecord, AttemptState, SearchRecord, SearchState
from nas.trial_files import bundle_request, find_tree
from workers import metrics
from workers.folders import OWN_BUNDLE, SearchFolder
from workers.logs import LogKeeper, last_lines, read_tail
from workers.step import Outcome, Step
from workers.tries import BEATS_PER_LEASE, begin, find_spent, judge
from workers.verdicts import Untrue, check_distilled
from workers.watch import Leader, Running, Watch

logger = logging.getLogger(__name__)


class Distilling:
    """One full distillation of this controller."""

    is_preparing = False
    prepared_key = ""

    def __init__(self, record: SearchRecord, *, leader: Leader) -> None:
        self.record = record
        self._leader, self._store, self._fence = leader, leader.store, leader.fence
        self._spec: DistillationRequest = parse_distillation(json.dumps(record.spec))
        self._limits = self._spec.limits.of_step()
        self.folder = SearchFolder.of(record.id, settings=leader.settings)
        self._watch = Watch(record.id, leader=leader, folder=self.folder)
        self.running = self._watch.running
        self.ended: dict[str, Outcome] = {}
        """Outcomes of steps that wait to be recorded."""
        self._logs = LogKeeper(record.id, store=self._store, fence=self._fence, clock=leader.clock)

    def reload(self) -> None:
        """Read it from the store again; attempts that run there and not here are lost."""
        self.record = self._store.get_search(self.record.id)
        for attempt in self._store.list_attempts(self.record.id):
            if attempt.state is AttemptState.RUNNING and attempt.id not in self.running:
                log = read_tail(self.folder.attempt(attempt.id))
                self._store.finish_attempt(attempt.id, state=AttemptState.LOST, reason="the controller does not know its step", log=log, fence=self._fence)

    def resume(self, attempt: AttemptRecord, outcome: Outcome) -> None:
        """Take over a step that ended under another controller."""
        self._watch.add(attempt)
        self.ended[attempt.id] = outcome

    def note(self, active: ActiveSearch) -> None:
        """It as the store has it now: a user may have cancelled it."""
        if active.state is not self.record.state:
            self.record = replace(self.record, state=active.state)

    def drop(self) -> None:
        """It is another controller's: end what runs of it here, and write nothing more."""
        for key in self.running:
            self._leader.executor.kill(key)
        self.running.clear()
        self.ended.clear()

    def advance(self, *, may_prepare: Callable[[], bool]) -> None:
        """Pass on progress, enforce limits, and start what should run next."""
        self._watch.follow()
        self._logs.keep({key: running.progress.folder for key, running in self.running.items()})
        if self.record.state is SearchState.CANCELLING:
            self._watch.stop("cancelled")
        for key, outcome in {**self._watch.enforce(self._limits), **self._watch.listen(ended=self.ended)}.items():
            self.ended.setdefault(key, outcome)
        match self.record.state:
            case SearchState.QUEUED:
                self._move(SearchState.RUNNING)
            case SearchState.RUNNING | SearchState.CANCELLING if self.record.winner is not None:
                self._end(SearchState.SUCCEEDED)
            case SearchState.RUNNING if not self.running:
                self._start()
            case SearchState.CANCELLING if not self.running:
                self._end(SearchState.CANCELLED)
            case _:
                pass

    # -- what ended --------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Record how its step ended; one whose outcome cannot be recorded now stays to be recorded later."""
        for key, outcome in list(self.ended.items()):
            try:
                self._settle(self.running[key], outcome)
            except Conflict as conflict:
                # An earlier try, or another controller, got as far as the store.
                logger.warning("outcome not recorded: %s", conflict, extra={"action": "outcome_ignored", "search_id": self.record.id, "attempt_id": key})
                del self.running[key], self.ended[key]
                self.reload()
            else:
                del self.running[key], self.ended[key]

    def _settle(self, running: Running, outcome: Outcome) -> None:
        self._watch.pass_on([running])
        attempt, log = running.attempt, read_tail(running.progress.folder)
        seconds = self._device_seconds(running)
        if outcome.succeeded and outcome.result is not None:
            result = outcome.result
            try:
                check_distilled(result, recipe=self.record.spec["recipe"], folders=self.folder)
            except Untrue as untrue:
                outcome = Outcome(succeeded=False, reason="invalid_result", message=str(untrue))
            else:
                self._keep(attempt, result, log=log, seconds=seconds)
                self._count_end(AttemptState.SUCCEEDED, reason="", seconds=seconds)
                return
        elif running.killed is not None:
            outcome = running.killed
        ending = judge(running, outcome, is_cancelling=self.record.state is SearchState.CANCELLING)
        if ending.reason == "disk_full" and ending.state is AttemptState.LOST:
            ending = replace(ending, state=AttemptState.FAILED)  # a search pauses then; this may not try for ever
        self._store.finish_attempt(attempt.id, state=ending.state, reason=ending.text, log=log, device_seconds=seconds, fence=self._fence)
        self._count_end(ending.state, reason=ending.reason, seconds=seconds)
        ending.log(attempt)

    def _keep(self, attempt: AttemptRecord, result: dict[str, Any], *, log: str | None, seconds: float) -> None:
        """The result first: after a crash between the two it is recorded once more, and is the same."""
        place = str(Path(result["file"]).relative_to(self._leader.settings.data_folder))
        self._store.save_distilled(self.record.id, {**result, "file": place}, fence=self._fence)
        self._store.finish_attempt(attempt.id, state=AttemptState.SUCCEEDED, reason=None, log=log, device_seconds=seconds, fence=self._fence)
        self.record = replace(self._store.get_search(self.record.id), state=self.record.state)

    def _device_seconds(self, running: Running) -> float:
        resources = self._spec.resources
        return self._watch.seconds_of(running) * (resources.gpus or resources.cpus)

    @staticmethod
    def _count_end(state: AttemptState, *, reason: str, seconds: float) -> None:
        metrics.ATTEMPTS_ENDED.labels(stage="distil", state=state, reason=reason).inc()
        metrics.DEVICE_SECONDS.labels(stage="distil").inc(seconds)

    # -- what is next ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the step, unless it has failed for good."""
        spent = find_spent(self._store.list_attempts(self.record.id), limits=self._limits, mailbox=self.folder.attempt)
        if spent is not None:
            log = self._store.read_log(spent.last.id)
            self.fail(reason=spent.reason, message=spent.message[:4000], log=last_lines(log.text if log else None))
            return
        try:
            student = self._student()
        except NotFound as gone:
            self.fail(reason="unavailable", message=str(gone))
            return
        trial, resources = self.record.spec["trial"], self._spec.resources
        attempt = self._store.start_attempt(self.record.id, stage="distil", trial=trial, rung=None, fence=self._fence)
        step = Step(
            key=attempt.id,
            stage="distil",
            folder=str(self.folder.attempt(attempt.id)),
            request={"folder": str(self.folder.path), "recipe": self.record.spec["recipe"], "inputs": self.record.inputs, **student},
            cpus=resources.cpus,
            gpus=resources.gpus,
            beat_seconds=self._leader.settings.attempt_lease_seconds / BEATS_PER_LEASE,
            context={"search_id": self.record.id, "trial": trial},
            traceparent=self.record.traceparent,
        )
        self._watch.add(attempt)
        if (ended := begin(step, executor=self._leader.executor)) is not None:
            self.ended[attempt.id] = ended

    def _student(self) -> dict[str, Any]:
        """Where its bundle is, and the digest of the tar beside it, or what the bundle is written from.

        Raises:
            NotFound: the search is gone.
        """
        settings, trial = self._leader.settings, self.record.spec["trial"]
        search = self._store.get_search(self.record.spec["search_id"])
        winner = winner_of(search, trial=trial)
        if winner is not None:
            student = (settings.data_folder / winner["bundle"]).with_name(BUNDLE)
            return {"student": str(student), "student_sha256": winner["bundle_sha256"], "bundle": None}
        prepared = settings.prepared_folder / prepared_key(parse_spec(json.dumps(search.spec)), inputs=search.inputs)
        folder, own = SearchFolder.of(search.id, settings=settings).trial(trial), self.folder.path / OWN_BUNDLE
        request = bundle_request(search, trial, store=self._store, student=folder, prepared=prepared, folder=own)
        source = {} if self.folder.shared is None else {"trial_source": find_tree(search.id, trial, store=self._store)}
        return {"student": None, "bundle": {**request, **source}}

    # -- the end -----------------------------------------------------------------------------------------------------------

    def fail(self, *, reason: str, message: str, log: str = "") -> None:
        """End it, with the reason and the last lines of its log for the user to read."""
        logger.error("distillation failed: %s", reason, extra={"action": "distillation_failed", "search_id": self.record.id, "reason": reason})
        self._end(SearchState.FAILED, error={"reason": reason, "message": message, **({"log": log} if log else {})})

    def _end(self, to: SearchState, *, error: dict[str, Any] | None = None) -> None:
        """It is over: nothing of it runs, and its files but the result go, before its state says so."""
        for key in self.running:
            with suppress(Conflict):  # it may have been settled half-way
                log = read_tail(self.folder.attempt(key))
                self._store.finish_attempt(key, state=AttemptState.CANCELLED, reason="the distillation ended", log=log, fence=self._fence)
            self._leader.executor.kill(key)
        self.running.clear()
        self.ended.clear()
        failed = [attempt.id for attempt in self._store.list_attempts(self.record.id) if attempt.state is AttemptState.FAILED]
        self.folder.clear(keep_attempts=failed, keep_trials=())
        self.folder.clear_distillation()
        self._move(to, error=error)

    def _move(self, to: SearchState, *, error: dict[str, Any] | None = None) -> None:
        """Change its state. It may have been cancelled since the tick began: the next tick sees that."""
        cancelled = self.record.state is SearchState.CANCELLING and to.is_terminal
        expected = (SearchState.CANCELLING,) if cancelled else (SearchState.QUEUED, *WORKING)
        try:
            self.record = self._store.change_search(self.record.id, fence=self._fence, to=to, expected=expected, error=error)
        except Conflict as conflict:
            logger.info("state not changed: %s", conflict, extra={"action": "state_conflict", "search_id": self.record.id, "to": to})
