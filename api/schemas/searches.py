"""Searches: in a list, in full, and as a preview."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from api.schemas.common import Answer
from nas.spec import ONLY_THESE, LabelName, LabelValue
from nas.store.records import SearchState, TrialState


class RungProgress(Answer):
    """How many trials have been through one rung."""

    rung: int
    tokens: int
    """Tokens that a trial has been distilled on when it is scored at this rung; 0 at rung 0."""
    finished: int
    running: int


class Progress(Answer):
    """How far a search is."""

    planned: int
    """Most trials there will be: proposals, anchors and named shapes, random controls."""
    proposed: int
    settled: int
    """Trials that will not go on: completed, stopped early, failed or cancelled."""
    trials: dict[TrialState, int]
    """Number of trials by state."""
    seconds_left: float | None
    """Wall seconds until the last rung is through, at the search's own speed when a trial last finished a rung; null before one was trained, and afterwards."""


class Best(Answer):
    """The first row of the board."""

    trial: int
    score: float
    standard_error: float


class SearchSummary(Answer):
    """One search, as in the list."""

    object: Literal["search"] = "search"
    id: str
    label: str
    labels: dict[str, str]
    state: SearchState
    teacher: str
    """Name of a registered teacher, or id of the search whose winner is the teacher."""
    teacher_search: str | None
    """That id, where the teacher is the winner of a search; else null."""
    waits_for: str | None
    """The same while that search has not ended: this one stays in the queue, and its plan is for the largest shape that may win."""
    max_parameters: int | None
    """The budget, in parameters."""
    share_of_teacher: float | None
    """The budget as a share of the teacher."""
    progress: Progress
    best: Best | None
    """Null until a shape has reached the last rung."""
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class DecisionCost(Answer):
    """What one decision took: a rung decides who goes on, the confirm step who wins."""

    decision: str
    """`rung 0`, `rung 1`, ..., `confirm`."""
    trials: int
    """Trials that were measured for it."""
    chosen: int
    """Trials that have gone on from the rung so far; from the last one, the finalists; the winner."""
    tokens: int
    device_seconds: float
    tokens_per_chosen: float | None
    """Null while none is chosen."""
    device_seconds_per_chosen: float | None


class Cost(Answer):
    """What the search has cost so far, all finished steps together, as of its last result."""

    distillation_tokens: int
    """Tokens trained on by all finished rungs: what each adds to the rung below, and the decay branch that the rung below threw away."""
    step_seconds: dict[str, float]
    """Wall seconds by step: prepare, the steps of the rungs, confirm."""
    device_seconds: float
    """Wall seconds times the devices of a step: its GPUs, or its CPU cores where it has none."""
    decisions: list[DecisionCost] = Field(default=[])


class Input(Answer):
    """One registered thing that the search uses, as it was when the search was submitted."""

    kind: Literal["teacher", "corpus", "task"]
    name: str
    digest: str | None
    """Null of a teacher that another search is still looking for."""


class SearchAnswer(SearchSummary):
    """One search in full."""

    spec: dict[str, Any]
    """The submitted spec with presets and defaults filled in; it can be submitted again as it is."""
    plan: dict[str, Any]
    """What submit worked out: legal shapes, budget, teacher parameters, anchors, tokens per rung."""
    inputs: list[Input]
    rungs: list[RungProgress]
    cost: Cost
    version: int
    """Grows with everything that happens to the search; also its ETag."""
    error: dict[str, Any] | None
    """Why the search failed, or was paused by itself; else null."""
    end_reason: str | None = None
    """Why it proposes no more shapes: `max_trials`, or `space_exhausted` where there are fewer legal ones; null while it does."""


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True))
class SearchUpdate:
    """What may change of a search that has not ended; what is left out stays as it is."""

    max_trials: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Shapes per budget that the sampler proposes; not fewer than it has proposed."""
    max_parallel_trials: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Steps that run at once; more that run already end by themselves."""
    labels: Annotated[dict[LabelName, LabelValue], Field(max_length=32, json_schema_extra=ONLY_THESE)] | None = None
    """All labels, in place of those that were there."""


UPDATE_ADAPTER = TypeAdapter(SearchUpdate)


class PreviewAnswer(Answer):
    """What a submit would do; nothing was stored."""

    object: Literal["preview"] = "preview"
    spec: dict[str, Any]
    plan: dict[str, Any]
    """Legal shapes with examples, budget, anchors, trials and tokens by rung, memory and disk: what a submit stores."""
    inputs: list[Input]
    time: dict[str, Any]
    """Device seconds and wall seconds by stage on workers of the speed that was measured once for these resources; `known` is false, with the
    reason, while it was not."""
    asked: list[dict[str, Any]]
    """For each `shape` of the query: its parameters, whether it is legal, the rules that it breaks, and whether it is one of the shapes that are proposed
    (one that is legal and not `proposed` is tried only where the spec names it)."""
