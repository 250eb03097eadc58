"""Full distillations: in a list, and in full."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from api.schemas.common import Answer
from api.schemas.searches import Input
from api.schemas.trials import AttemptAnswer, PointAnswer

DistillationState = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]


class DistillationSummary(Answer):
    """One full distillation, as in the list."""

    object: Literal["distillation"] = "distillation"
    id: str
    search: str
    """Whose student is distilled; it may have been deleted since."""
    trial: int
    label: str
    state: DistillationState
    tokens: int
    """That the student is distilled on."""
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class HeldOutAnswer(Answer):
    """Likelihood on held-out text, nats per token."""

    kl: float
    """KL(teacher || student)."""
    kl_standard_error: float
    loss: float
    """Cross-entropy."""
    loss_standard_error: float


class DistilledAnswer(Answer):
    """What a distillation made."""

    tokens: int
    seconds: float
    """Of training, over all attempts that led to it."""
    held_out_before: HeldOutAnswer
    held_out_after: HeldOutAnswer
    sha256: str
    """Of the file; also `/v1/artifacts/{sha256}`."""
    bytes: int
    file_url: str
    """A tar file of a folder that plain transformers loads."""


class DistillationAnswer(DistillationSummary):
    """One full distillation."""

    recipe: dict[str, Any]
    """How it is distilled, with everything filled in."""
    resources: dict[str, Any]
    limits: dict[str, Any]
    inputs: list[Input]
    result: DistilledAnswer | None
    """Null until it has succeeded."""
    error: dict[str, Any] | None
    """Why it failed, with the last lines of its log; else null."""
    version: int
    """Grows with everything that happens to it but its learning curve."""


class DistillationDetail(DistillationAnswer):
    """One full distillation with its attempts and its learning curve."""

    tokens_done: int
    """That it has been distilled on, as it last said."""
    seconds_left: float | None
    """Of training, at the speed that it last had; null while it does not run."""
    attempts: list[AttemptAnswer]
    num_points: int
    """Points of the learning curve that there are."""
    points: list[PointAnswer]
    """At most 500 of them, evenly chosen."""
