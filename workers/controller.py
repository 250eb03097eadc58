"""The controller: the one process that leads. It keeps the lease, hands outcomes to the searches, and outlives their bugs.

Every tick: renew the lease, collect the steps that ended, let every active search go on. All of its memory can be rebuilt
from the store and the searches' folders, which is what a restart does. What happens to one search is in `conductor.py`.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from nas.errors import Conflict, Fenced, InvalidSpec
from nas.settings import Settings
from nas.store.records import AttemptState, ControllerRecord, SearchState, TrialState, utc_now
from nas.store.store import Store
from workers.conductor import WORKING, Conductor, Leader, ask_to_stop
from workers.executor import Executor
from workers.folders import SearchFolder
from workers.logs import read_tail
from workers.probes import Probes
from workers.step import read_outcome

logger = logging.getLogger(__name__)

CONTROLLER = "controller"
TICK_SECONDS = 0.25
STORE_PATIENCE_SECONDS = 60.0
"""A store that fails for so long ends the process; its supervisor starts another one. Running steps go on meanwhile."""
MAX_TROUBLES = 3
"""A search whose advance raised so often in a row, while the store answered in between, has a bug and fails."""
TROUBLE_SECONDS = 2.0
"""Pause after such an exception: a store that is away for moments must not fail a search."""


@dataclass(slots=True, kw_only=True)
class _Trouble:
    """Exceptions of one search since it last went on without."""

    count: int = 0
    retry_at: float = 0.0
    """The controller's clock."""


class Controller:
    """Owns the searches while it leads."""

    def __init__(self, *, store: Store, executor: Executor, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._executor = executor
        self._settings = settings
        self._clock = clock
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._record = ControllerRecord(owner=self._owner, host=socket.gethostname(), pid=os.getpid(), version="", started_at=utc_now())
        self._leader: Leader | None = None
        self._renewed = 0.0
        self._conductors: dict[str, Conductor] = {}
        self._troubles: dict[str, _Trouble] = {}
        self._probes = Probes(store=store, executor=executor, settings=settings, clock=clock)
        self._stopping = False

    def stop(self) -> None:
        """Ask `run` to return after the current tick; running steps are lost, and resumed by the next controller."""
        self._stopping = True

    def run(self) -> None:
        """Lead, recover, tick, until asked to stop. No step runs on when this returns or raises.

        Raises:
            Fenced: another controller leads.
            Exception: the store has failed for STORE_PATIENCE_SECONDS.
        """
        failing_since: float | None = None
        try:
            while not self._stopping:
                try:
                    if self._lead():
                        self.tick()
                    failing_since = None
                except Fenced:
                    raise
                # Broad: whatever a database raises while it is away. Bugs of one search are caught closer.
                except Exception:
                    failing_since = self._clock() if failing_since is None else failing_since
                    if self._clock() - failing_since > STORE_PATIENCE_SECONDS:
                        raise
                    logger.exception("the store does not answer, trying again", extra={"action": "store_failed"})
                    time.sleep(1.0)
        finally:
            self._executor.close()
        if self._leader is not None:
            self._store.release(self._leader.fence)

    def tick(self, *, timeout_seconds: float = TICK_SECONDS) -> None:
        """One round: collect what ended, then let each search go on."""
        if self._leader is not None:
            self._probes.start_wished(fence=self._leader.fence)
        for key, outcome in self._executor.wait(timeout_seconds=timeout_seconds):
            conductor = next((conductor for conductor in self._conductors.values() if key in conductor.running), None)
            if conductor is None and self._probes.take(key, outcome, fence=self._leading().fence):
                continue
            if conductor is None:
                logger.info("outcome of a step that nobody waits for", extra={"action": "outcome_ignored", "attempt_id": key})
            else:
                conductor.ended[key] = outcome
        active = self._store.active_states()
        self._conductors = {search_id: conductor for search_id, conductor in self._conductors.items() if search_id in active}
        for search_id, state in active.items():
            self._go_on(search_id, state)

    # -- one search --------------------------------------------------------------------------------------------------------

    def _go_on(self, search_id: str, state: SearchState) -> None:
        """Let a search settle and advance. Its bugs end it, not the controller."""
        trouble = self._troubles.setdefault(search_id, _Trouble())
        if self._clock() < trouble.retry_at:
            return
        try:
            conductor = self._conduct(search_id, state)
            conductor.settle()
            others = [other for other in self._conductors.values() if other is not conductor]
            conductor.advance(preparing={other.prepared_key for other in others if other.is_preparing})
        except Fenced:
            raise
        except InvalidSpec as invalid:
            # It was valid when it was submitted: only the teacher's scores, or a newer version of this code, can refuse it now.
            self._fail(search_id, reason="spec_refused", message=str(invalid))
        except Exception as error:
            self._troubled(search_id, trouble, error)
        else:
            del self._troubles[search_id]

    def _conduct(self, search_id: str, state: SearchState) -> Conductor:
        conductor = self._conductors.get(search_id)
        if conductor is None:
            conductor = self._conductors[search_id] = Conductor(self._store.get_search(search_id), leader=self._leading())
        elif search_id in self._troubles and self._troubles[search_id].count:
            conductor.reload()
        conductor.note_state(state)
        return conductor

    def _troubled(self, search_id: str, trouble: _Trouble, error: Exception) -> None:
        """The search is read from the store again and tried again: the store may have been away for a moment."""
        trouble.count += 1
        trouble.retry_at = self._clock() + TROUBLE_SECONDS
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
        fence = self._leading().fence
        for trial in self._store.list_trials(search_id):
            if not trial.state.is_terminal:
                self._store.change_trial(search_id, trial.number, to=TrialState.CANCELLED, fence=fence)
        try:
            self._store.change_search(
                search_id, fence=fence, to=SearchState.FAILED, expected=[*WORKING, SearchState.CANCELLING], error={"reason": reason, "message": message}
            )
        except Conflict as conflict:
            logger.info("state not changed: %s", conflict, extra={"action": "state_conflict", "search_id": search_id})

    # -- leadership and recovery -------------------------------------------------------------------------------------------

    def _leading(self) -> Leader:
        assert self._leader is not None, "searches go on only under a leader"
        return self._leader

    def _lead(self) -> bool:
        """Whether this controller leads now; it waits a moment for the leadership when another one has it.

        Raises:
            Fenced: it led, and another one does now.
        """
        lease, now = self._settings.lease_seconds, self._clock()
        if self._leader is None:
            fence = self._store.claim(CONTROLLER, owner=self._owner, seconds=lease)
            if fence is None:
                time.sleep(min(1.0, lease / 4))
                return False
            logger.info("leading", extra={"action": "lead", "owner": self._owner, "token": fence.token})
            leader = Leader(store=self._store, executor=self._executor, settings=self._settings, fence=fence, clock=self._clock)
            self._recover(leader)
            self._leader, self._renewed = leader, now
        elif now - self._renewed > lease / 4:
            if self._leader.fence not in self._store.renew(self._record, seconds=lease):
                raise Fenced(f"lease {CONTROLLER}: another controller has it")
            self._renewed = now
        return True

    def _recover(self, leader: Leader) -> None:
        """Take over from a controller that died: keep what its steps finished, count nothing else against them."""
        for search_id in self._store.active_states():
            attempts = self._store.list_attempts(search_id)
            running = [attempt for attempt in attempts if attempt.state is AttemptState.RUNNING]
            try:
                conductor = Conductor(self._store.get_search(search_id), leader=leader)
                for attempt in running:
                    if (outcome := read_outcome(conductor.folder.attempt(attempt.id))) is not None:
                        conductor.resume(attempt, outcome)
                conductor.settle()
            except Fenced:
                raise
            except Exception:
                # Its first tick meets the same trouble, and deals with it; what was not settled here is run again.
                logger.exception("a finished step could not be taken over", extra={"action": "recover_failed", "search_id": search_id})
        lost = self._store.lose_running_attempts(fence=leader.fence)
        for attempt in lost:
            # Its worker may have outlived the controller, and must not write beside the next attempt for long.
            folder = SearchFolder(path=self._settings.searches_folder / attempt.search_id).attempt(attempt.id)
            if (log := read_tail(folder)) is not None:
                self._store.save_log(attempt.id, log, fence=leader.fence)
            try:
                ask_to_stop(folder)
            except OSError:
                logger.exception("a lost attempt could not be asked to stop", extra={"action": "recover_failed", "attempt_id": attempt.id})
        if lost:
            logger.warning("resuming %d lost attempts", len(lost), extra={"action": "recover", "attempts": [attempt.id for attempt in lost]})
