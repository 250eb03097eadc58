"""The project of a key: what it may use, and what it uses."""

from __future__ import annotations

from typing import Literal

from api.schemas.common import Answer


class QuotasAnswer(Answer):
    """Limits of a project; null is no limit. A day is one of UTC."""

    max_active_searches: int | None
    max_active_trials: int | None
    """Of all its searches that have not ended, together."""
    max_tokens_per_day: int | None
    """Distillation tokens that are planned at submit."""
    max_device_seconds_per_day: float | None
    """Spent ones, after which no further search is taken."""


class UsageAnswer(Answer):
    """What a project uses now."""

    active_searches: int
    active_trials: int
    tokens_today: int
    device_seconds_today: float


class ProjectAnswer(Answer):
    """Who asks: the project, and what it may."""

    object: Literal["project"] = "project"
    name: str
    key_id: str | None
    """The visible part of the key that asks; null in single-user mode."""
    scopes: list[Literal["read", "submit", "admin"]]
    quotas: QuotasAnswer
    usage: UsageAnswer
