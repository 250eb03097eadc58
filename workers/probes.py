"""Measures the speed of workers that somebody asked about, so that searches can be priced. Belongs to the controller, and to no search."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from nas.settings import Settings
from nas.store.machines import Fence
from nas.store.records import new_id
from nas.store.store import Store
from workers.executor import Executor
from workers.outcome import Outcome
from workers.step import Step

logger = logging.getLogger(__name__)

PROBES = "probes"
"""Name of the lease of whoever measures, packs and cleans up."""
LOOK_SECONDS = 1.0
"""How often the store is asked for wishes."""


class Probes:
    """The probes of one controller. One that is lost with its controller is wished for still, and started by the next."""

    def __init__(self, *, store: Store, executor: Executor, settings: Settings, clock: Callable[[], float]) -> None:
        self._store, self._executor, self._clock = store, executor, clock
        self._folder = settings.data_folder / "probes"
        self._running: dict[str, tuple[str, Path]] = {}
        self._ended: dict[str, Outcome] = {}
        self._looked: float | None = None

    def go_on(self, *, fence: Fence) -> None:
        """Record what ended, and start what is wished for and not running, now and then."""
        for key, outcome in list(self._ended.items()):
            self._record(key, outcome, fence=fence)
        now = self._clock()
        if self._looked is not None and now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        busy = {speed for speed, _ in self._running.values()}
        for wish in self._store.wished_speeds():
            if wish.key in busy:
                continue
            key = new_id("probe")
            folder = self._folder / key
            self._running[key] = wish.key, folder
            try:
                folder.mkdir(parents=True)
                step = Step(key=key, stage="probe", folder=str(folder), request={"dtype": wish.dtype}, cpus=wish.cpus, gpus=wish.gpus)
                self._executor.start(step)
            # Broad: whatever an executor says of a step that it cannot begin; who asked reads why.
            except Exception as error:
                logger.exception("probe not started", extra={"action": "probe_failed", "speed": wish.key})
                self._ended[key] = Outcome(succeeded=False, reason="error", message=f"{type(error).__name__}: {error}")

    def take_in(self, key: str, outcome: Outcome) -> bool:
        """Note how a probe ended, to be recorded; False: the step was none."""
        if key not in self._running:
            return False
        self._ended[key] = outcome
        return True

    def drop(self) -> None:
        """Another controller measures from now on."""
        for key in self._running:
            self._executor.kill(key)
        self._running.clear()
        self._ended.clear()

    def _record(self, key: str, outcome: Outcome, *, fence: Fence) -> None:
        speed, folder = self._running[key]
        if outcome.succeeded and outcome.result is not None:
            self._store.save_speed(speed, points=outcome.result["points"], host=outcome.result["host"], error=None, fence=fence)
        else:
            error = f"{outcome.reason}: {outcome.message.splitlines()[0] if outcome.message else 'no message'}"[:500]
            self._store.save_speed(speed, points=None, host=None, error=error, fence=fence)
        del self._running[key], self._ended[key]
        shutil.rmtree(folder, ignore_errors=True)
        logger.info("workers measured", extra={"action": "probe", "speed": speed, "succeeded": outcome.succeeded})
