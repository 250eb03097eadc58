"""Events."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from api.schemas.common import Answer


class EventAnswer(Answer):
    """One thing that happened in a search."""

    sequence: int
    """1, 2, ... without a gap; the id of the event in the stream."""
    type: str
    data: dict[str, Any]
    created_at: datetime
