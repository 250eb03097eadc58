"""Trials, with their results by rung, attempts and learning curves."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from api.schemas.common import Answer
from api.schemas.results import BundleAnswer
from nas.shape import Shape
from nas.store.records import AttemptState, TrialState


class MetricAnswer(Answer):
    """A mean over documents."""

    value: float
    standard_error: float
    higher_is_better: bool


class RungAnswer(Answer):
    """What one rung of one trial measured."""

    rung: int
    tokens: int
    kl: MetricAnswer
    """KL(teacher || student) per token on the held-out blocks, nats."""
    loss: MetricAnswer
    """Cross-entropy per token on the held-out blocks, nats."""
    tasks: dict[str, MetricAnswer]
    parameters: int
    """Counted from the tensors."""
    seconds: dict[str, float]
    """Wall seconds by step."""
    reused_from: dict[str, Any] | None = None
    """The `search` and `trial` that measured it, where it was known from an earlier search (`warm_start_from`) and not measured again."""
    finished_at: datetime


class AttemptAnswer(Answer):
    """One try at one step of a search."""

    id: str
    stage: str
    """prepare, rung, confirm or bundle."""
    trial: int | None
    rung: int | None
    state: AttemptState
    reason: str | None
    started_at: datetime
    finished_at: datetime | None


class PointAnswer(Answer):
    """One point of a learning curve."""

    rung: int
    tokens: int
    loss: float
    """The distillation loss: forward KL to the teacher per token, nats."""
    learning_rate: float
    tokens_per_second: float


class TrialAnswer(Answer):
    """One shape that the search evaluates."""

    object: Literal["trial"] = "trial"
    number: int
    origin: str
    """`sampler`, `anchor:<name>`, `user` (named in the spec) or `control` (random, never the winner)."""
    shape: Shape
    budget: int = 0
    """Index of the search's budget that it was proposed for."""
    parameters: int
    state: TrialState
    rung: int | None
    """The deepest rung that it has finished."""
    failure: dict[str, Any] | None
    """stage, reason, message, attempts, and the last lines of the last one's log."""
    confirmation: dict[str, Any] | None
    """Of a finalist: verified, the reason if not, parameters of the file, the held-out result, latency."""
    created_at: datetime
    updated_at: datetime


class CurveAnswer(Answer):
    """A trial's learning curve, or an even choice of its points."""

    object: Literal["metrics"] = "metrics"
    search: str
    trial: int
    num_points: int
    """Points that there are; `points` has at most as many as were asked for."""
    points: list[PointAnswer]


class TrialDetail(TrialAnswer):
    """One trial with everything that was measured."""

    rungs: list[RungAnswer]
    attempts: list[AttemptAnswer]
    points: list[PointAnswer]
    bundle: BundleAnswer | None
    """The winner's own, or the one that was asked for (`POST .../bundle`); null where nobody asked."""
