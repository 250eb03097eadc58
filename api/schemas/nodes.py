"""Machines of the cluster."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from api.schemas.common import Answer


class NodeAnswer(Answer):
    """A machine of the cluster that runs steps."""

    object: Literal["node"] = "node"
    id: str
    """Ray's; new with every start of the node."""
    host: str
    address: str
    state: Literal["joining", "fit", "unfit", "gone"]
    """Not checked yet; gets steps; gets none, for its problems; has left the cluster."""
    problems: list[str]
    """What was expected there, and what was found."""
    warnings: list[str]
    facts: dict[str, Any]
    """cpus, gpus, devices, memory_bytes, versions, cache, cache_free_bytes, clock_offset_seconds, as far as they are known."""
    checked_at: datetime | None
    seen_at: datetime
