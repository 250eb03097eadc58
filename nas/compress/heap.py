"""The C library's heap, told what suits a process: to keep what training gives back and asks for again, or to be one for all threads of a server."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Mapping

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h."""
_KEPT_BYTES, _LARGEST_BYTES, _RETURNED_BYTES = 2**30, 32 * 2**20, 2**18


def keep_freed_memory() -> None:
    """Let this process keep up to a GiB of freed memory, in blocks of up to 32 MiB, instead of returning it to the kernel.

    A training step on the CPU frees and asks for the same few megabytes; by default glibc returns them each time, and every page is faulted in and
    zeroed again: thousands of page faults a step, 4 to 10 % of its time (LOG.md). Elsewhere than on glibc nothing is done.
    """
    _set_thresholds(largest=_LARGEST_BYTES, kept=_KEPT_BYTES)


def return_freed_memory() -> None:
    """Give freed blocks of 256 KiB and more back to the kernel at once, where memory is short: with checkpointed layers the heap else held 2.7 times
    what was in use, and the step that fits takes up to a third longer (LOG.md)."""
    _set_thresholds(largest=_RETURNED_BYTES, kept=_RETURNED_BYTES)


def use_few_arenas() -> None:
    """Let all threads of this process allocate from two arenas; before the first of them starts.

    By default glibc gives nearly every thread its own, and each keeps what its thread once needed: a server whose threads take turns grows to the sum of
    all peaks. Python's lock lets no two of them allocate at once anyway.
    """
    _set({_M_ARENA_MAX: 2})


def _set_thresholds(*, largest: int, kept: int) -> None:
    _set({_M_MMAP_THRESHOLD: largest, _M_TRIM_THRESHOLD: kept})


def _set(values: Mapping[int, int]) -> None:
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not all(mallopt(name, value) for name, value in values.items()):
        logger.debug("the heap keeps its settings", extra={"action": "heap_unchanged"})
