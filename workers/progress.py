"""What running steps report: lines of their progress files -> points of learning curves and events. Reads files only.

Progress is for display. A line that cannot be shown (a loss that is not finite, a line cut off by a full disk) is dropped.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.store.records import AttemptRecord, PointRecord
from workers.step import PROGRESS
from workers.verdicts import is_number

logger = logging.getLogger(__name__)

_NUMBERS = ("tokens", "loss", "learning_rate", "tokens_per_second")


@dataclass(slots=True, kw_only=True)
class ProgressReader:
    """Follows one progress file."""

    folder: Path
    """The attempt's own."""
    read_bytes: int = 0

    def read(self) -> list[dict[str, Any]]:
        """The lines that were finished since the last call."""
        try:
            # As text: a controller of a thousand workers asks for so many files at every look, and building a path costs more than asking.
            size = os.stat(f"{self.folder}/{PROGRESS}").st_size
        except FileNotFoundError:
            return []
        if size == self.read_bytes:
            return []
        with (self.folder / PROGRESS).open("rb") as file:
            file.seek(self.read_bytes)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]  # the last line may still be being written
        self.read_bytes += len(whole)
        return [line for line in map(_parse, whole.splitlines()) if line is not None]


def make_point(line: dict[str, Any], *, attempt: AttemptRecord) -> PointRecord | None:
    """A line of a rung, or of a full distillation, as a point of its trial's curve; None for any other line, and for one that no training writes."""
    if "tokens" not in line or attempt.trial is None:
        return None
    tokens, loss, learning_rate, tokens_per_second = (line.get(name) for name in _NUMBERS)
    if not (is_number(tokens) and is_number(loss) and is_number(learning_rate) and is_number(tokens_per_second)):
        return None
    return PointRecord(
        search_id=attempt.search_id,
        trial=attempt.trial,
        rung=attempt.rung or 0,
        tokens=int(tokens),
        loss=loss,
        learning_rate=learning_rate,
        tokens_per_second=tokens_per_second,
    )


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if isinstance(values, dict):
        return values
    logger.warning("progress line dropped", extra={"action": "progress_dropped", "line": line[:200]})
    return None
