"""What a search does next, and why it does no more: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from nas.shape import Shape
from nas.space import Choices

LimitReason = Literal["time_limit", "token_limit", "device_seconds_limit"]
LIMIT_REASONS: tuple[LimitReason, ...] = get_args(LimitReason)
EndReason = Literal["max_trials", "space_exhausted"] | LimitReason


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTrial:
    """Propose this shape."""

    origin: str
    shape: Shape
    choices: Choices | None
    budget: int = 0
    """Index of the budget that proposes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """Run this trial's next rung."""

    trial: int
    rung: int
