"""Removes now and then what the settings say is not kept for ever; a little in every round, so that no search waits for it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from nas.errors import FilesUnavailable
from nas.housekeeping import remove_orphans
from nas.settings import Settings
from nas.store.store import Store
from workers.folders import sweep_by_url

logger = logging.getLogger(__name__)

CLEAN_SECONDS = 3600.0
"""Between two times that nothing was left to remove."""
SWEEP_SECONDS = 600.0
"""Between two looks for folders of searches that were deleted."""


class Cleaning:
    """The clean-up of the controller that also measures: one is enough, though two would do no harm."""

    def __init__(self, *, store: Store, settings: Settings, clock: Callable[[], float]) -> None:
        self._store, self._settings, self._clock = store, settings, clock
        self._rest_until = self._sweep_at = clock()
        self._num_logs = self._num_events = 0

    def go_on(self) -> None:
        """Remove a few hundred rows, and files of searches that were deleted, if it is time and there are any."""
        if self._clock() >= self._sweep_at:
            self._sweep_at = self._clock() + SWEEP_SECONDS
            self._sweep()
            sweep_by_url(self._store, settings=self._settings)
        if self._clock() < self._rest_until:
            return
        num_logs = self._store.drop_old_logs(days=self._settings.log_days, max_bytes=self._settings.max_log_bytes)
        num_events = self._store.drop_old_events(days=self._settings.event_days)
        num_keys = self._store.drop_old_keys()
        self._num_logs, self._num_events = self._num_logs + num_logs, self._num_events + num_events
        if num_logs or num_events or num_keys:
            return
        self._rest_until = self._clock() + CLEAN_SECONDS
        if self._num_logs or self._num_events:
            logger.info("removed what is not kept any longer", extra={"action": "clean_up", "logs": self._num_logs, "events": self._num_events})
        self._num_logs = self._num_events = 0

    def _sweep(self) -> None:
        try:
            removed = remove_orphans(self._store, settings=self._settings)
        except FilesUnavailable as error:
            logger.warning("files of deleted searches are not all removed: %s", error, extra={"action": "sweep_failed"})
            return
        if removed:
            logger.info("files of deleted searches removed", extra={"action": "swept", "searches": [path.name for path in removed]})
