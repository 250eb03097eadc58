"""The steps of one search that are in flight: what they report, and what becomes of one that is asked to stop, or takes too long.

It tells steps to stop and kills them; their ends are recorded in `steps.py`. All times are of the leader's clock.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from nas.settings import Settings
from nas.spec import LimitSpec
from nas.store.machines import Fence
from nas.store.records import AttemptRecord
from nas.store.store import Store
from workers import metrics
from workers.actions import LimitReason
from workers.executor import Executor
from workers.folders import SearchFolder
from workers.liveness import ask_to_stop, read_beat, supersede
from workers.outcome import Outcome
from workers.progress import ProgressReader, make_point

logger = logging.getLogger(__name__)

CANCEL_GRACE_SECONDS = 10.0
"""A step that was asked to stop and has not is killed after this long."""
KILL_GRACE_SECONDS = 4.0
"""One that was killed and of which the executor has not heard after this long is given up: its node may hang."""
WAITING_SECONDS = 60.0
"""A step that shows no sign of life for so long is said to wait: on a cluster that grows, this may take any time."""
_WAITING = "not begun yet: no worker is free, or its worker is still starting"
PROGRESS_SECONDS = 0.5
"""Between two looks at the running steps' progress files: a thousand of them on a shared folder are not looked at with every outcome."""
PROGRESS_SECONDS_PER_STEP = 0.002
"""And for every running step at least this, so that looking takes about a hundredth of the controller's time however many run."""

LOOKS_PER_ATTEMPT_LEASE = 10
"""How often, in the time after which a silent step is lost, the running steps' beats are looked at."""
PREEMPTED = "preempted"
"""Reason of an attempt that was lost with its worker. It does not count as failed, and there may be many of them."""

StopReason = Literal["cancelled", "paused"] | LimitReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """What a controller works with while it leads a search."""

    store: Store
    executor: Executor
    settings: Settings
    fence: Fence
    """The lease under which it writes what belongs to the search."""
    clock: Callable[[], float] = time.monotonic
    """Seconds from some fixed moment."""


@dataclass(slots=True, kw_only=True)
class Running:
    """A step in flight."""

    attempt: AttemptRecord
    progress: ProgressReader
    started: float
    """When it was handed to the executor."""
    began: float | None = None
    """Its first sign of life; None while it waits for resources."""
    said_waiting: bool = False
    tokens_per_second: float = 0.0
    """As its last line of progress said."""
    beat: str | None = None
    """The last one that was seen; None: the step has not begun."""
    silent_seconds: float = 0.0
    """For so long the leader has looked and seen no other."""
    stop_reason: StopReason | None = None
    """Why it was asked to stop."""
    stop_asked: float | None = None
    killed: Outcome | None = None
    """What we ended it by force for."""
    killed_at: float = math.inf


class Watch:
    """Follows the running steps of one search."""

    def __init__(self, search_id: str, *, leader: Leader, folder: SearchFolder, num_devices: float) -> None:
        """Nothing runs yet.

        Args:
            folder: of the search. num_devices: of each step, its GPUs, or CPU cores where it has none.
        """
        self._num_devices = num_devices
        self._search_id, self._leader, self._clock, self._folder = search_id, leader, leader.clock, folder
        self.running: dict[str, Running] = {}
        """By attempt."""
        self._looked, self._listened = -math.inf, self._clock()
        """When progress was read last, and when beats were looked at last."""

    def add(self, attempt: AttemptRecord) -> Running:
        """A step that is about to start, or one that was found running."""
        running = Running(attempt=attempt, progress=ProgressReader(folder=self._folder.attempt(attempt.id)), started=self._clock())
        self.running[attempt.id] = running
        return running

    def device_seconds(self) -> float:
        """Of all that run, from their first sign of life."""
        return sum(self.device_seconds_of(running) for running in self.running.values())

    def device_seconds_of(self, running: Running) -> float:
        """Of one of them: wall seconds times its devices."""
        return 0.0 if running.began is None else (self._clock() - running.began) * self._num_devices

    # -- what they report --------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Pass on the progress of all, now and then."""
        if self._clock() - self._looked >= max(PROGRESS_SECONDS, PROGRESS_SECONDS_PER_STEP * len(self.running)):
            self._looked = self._clock()
            self.pass_on(self.running.values())

    def pass_on(self, steps: Iterable[Running]) -> None:
        """Learning curves and prepare steps, from the steps' progress files into the store."""
        store, fence, points = self._leader.store, self._leader.fence, []
        for running in steps:
            for line in running.progress.read():
                if running.began is None:
                    running.began = self._clock()
                    metrics.DISPATCH_SECONDS.observe(running.began - running.started)
                if (point := make_point(line, attempt=running.attempt)) is not None:
                    points.append(point)
                    running.tokens_per_second = point.tokens_per_second
                elif running.attempt.stage == "prepare" and "step" in line:
                    data: dict[str, Any] = {name: line[name] for name in ("step", "done", "of") if name in line}
                    store.add_event(self._search_id, "prepare.step", data, fence=fence)
        if points:
            store.add_points(points, fence=fence)

    # -- when they end -----------------------------------------------------------------------------------------------------

    def stop(self, reason: StopReason) -> None:
        """Ask all to stop; those that do not are killed by `enforce` after a while."""
        for running in self.running.values():
            if running.stop_asked is None:
                running.stop_reason, running.stop_asked = reason, self._clock()
                try:
                    ask_to_stop(running.progress.folder)
                except OSError as error:  # a full disk: it cannot be asked, only killed
                    logger.warning("a step could not be asked to stop: %s", error, extra={"action": "stop_failed", "attempt_id": running.attempt.id})
                    running.stop_asked = -math.inf

    def enforce(self, limits: LimitSpec) -> dict[str, Outcome]:
        """Kill what does not stop or takes too long; what the executor does not tell the end of is returned as dead."""
        now, dead = self._clock(), {}
        for key, running in self.running.items():
            if running.began is None and not running.said_waiting and now - running.started > WAITING_SECONDS:
                self._say_waiting(running.attempt)
                running.said_waiting = True
            if running.killed is None and (verdict := self._verdict(running, limits=limits)) is not None:
                running.killed, running.killed_at = verdict, now
                self._leader.executor.kill(key)
            elif now - running.killed_at > KILL_GRACE_SECONDS:
                dead[key] = Outcome(succeeded=False, reason="worker_died", message="it was killed, and nothing was heard of it since")
        return dead

    def listen(self, *, ended: Collection[str]) -> dict[str, Outcome]:
        """Give steps up that stopped beating: their worker hangs, or went with its node. They are run again at once, whatever the executor still hopes for.

        Only time in which this process looked counts: after a pause of its own, a step has not been silent.

        Args:
            ended: steps of which the end is known already.
        """
        dead: dict[str, Outcome] = {}
        lease, now = self._leader.settings.attempt_lease_seconds, self._clock()
        interval = lease / LOOKS_PER_ATTEMPT_LEASE
        if (passed := now - self._listened) < interval:
            return dead
        self._listened = now
        for key, running in self.running.items():
            beat = read_beat(running.progress.folder)
            running.silent_seconds = running.silent_seconds + min(passed, 2 * interval) if beat == running.beat and beat is not None else 0.0
            running.beat = beat
            if running.silent_seconds > lease and key not in ended:
                supersede(running.progress.folder)
                self._leader.executor.kill(key)
                dead[key] = Outcome(succeeded=False, reason=PREEMPTED, message=f"no sign of life for {lease:g} s")
                running.killed, running.killed_at = running.killed or dead[key], now
        return dead

    def _verdict(self, running: Running, *, limits: LimitSpec) -> Outcome | None:
        """Why a step must be killed now."""
        now, stage = self._clock(), running.attempt.stage
        if running.stop_asked is not None and now - running.stop_asked > CANCEL_GRACE_SECONDS:
            return Outcome(succeeded=False, reason="stopped", message=f"asked to stop, and killed {CANCEL_GRACE_SECONDS:g} s later")
        if running.began is None:
            waited = limits.max_wait_seconds is not None and now - running.started > limits.max_wait_seconds
            return (
                Outcome(succeeded=False, reason="no_resources", message=f"waited longer than limits.max_wait_seconds={limits.max_wait_seconds:g}")
                if waited
                else None
            )
        field, seconds = limits.step_limit(stage)
        if now - running.began > seconds:
            return Outcome(succeeded=False, reason="timeout", message=f"{stage}: ran longer than limits.{field}={seconds:g}")
        return None

    def _say_waiting(self, attempt: AttemptRecord) -> None:
        data = {"attempt": attempt.id, "stage": attempt.stage, "trial": attempt.trial, "rung": attempt.rung, "reason": _WAITING}
        self._leader.store.add_event(self._search_id, "attempt.waiting", data, fence=self._leader.fence)
        logger.info("no sign of life after %g s", WAITING_SECONDS, extra={"action": "attempt_waiting", "search_id": self._search_id, **data})
