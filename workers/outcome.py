"""How a step ended: what it leaves in its folder, last, and what the controller reads there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULT = "result.json"

NOT_PREPARED = "not_prepared"
"""How a step ends that finds no prepared folder: its search prepares again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a step ended. Expected failures are values."""

    succeeded: bool
    result: dict[str, Any] | None = None
    reason: str | None = None
    """out_of_memory, does_not_fit, disk_full, diverged, stopped, superseded, preempted, node_unfit, worker_died, timeout, no_resources, unavailable,
    files_unavailable, not_prepared, corrupt_file, invalid_result, error."""
    message: str = ""
    retryable: bool = True

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        return cls(**values)


def read_outcome(folder: Path) -> Outcome | None:
    """The outcome that a step left, None while there is none. A file that holds none is a result that nobody can believe."""
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        return Outcome.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        return Outcome(succeeded=False, reason="invalid_result", message=f"{RESULT}: expected an outcome, got {type(error).__name__}: {error}")
