"""The clock of this machine that no setting of its calendar moves: seconds since boot, and which boot that was."""

from __future__ import annotations

import time
from pathlib import Path

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Goes on while the machine sleeps, where there is such a clock."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def seconds_since_boot() -> float:
    """The same for all processes of the machine."""
    return time.clock_gettime(_CLOCK)


def read_boot_id() -> str | None:
    """A name that no other boot has; None where the system gives none (it is Linux's)."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip() or None
    except OSError:
        return None
