"""How often somebody may ask: token buckets in the memory of one API process. Used from the event loop alone, hence no locks."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

MAX_NAMES = 10_000
"""Buckets that are remembered; the one that was asked for longest ago is forgotten first, and full again."""


class TokenBuckets:
    """One bucket for each name: it holds `burst` tokens at most, and gains `rate` of them a second."""

    def __init__(self, *, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # name -> tokens, and when

    def take(self, name: str) -> float:
        """Take a token: 0.0, or the seconds after which there will be one."""
        now = self._clock()
        tokens, then = self._buckets.pop(name, (self._burst, now))
        tokens = min(self._burst, tokens + (now - then) * self._rate)
        wait = 0.0 if tokens >= 1.0 else (1.0 - tokens) / self._rate
        self._buckets[name] = (tokens if wait else tokens - 1.0, now)
        if len(self._buckets) > MAX_NAMES:
            self._buckets.popitem(last=False)
        return wait
