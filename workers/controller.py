"""A controller: the process that leads searches. It holds a lease for each, hands outcomes to them, and outlives their bugs.

Every tick: collect the steps that ended, renew the leases and take a fair share of the searches (`membership.py`), let each
search that it holds go on. All of its memory can be rebuilt from the store and the searches' folders, which is what taking a
search over does, whether from a controller that died or from one that handed it back. A search whose lease is lost is dropped
with its steps; the others go on. What happens to one search is in `conductor.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nas.errors import Conflict, Fenced, FilesUnavailable, InvalidSpec, StoreUnavailable
from nas.logs import about
from nas.search.layout import prepared_lease
from nas.settings import Settings
from nas.store.records import ActiveSearch, AttemptRecord, AttemptState, SearchRecord, SearchState, TrialState
from nas.store.store import Store
from workers import metrics
from workers.cleaning import Cleaning
from workers.conductor import Conductor
from workers.distilling import Distilling
from workers.executor import Executor
from workers.folders import SearchFolder
from workers.liveness import supersede
from workers.logs import read_tail
from workers.membership import Membership
from workers.outcome import Outcome
from workers.packing import Packing
from workers.probes import PROBES, Probes
from workers.watch import Leader

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.25
STORE_PATIENCE_SECONDS = 60.0
"""A store that fails for so long ends the process; its supervisor starts another one. Running steps go on meanwhile."""
MAX_TROUBLES = 3
"""A search whose advance raised so often in a row, while the store answered in between, has a bug and fails."""
SETTLE_SECONDS = 2.0
"""How long a result of another controller's step is waited for that cannot be judged yet; afterwards the step is run again."""
TROUBLE_SECONDS = 2.0
"""Pause after such an exception."""


@dataclass(slots=True, kw_only=True)
class _Trouble:
    """Exceptions of one search since it last went on without."""

    count: int = 0
    is_doubtful: bool = False
    """Memory and store may differ: the search must be read again."""
    retry_at: float = 0.0
    """The controller's clock."""


class Controller:
    """Leads the searches of which it holds the lease."""

    def __init__(self, *, store: Store, executor: Executor, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._executor = executor
        self._settings = settings
        self._clock = clock
        self._membership = Membership(store=store, lease_seconds=settings.lease_seconds, clock=clock)
        self._is_alone_over = False
        """No controller of a version that led all searches alone is left."""
        self._conductors: dict[str, Conductor | Distilling] = {}
        self._troubles: dict[str, _Trouble] = {}
        self._probes = Probes(store=store, executor=executor, settings=settings, clock=clock)
        self._packing = Packing(store=store, executor=executor, settings=settings, clock=clock)
        self._cleaning = Cleaning(store=store, settings=settings, clock=clock)
        self._stopping = False
        self.pulse = metrics.Pulse()
        """Beats as long as the loop comes round, also while the store does not answer."""

    def stop(self) -> None:
        """Ask `run` to return after the current tick; running steps are lost, and resumed by whoever takes their search over."""
        self._stopping = True

    def run(self) -> None:
        """Tick until asked to stop. No step runs on when this returns or raises.

        Raises:
            Exception: the store has failed for STORE_PATIENCE_SECONDS.
        """
        failing_since: float | None = None
        try:
            while not self._stopping:
                self.pulse.beat()
                try:
                    self.tick()
                    failing_since = None
                # Broad: whatever a database raises while it is away. Bugs of one search are caught closer.
                except Exception:
                    failing_since = self._clock() if failing_since is None else failing_since
                    if self._clock() - failing_since > STORE_PATIENCE_SECONDS:
                        raise
                    logger.exception("the store does not answer, trying again", extra={"action": "store_failed"})
                    time.sleep(1.0)
        finally:
            self._executor.close()
        self._membership.leave()

    def tick(self, *, timeout_seconds: float = TICK_SECONDS) -> None:
        """One round: collect what ended, see what is held, then let each search go on."""
        for key, outcome in self._executor.wait(timeout_seconds=timeout_seconds):
            self._take_in(key, outcome)
        with metrics.TICK_SECONDS.time():
            self._go_round()
        steps = ((running.attempt.stage, running.tokens_per_second) for conductor in self._conductors.values() for running in conductor.steps.running.values())
        metrics.note_running(steps, num_searches=len(self._conductors))

    def _go_round(self) -> None:
        if not self._may_share():
            return
        active = self._store.active_searches()
        for name in self._membership.update(list(active)):
            self._drop(name)
        for name in self._membership.fences.keys() - active.keys() - {PROBES}:
            self._let_go(name)
        self._do_what_is_of_no_search()
        for search_id, found in active.items():
            if search_id in self._membership.fences:
                with about(search_id=search_id):
                    self._go_on(search_id, found)

    def _may_share(self) -> bool:
        """Whether searches are led by leases of their own: not while a controller of an older version leads them all."""
        if not self._is_alone_over:
            self._is_alone_over = self._store.retire_leadership()
        return self._is_alone_over

    def _take_in(self, key: str, outcome: Outcome) -> None:
        conductor = next((conductor for conductor in self._conductors.values() if key in conductor.steps.running), None)
        if conductor is not None:
            conductor.steps.ended[key] = outcome
        elif not (self._probes.take_in(key, outcome) or self._packing.take_in(key, outcome)):
            logger.info("outcome of a step that nobody waits for", extra={"action": "outcome_ignored", "attempt_id": key})

    def _do_what_is_of_no_search(self) -> None:
        """Measure, pack and clean up: one controller does, under one lease."""
        if self._membership.hold(PROBES):
            fence = self._membership.fences[PROBES]
            try:
                self._probes.go_on(fence=fence)
                self._packing.go_on(fence=fence)
                self._cleaning.go_on()
            except Fenced:
                self._drop(PROBES)

    # -- what is held ------------------------------------------------------------------------------------------------------

    def _drop(self, name: str) -> None:
        """Another controller has it by now: nothing of it may run on here, and nothing was lost that is in the store."""
        metrics.LEASES_LOST.inc()
        logger.warning("lease lost", extra={"action": "lease_lost", "lease": name, "owner": self._membership.owner})
        self._membership.forget(name)
        self._troubles.pop(name, None)
        if name == PROBES:
            self._probes.drop()
            self._packing.drop()
        elif (conductor := self._conductors.pop(name, None)) is not None:
            conductor.steps.drop()

    def _let_go(self, name: str) -> None:
        """Release what is not needed any more: a search that ended or was paused, a prepared folder that nobody fills."""
        if name.startswith(prepared_lease("")):
            key = name.removeprefix(prepared_lease(""))
            if any(conductor.is_preparing and conductor.prepared_key == key for conductor in self._conductors.values()):
                return
        if (conductor := self._conductors.pop(name, None)) is not None:
            conductor.steps.drop()
        self._troubles.pop(name, None)
        self._membership.release(name)

    def _may_prepare(self, conductor: Conductor | Distilling) -> bool:
        """Whether a search may fill its prepared folder now: two never fill one together, and what the first leaves the second finds."""
        key = conductor.prepared_key
        if any(other.is_preparing and other.prepared_key == key for other in self._conductors.values() if other is not conductor):
            return False
        return self._membership.hold(prepared_lease(key))

    # -- one search --------------------------------------------------------------------------------------------------------

    def _go_on(self, search_id: str, active: ActiveSearch) -> None:
        """Let a search settle and advance. Its bugs end it, not the controller."""
        trouble = self._troubles.setdefault(search_id, _Trouble())
        if self._clock() < trouble.retry_at:
            return
        try:
            conductor = self._conduct(search_id, active)
            conductor.settle()
            if self._membership.num_to_hand_back and not conductor.steps.running:
                self._conductors.pop(search_id)
                self._membership.hand_back(search_id)
            else:
                conductor.advance(may_prepare=lambda: self._may_prepare(conductor))
        except Fenced as fenced:
            logger.warning("%s", fenced, extra={"action": "fenced", "search_id": search_id})
            self._drop(search_id)
            return
        except InvalidSpec as invalid:
            # It was valid when it was submitted: only a teacher that was waited for, the teacher's scores, or a newer version of this code, can refuse it now.
            self._fail(search_id, reason="spec_refused", message=str(invalid))
        except Exception as error:
            self._troubled(search_id, trouble, error)
        else:
            self._troubles.pop(search_id, None)

    def _conduct(self, search_id: str, active: ActiveSearch) -> Conductor | Distilling:
        conductor = self._conductors.get(search_id)
        if conductor is None:
            conductor = self._conductors[search_id] = self._take_over(search_id)
        elif self._troubles[search_id].is_doubtful:
            conductor.reload()
        conductor.note(active)
        return conductor

    def _troubled(self, search_id: str, trouble: _Trouble, error: Exception) -> None:
        """The search is read from the store again and tried again. What is away, however often, is nothing that the search did."""
        trouble.is_doubtful = True
        trouble.retry_at = self._clock() + TROUBLE_SECONDS
        if isinstance(error, StoreUnavailable | FilesUnavailable):
            logger.warning("a search waits: %s", error, extra={"action": "search_troubled", "search_id": search_id, "count": trouble.count})
            return
        trouble.count += 1
        logger.exception("advancing a search failed", extra={"action": "search_troubled", "search_id": search_id, "count": trouble.count})
        if trouble.count >= MAX_TROUBLES:
            self._fail(search_id, reason="internal_error", message=f"{type(error).__name__}: {error}"[:2000])

    def _fail(self, search_id: str, *, reason: str, message: str) -> None:
        self._troubles.pop(search_id, None)
        conductor = self._conductors.get(search_id)
        if conductor is not None:
            conductor.fail(reason=reason, message=message)
            return
        # Not even its state could be read.
        logger.error("search failed: %s", reason, extra={"action": "search_failed", "search_id": search_id, "reason": reason})
        fence = self._membership.fences[search_id]
        self._store.lose_running_attempts(search_id, fence=fence)
        for trial in self._store.list_trials(search_id):
            if not trial.state.is_terminal:
                self._store.change_trial(search_id, trial.number, to=TrialState.CANCELLED, fence=fence)
        try:
            open_states = [state for state in SearchState if not state.is_terminal]
            error = {"reason": reason, "message": message}
            self._store.change_search(search_id, fence=fence, to=SearchState.FAILED, expected=open_states, error=error)
        except Conflict as conflict:
            logger.info("state not changed: %s", conflict, extra={"action": "state_conflict", "search_id": search_id})

    # -- taking over -------------------------------------------------------------------------------------------------------

    def _take_over(self, search_id: str) -> Conductor | Distilling:
        """A search as the store has it: what the steps of its last controller finished is kept, and nothing else counted against them."""
        fence = self._membership.fences[search_id]
        leader = Leader(store=self._store, executor=self._executor, settings=self._settings, fence=fence, clock=self._clock)
        if running := [attempt for attempt in self._store.list_attempts(search_id) if attempt.state is AttemptState.RUNNING]:
            metrics.TAKEOVERS.inc()
            self._settle_finished(search_id, leader=leader, running=running)
            for attempt in running:
                # Its worker may have outlived its controller: from here on it must leave no trace beside the next attempt.
                supersede(_mailbox(self._settings, attempt))
            lost = self._store.lose_running_attempts(search_id, fence=fence)
            tails = {attempt.id: read_tail(_mailbox(self._settings, attempt)) for attempt in lost}
            self._store.save_logs(search_id, {key: text for key, text in tails.items() if text is not None}, fence=fence)
            if lost:
                extra = {"action": "recover", "search_id": search_id, "attempts": [attempt.id for attempt in lost]}
                logger.warning("resuming %d lost attempts", len(lost), extra=extra)
        return _conductor_of(self._store.get_search(search_id), leader=leader)

    def _settle_finished(self, search_id: str, *, leader: Leader, running: list[AttemptRecord]) -> None:
        try:
            conductor = _conductor_of(self._store.get_search(search_id), leader=leader)
            outcomes = conductor.folder.find_outcomes([attempt.id for attempt in running])
            for attempt in running:
                if attempt.id in outcomes:
                    conductor.steps.resume(attempt, outcomes[attempt.id])
            conductor.settle()
            began = self._clock()
            while conductor.steps.ended and self._clock() - began < SETTLE_SECONDS:
                time.sleep(0.05)
                conductor.settle()
        except Fenced:
            raise
        except Exception:
            # Its first advance meets the same trouble, and deals with it; what was not settled here is run again.
            logger.exception("a finished step could not be taken over", extra={"action": "recover_failed", "search_id": search_id})


def _conductor_of(record: SearchRecord, *, leader: Leader) -> Conductor | Distilling:
    return Conductor(record, leader=leader) if record.distils is None else Distilling(record, leader=leader)


def _mailbox(settings: Settings, attempt: AttemptRecord) -> Path:
    return SearchFolder.of(attempt.search_id, settings=settings).attempt(attempt.id)
