"""Waiting for something that happens elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

BUSY_SECONDS = 120.0
"""How long anything may take on a busy machine: nobody waits for it where it is there sooner."""


def wait_until(condition: Callable[[], Any], *, what: str, seconds: float = BUSY_SECONDS) -> Any:
    """What the condition says once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not after {seconds:g} s"
        time.sleep(0.02)
    return value
