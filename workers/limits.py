"""The limits of a whole search: time at work, time in the queue, tokens, device seconds, bytes on disk. Says when one is reached; it ends nothing.

Times are the store's, taken once when the search is read, and go on by the leader's clock: a restart forgets nothing, and a pause does not count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from nas.errors import FilesUnavailable
from nas.spec import LimitSpec
from nas.store.records import AttemptRecord, SearchTimes
from workers.actions import LimitReason
from workers.folders import DiskUse, SearchFolder

logger = logging.getLogger(__name__)

DISK_SECONDS = 20.0
"""Between two measurements of the search's folder."""
DISK_SHARE = 0.01
"""And at most this share of the time is spent on them: a folder of ten thousand trials on a shared disk takes a while."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """More bytes on disk than a search may have."""

    num_bytes: int
    """Over the limit."""
    use: DiskUse


class Limits:
    """What a search has used, against what it may."""

    def __init__(self, limits: LimitSpec, *, attempts: Iterable[AttemptRecord], times: SearchTimes, clock: Callable[[], float]) -> None:
        self._limits, self._times, self._clock = limits, times, clock
        self._read = clock()
        self._device_seconds = sum(attempt.device_seconds or 0.0 for attempt in attempts)
        self._measure_at = self._read
        self._measuring: Future[DiskUse] | None = None

    def count(self, device_seconds: float) -> None:
        """A step has ended after so many device seconds."""
        self._device_seconds += device_seconds

    def reached(self, *, running_device_seconds: float) -> LimitReason | None:
        """Whether the search's time, or its device seconds, are used up.

        Args:
            running_device_seconds: of the steps that have not ended.
        """
        limits, passed = self._limits, self._clock() - self._read
        if limits.max_search_seconds is not None and self._times.at_work_seconds + passed >= limits.max_search_seconds:
            return "time_limit"
        if limits.max_device_seconds is not None and self._device_seconds + running_device_seconds >= limits.max_device_seconds:
            return "device_seconds_limit"
        return None

    def refuses_tokens(self, tokens: int) -> LimitReason | None:
        """Whether so many tokens, those of the next rung among them, are too many."""
        return "token_limit" if self._limits.max_tokens is not None and tokens > self._limits.max_tokens else None

    def message(self, reason: LimitReason) -> str:
        """The limit that was reached, as the spec has it."""
        name = {"time_limit": "max_search_seconds", "token_limit": "max_tokens", "device_seconds_limit": "max_device_seconds"}[reason]
        return f"limits.{name}={getattr(self._limits, name):g} is reached"

    def queued_too_long(self) -> str | None:
        """Why a search that waits in the queue has waited too long."""
        longest = self._limits.max_queued_seconds
        if longest is None or self._times.in_state_seconds + self._clock() - self._read <= longest:
            return None
        return f"it waited longer than limits.max_queued_seconds={longest:g} for a controller"

    def disk_excess(self, folder: SearchFolder) -> Excess | None:
        """By how much the search's files are over their limit; None where they are not, and between two measurements."""
        most = self._limits.max_disk_bytes
        if most is None:
            return None
        if self._measuring is None and self._clock() >= self._measure_at:
            self._measuring = folder.measure()
        if self._measuring is None or not self._measuring.done():
            return None
        measured, self._measuring, self._measure_at = self._measuring, None, self._clock() + DISK_SECONDS
        try:
            use = measured.result()
        except FilesUnavailable as error:
            logger.warning("bytes of a search not counted: %s", error, extra={"action": "measure_failed", "folder": folder.path.name})
            return None
        self._measure_at = self._clock() + max(DISK_SECONDS, use.seconds / DISK_SHARE)
        return Excess(num_bytes=use.num_bytes - most, use=use) if use.num_bytes > most else None
