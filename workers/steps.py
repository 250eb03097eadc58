"""The steps of one search, or of one full distillation: started, followed, and recorded when they end. What an end means is for its owner to say."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from nas.errors import Conflict
from nas.spec import LimitSpec
from nas.store.records import AttemptRecord, AttemptState, SearchRecord, SearchState, Stage
from workers import metrics
from workers.folders import SearchFolder
from workers.logs import LogKeeper, last_lines, read_tail
from workers.outcome import Outcome
from workers.step import Step
from workers.tries import BEATS_PER_LEASE, Spent, begin, find_spent, judge
from workers.verdicts import Undecided, Untrue
from workers.watch import Leader, Running, Watch

logger = logging.getLogger(__name__)


class Resources(Protocol):
    """What a step may use."""

    @property
    def cpus(self) -> float: ...
    @property
    def gpus(self) -> float: ...


class Owner(Protocol):
    """Whose steps they are."""

    @property
    def record(self) -> SearchRecord: ...

    def reload(self) -> None:
        """Read it from the store again."""

    def check_result(self, attempt: AttemptRecord, result: dict[str, Any]) -> None:
        """Refuse what no step can have come to.

        Raises:
            Untrue. Undecided: it has to be asked again a little later.
        """

    def keep_result(self, attempt: AttemptRecord, result: dict[str, Any], *, log: str | None, device_seconds: float) -> None:
        """Store a result, and its attempt's success."""

    def note_failure(self, attempt: AttemptRecord, outcome: Outcome, *, device_seconds: float) -> None:
        """An attempt, of which the store knows the end, came to nothing."""


class Steps:
    """Those that run, and those whose end waits to be recorded."""

    def __init__(self, record: SearchRecord, *, leader: Leader, folder: SearchFolder, resources: Resources, pauses_on_full_disk: bool) -> None:
        """Nothing runs yet.

        Args:
            folder: of the search. pauses_on_full_disk: else a full disk is a failure like others, lest it be tried for ever.
        """
        self._record, self._leader, self._store, self._fence, self._folder = record, leader, leader.store, leader.fence, folder
        self._resources, self._pauses_on_full_disk = resources, pauses_on_full_disk
        self.watch = Watch(record.id, leader=leader, folder=folder, num_devices=resources.gpus or resources.cpus)
        self.running = self.watch.running
        self.ended: dict[str, Outcome] = {}
        """Outcomes that wait to be recorded."""
        self._logs = LogKeeper(record.id, store=self._store, fence=self._fence, clock=leader.clock)

    # -- while they run ----------------------------------------------------------------------------------------------------

    def start(self, stage: Stage, *, request: dict[str, Any], trial: int | None, rung: int | None = None) -> None:
        """Begin an attempt of a step; one that cannot be begun has ended."""
        attempt = self._store.start_attempt(self._record.id, stage=stage, trial=trial, rung=rung, fence=self._fence)
        step = Step(
            key=attempt.id,
            stage=stage,
            folder=str(self._folder.attempt(attempt.id)),
            request=request,
            cpus=self._resources.cpus,
            gpus=self._resources.gpus,
            beat_seconds=self._leader.settings.attempt_lease_seconds / BEATS_PER_LEASE,
            context={"search_id": self._record.id, "trial": trial, "rung": rung},
            traceparent=self._record.traceparent,
        )
        self.watch.add(attempt)
        if (ended := begin(step, executor=self._leader.executor)) is not None:
            self.ended[attempt.id] = ended

    def follow(self) -> None:
        """Pass on what they report, and keep what they say."""
        self.watch.follow()
        self._logs.keep({key: running.progress.folder for key, running in self.running.items()})

    def enforce(self, limits: LimitSpec) -> None:
        """End those that do not stop, take too long or fell silent."""
        for key, outcome in {**self.watch.enforce(limits), **self.watch.listen(ended=self.ended)}.items():
            self.ended.setdefault(key, outcome)

    # -- when they end -----------------------------------------------------------------------------------------------------

    def settle(self, owner: Owner) -> None:
        """Record how steps ended; a step whose outcome cannot be recorded now stays to be recorded later."""
        for key, outcome in list(self.ended.items()):
            try:
                self._settle(self.running[key], outcome, owner=owner)
            except Undecided:
                continue
            except Conflict as conflict:
                # An earlier try, or another controller, got as far as the store.
                logger.warning("outcome not recorded: %s", conflict, extra={"action": "outcome_ignored", "search_id": self._record.id, "attempt_id": key})
                del self.running[key], self.ended[key]
                owner.reload()
            else:
                del self.running[key], self.ended[key]

    def _settle(self, running: Running, outcome: Outcome, *, owner: Owner) -> None:
        self.watch.pass_on([running])
        attempt, log, seconds = running.attempt, read_tail(running.progress.folder), self.watch.device_seconds_of(running)
        if outcome.succeeded and (result := outcome.result) is not None:
            try:
                owner.check_result(attempt, result)
            except Untrue as untrue:
                outcome = Outcome(succeeded=False, reason="invalid_result", message=str(untrue))
            except Undecided:
                # One that was to stop, or to end, long ago waits no longer for files that cannot be reached.
                if running.killed is None:
                    raise
                outcome = running.killed
            else:
                owner.keep_result(attempt, result, log=log, device_seconds=seconds)
                _count_end(attempt, AttemptState.SUCCEEDED, reason="", device_seconds=seconds)
                return
        elif running.killed is not None:
            outcome = running.killed
        is_cancelling = owner.record.state is SearchState.CANCELLING
        ending = judge(running, outcome, is_cancelling=is_cancelling, pauses_on_full_disk=self._pauses_on_full_disk)
        self._store.finish_attempt(attempt.id, state=ending.state, reason=ending.text, log=log, device_seconds=seconds, fence=self._fence)
        _count_end(attempt, ending.state, reason=ending.reason, device_seconds=seconds)
        ending.log(attempt)
        owner.note_failure(attempt, outcome, device_seconds=seconds)

    def find_spent(self, attempts: Sequence[AttemptRecord], *, limits: LimitSpec) -> Spent | None:
        """Why a step may not be tried again, if so. See `tries.find_spent`."""
        return find_spent(attempts, limits=limits, mailbox=self._folder.attempt)

    def last_lines(self, attempt: AttemptRecord) -> str:
        """Of the log of an attempt that has ended, for a failure to carry."""
        log = self._store.read_log(attempt.id)
        return last_lines(log.text if log else None)

    # -- taken over, and given up ------------------------------------------------------------------------------------------

    def resume(self, attempt: AttemptRecord, outcome: Outcome) -> None:
        """Take over a step that ended under another controller."""
        self.watch.add(attempt)
        self.ended[attempt.id] = outcome

    def lose_unknown(self) -> None:
        """Attempts that run in the store and not here are lost."""
        for attempt in self._store.list_attempts(self._record.id):
            if attempt.state is AttemptState.RUNNING and attempt.id not in self.running:
                log = read_tail(self._folder.attempt(attempt.id))
                self._store.finish_attempt(attempt.id, state=AttemptState.LOST, reason="the controller does not know its step", log=log, fence=self._fence)

    def drop(self) -> None:
        """The search is another controller's: end what runs of it here, and write nothing more."""
        for key in self.running:
            self._leader.executor.kill(key)
        self.running.clear()
        self.ended.clear()

    def end_all(self, why: str) -> list[str]:
        """Cancel what runs; returns the attempts that ever failed, whose folders stay for their logs."""
        for key in self.running:
            with suppress(Conflict):  # it may have been settled half-way
                log = read_tail(self._folder.attempt(key))
                self._store.finish_attempt(key, state=AttemptState.CANCELLED, reason=why, log=log, fence=self._fence)
        self.drop()
        return [attempt.id for attempt in self._store.list_attempts(self._record.id) if attempt.state is AttemptState.FAILED]


def _count_end(attempt: AttemptRecord, state: AttemptState, *, reason: str, device_seconds: float) -> None:
    metrics.ATTEMPTS_ENDED.labels(stage=attempt.stage, state=state, reason=reason).inc()
    metrics.DEVICE_SECONDS.labels(stage=attempt.stage).inc(device_seconds)
