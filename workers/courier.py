"""Messages between a step and its controller where they share no folder: what the step writes into its mailbox on the node appears in
the one on the controller's machine, and what the controller asks for appears in the step's.

So both sides read and write a mailbox as ever (`step.py`, `liveness.py`); between them is one Ray actor on the controller's
node, which keeps parcels until they are fetched and forgets nothing that matters when it is restarted: parcels are sent
until one is acknowledged, and the flags are told again with every exchange.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.liveness import BEAT, STOP, SUPERSEDED, is_superseded
from workers.logs import LOG
from workers.step import PROGRESS

logger = logging.getLogger(__name__)

SEND_SECONDS = 1.0
"""Between two parcels of a step."""
ANSWER_SECONDS = 10.0
"""An answer that takes longer is waited for at the next parcel."""
LEASE_BEATS = 12
"""A step whose parcels went unanswered for so many of its beats has been given up by its controller, or lost it: it must stop."""
MAX_PARCEL_BYTES = 256 * 1024
"""Of one file: what a step says beyond this in one interval is left out."""
GROWING, REPLACED, FLAGS = (PROGRESS, LOG), (BEAT,), (STOP, SUPERSEDED)
"""Files of a mailbox that only grow, that are written over, and that the controller makes."""

Parcel = dict[str, tuple[int, bytes]]
"""By file: where in it this belongs, and the bytes. Of a file that is written over: 0, and all of it."""


class PostOffice:
    """The actor: parcels of all steps of one controller, by attempt, and the flags that the controller has raised."""

    def __init__(self) -> None:
        self._parcels: dict[str, list[Parcel]] = {}
        self._flags: Mapping[str, Sequence[str]] = {}

    def send(self, key: str, parcel: Parcel) -> list[str]:
        """From a step; returns the flags that are up for it."""
        if parcel:
            self._parcels.setdefault(key, []).append(parcel)
        return list(self._flags.get(key, ()))

    def exchange(self, flags: Mapping[str, Sequence[str]]) -> dict[str, list[Parcel]]:
        """From the controller: all flags that are up; returns what came since the last call."""
        self._flags = flags
        parcels, self._parcels = self._parcels, {}
        return parcels


@dataclass(slots=True, kw_only=True)
class Collector:
    """Reads what a step has added to its mailbox since the last parcel that arrived."""

    folder: Path
    _read: dict[str, int] = field(default_factory=dict)
    _last: dict[str, bytes] = field(default_factory=dict)

    def collect(self) -> Parcel:
        parcel: Parcel = {}
        for name in GROWING:
            offset = self._read.get(name, 0)
            try:
                with (self.folder / name).open("rb") as file:
                    offset = max(offset, file.seek(0, os.SEEK_END) - MAX_PARCEL_BYTES)
                    file.seek(offset)
                    added = file.read()
            except FileNotFoundError:
                continue
            if added:
                parcel[name] = offset, added
        for name in REPLACED:
            content = _read_if_there(self.folder / name)
            if content is not None and content != self._last.get(name):
                parcel[name] = 0, content
        return parcel

    def arrived(self, parcel: Parcel) -> None:
        """The parcel is acknowledged: it is not sent again."""
        for name, (offset, content) in parcel.items():
            if name in GROWING:
                self._read[name] = offset + len(content)
            else:
                self._last[name] = content


@dataclass(slots=True, kw_only=True)
class Deliverer:
    """Writes parcels into a mailbox; one that came twice is written once."""

    folder: Path
    _written: dict[str, int] = field(default_factory=dict)

    def deliver(self, parcel: Parcel) -> None:
        for name, (offset, content) in parcel.items():
            if name in REPLACED:
                (self.folder / name).write_bytes(content)
                continue
            new = content[max(0, self._written.get(name, 0) - offset) :]
            with (self.folder / name).open("ab") as file:
                file.write(new)
            self._written[name] = max(self._written.get(name, 0), offset + len(content))


def raised_flags(folder: Path) -> list[str]:
    """What the controller asks of the step with this mailbox; a mailbox that is gone asks it to leave no trace."""
    if is_superseded(folder):
        return [STOP, SUPERSEDED]
    return [name for name in FLAGS if (folder / name).exists()]


@contextmanager
def carrying(folder: Path, *, send: Callable[[Parcel], list[str]], beat_seconds: float) -> Iterator[None]:
    """While the context lasts, and once more at its end, carry between the mailbox of a step and its controller.

    Args:
        send: hands a parcel over and returns the flags; raises where there is no answer.
        beat_seconds: how often the step beats.
    """
    ended = threading.Event()
    courier = _Courier(collector=Collector(folder=folder), send=send, patience=LEASE_BEATS * beat_seconds)

    def carry() -> None:
        while not ended.wait(min(SEND_SECONDS, beat_seconds / 2)):
            courier.exchange()

    thread = threading.Thread(target=carry, daemon=True, name="courier")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        courier.exchange()


@dataclass(slots=True, kw_only=True)
class _Courier:
    collector: Collector
    send: Callable[[Parcel], list[str]]
    patience: float
    """Seconds without an answer after which the step has to stop."""
    answered: float = field(default_factory=time.monotonic)

    def exchange(self) -> None:
        parcel = self.collector.collect()
        try:
            flags = self.send(parcel)
        # Broad: whatever stands between two machines. What was not acknowledged is sent again.
        except Exception as error:
            logger.warning("controller does not answer: %s", error, extra={"action": "courier_failed"})
            flags = [STOP, SUPERSEDED] if time.monotonic() - self.answered > self.patience else []
        else:
            self.answered = time.monotonic()
            self.collector.arrived(parcel)
        for flag in flags:
            (self.collector.folder / flag).touch()


def _read_if_there(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def sender(post_office: Any, key: str) -> Callable[[Parcel], list[str]]:
    """The `send` of a step on a Ray node."""
    import ray

    def send(parcel: Parcel) -> list[str]:
        flags: list[str] = ray.get(post_office.send.remote(key, parcel), timeout=ANSWER_SECONDS)
        return flags

    return send
