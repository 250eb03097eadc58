"""Signs of life of a running step, and the end of its right to leave any trace, both in its mailbox. Files only.

A step beats: a thread rewrites a few bytes in place, also on a full disk, also while the step computes in native code that
lets go of Python's lock (torch's operators do). It cannot while native code keeps that lock, nor while the process is stopped or
its node is gone: who listens gives such a step up.

A step that was given up may be alive all the same, and wake up beside the attempt that took its place. Before a file of its
gets its name (`nas.compress.manifest.publish`) it looks whether it was superseded, or its mailbox is gone with its search;
then nothing of it is published any more.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BEAT, STOP, SUPERSEDED = "beat", "stop", "superseded"
"""Names in a step's mailbox."""

logger = logging.getLogger(__name__)


@contextmanager
def beating(folder: Path, *, seconds: float) -> Iterator[None]:
    """Beat every so many seconds, the first time before anything else."""
    ended = threading.Event()
    _beat(folder / BEAT, count=0)

    def beat() -> None:
        for count in itertools.count(1):
            if ended.wait(seconds):
                return
            _beat(folder / BEAT, count=count)

    thread = threading.Thread(target=beat, daemon=True, name="beat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=seconds)


def read_beat(folder: Path) -> str | None:
    """Some text that differs from one beat to the next; None: the step has not begun."""
    try:
        return (folder / BEAT).read_text(encoding="ascii")
    except FileNotFoundError:
        return None


def ask_to_stop(folder: Path) -> None:
    """Ask the step with this mailbox to save what it has and end, also one that has not begun yet."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STOP).touch()


def supersede(folder: Path) -> None:
    """Take a step's right to publish, before another attempt takes its place; it ends when it sees that."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SUPERSEDED).touch()
        (folder / STOP).touch()
    except OSError:  # a full disk: nobody else could say it either, and the search must go on
        logger.exception("a step could not be told that it was superseded", extra={"action": "supersede_failed", "folder": str(folder)})


def is_superseded(folder: Path) -> bool:
    """Whether nothing of the step with this mailbox counts any more."""
    return not folder.is_dir() or (folder / SUPERSEDED).exists()


def _beat(file: Path, *, count: int) -> None:
    try:
        # In place: that needs no room. Opened anew each time: closing is what makes a network's file system show it to others.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, b"%012d\n" % count)
        finally:
            os.close(descriptor)
    except OSError as error:
        logger.warning("no beat: %s", error, extra={"action": "beat_failed"})
