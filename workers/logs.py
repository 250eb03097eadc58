"""The log of an attempt: all that a step says goes to `log.txt` in its folder, and the controller keeps the end of it.

Captured are our logging and that of libraries, warnings, prints, and what native code writes to standard output and error; a
crash of the interpreter leaves its stack there too. Lines of logging carry time, level, search, trial and attempt.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from nas.logs import about, find_secrets, make_formatter, redact
from nas.store.machines import Fence
from nas.store.store import Store

LOG = "log.txt"
MAX_LOG_BYTES = 64 * 1024
"""What the store keeps of an attempt's log, from its end."""
LOG_SECONDS = 5.0
"""Between two looks at the logs of a search's running steps."""
LOG_SECONDS_PER_STEP = 0.05
"""And for every running step at least this: a log costs the controller a few milliseconds (LOG), so a few per cent of its time however many run."""
FAILURE_LINES = 20
"""How many of the last lines a failure carries."""


@contextmanager
def captured(folder: Path, *, context: Mapping[str, str | int | None]) -> Iterator[None]:
    """Everything that this process says inside is appended to the log of this folder, and only there; afterwards all is as it was.

    By file descriptor, hence for one step of a process at a time; a worker that runs many steps gives each its own file.

    Args:
        context: what the lines carry: search_id, trial, attempt_id.
    """
    with _open_log(folder) as file, about(**context):
        _flush()
        saved = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for number, _ in saved:
                os.dup2(file.fileno(), number)
            if not faulthandler.is_enabled():
                faulthandler.enable(file=2)  # by number: it writes wherever standard error leads when the crash comes
            with _logging_to(file):
                yield
        finally:
            _flush()
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)


@contextmanager
def _open_log(folder: Path) -> Iterator[TextIO]:
    file = (folder / LOG).open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    try:
        yield file
    finally:
        with suppress(OSError):  # a full disk must not turn a step's end into another one
            file.close()


@contextmanager
def _logging_to(file: TextIO) -> Iterator[None]:
    root, show = logging.getLogger(), warnings.showwarning
    level, handler = root.level, logging.StreamHandler(file)
    handler.setFormatter(make_formatter("text", environment=os.environ))
    root.addHandler(handler)
    root.setLevel(min(level, logging.INFO))
    warnings.showwarning = _log_warning
    try:
        yield
    finally:
        warnings.showwarning = show
        root.setLevel(level)
        root.removeHandler(handler)


def _log_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
    logging.getLogger("py.warnings").warning("%s: %s", category.__name__, message, extra={"file": f"{filename}:{lineno}"})


def _flush() -> None:
    """What Python and the C library still hold back belongs to whoever wrote it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError, OSError):  # closed, or its disk is full: there is nobody to tell
            stream.flush()
    ctypes.CDLL(None).fflush(None)


def read_tail(folder: Path) -> str | None:
    """The end of an attempt's log, at most MAX_LOG_BYTES of it, without secrets; None where it cannot be read: the node may be gone."""
    try:
        with (folder / LOG).open("rb") as file:
            left_out = max(0, file.seek(0, os.SEEK_END) - MAX_LOG_BYTES)
            file.seek(left_out)
            text = file.read(MAX_LOG_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    if left_out:
        # From a whole line on: the rest of a cut one may be half of a secret.
        text = f"... {left_out} bytes before this are not kept\n{text.partition(chr(10))[2]}"
    return redact(text, secrets=find_secrets(os.environ))


class LogKeeper:
    """Keeps the logs of a search's running steps now and then, for those who follow them; the whole end of each is kept when its attempt ends."""

    def __init__(self, search_id: str, *, store: Store, fence: Fence, clock: Callable[[], float]) -> None:
        self._search_id, self._store, self._fence, self._clock = search_id, store, fence, clock
        self._kept_at = -math.inf
        self._sizes: dict[str, int] = {}

    def keep(self, running: Mapping[str, Path]) -> None:
        """Keep what has grown since the last time.

        Args:
            running: folders by attempt.
        """
        if self._clock() - self._kept_at < max(LOG_SECONDS, LOG_SECONDS_PER_STEP * len(running)):
            return
        self._kept_at = self._clock()
        sizes = {key: _log_bytes(folder) for key, folder in running.items()}
        tails = {key: read_tail(running[key]) for key, size in sizes.items() if size != self._sizes.get(key, 0)}
        self._sizes = sizes
        if logs := {key: text for key, text in tails.items() if text is not None}:
            self._store.save_logs(self._search_id, logs, fence=self._fence)


def _log_bytes(folder: Path) -> int:
    try:
        return os.stat(f"{folder}/{LOG}").st_size
    except OSError:
        return 0


def last_lines(text: str | None, *, count: int = FAILURE_LINES) -> str:
    """The last lines of a log, for a failure; empty where there is none."""
    return "\n".join((text or "").splitlines()[-count:])[-4000:]
