"""Full distillations as jobs of the service: what a user asks for, and what it means here and now. No compute, no torch."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass as checked_dataclass

from nas.errors import Conflict, InvalidSpec, NotFound, Problem
from nas.recipe import Recipe, full_recipe
from nas.settings import Settings
from nas.spec import LINE, Count, LimitSpec, SearchSpec, Seconds, parse_spec
from nas.store.records import DEFAULT_PROJECT, SearchRecord, SearchState, all_winners
from nas.store.store import Store
from nas.strict_json import read_object, validate
from nas.trial_files import check_student

_value = checked_dataclass(
    frozen=True, slots=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
)


@_value
class RecipeChanges:
    """What is other than in the recipe of the student's bundle; null is as there."""

    tokens: Count | None = None
    """Tokens trained on; the bundle's are ten times those of the last rung."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Constant along the trunk."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Sequences per step."""
    sequence_length: Annotated[int, Field(ge=8, le=2**24)] | None = None
    """Tokens per sequence; at most the teacher's context."""
    warmup_tokens: Annotated[int, Field(ge=0, le=2**53)] | None = None
    """Linear warm-up at the start."""
    decay_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The last share of the tokens, over which the rate falls linearly to zero."""
    optimizer: Literal["adamw", "muon"] | None = None
    weight_decay: Annotated[float, Field(ge=0, le=10)] | None = None
    validation_tokens: Annotated[int, Field(ge=16, le=2**53)] | None = None
    """Held-out tokens on which KL and loss are measured before and after; at least two sequences."""
    micro_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Sequences per forward pass."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Arithmetic of the passes, where the device has it."""
    moments: Literal["auto", "float32", "offloaded", "bfloat16"] | None = None
    """Optimiser state; auto: the first that fits."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    """Of the order of the text."""


@_value
class DistillationResources:
    """What the distillation may use; it runs as one process."""

    cpus: Annotated[float, Field(ge=0.01, le=1024)] = 1.0
    """CPU cores; its threads match them."""
    gpus: Annotated[float, Field(ge=0, le=1)] = 0.0
    """One GPU, or a share of one."""


_LIMITS = TypeAdapter(LimitSpec)


@_value
class DistillationLimits:
    """When to give up."""

    max_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    """Times that it may fail; each goes on from the last checkpoint. A restart of the service does not count, nor does a preemption."""
    max_preemptions: Annotated[int, Field(ge=1, le=1000)] = 100
    """Times that it may be lost with its worker."""
    max_attempt_seconds: Seconds = 10_000_000.0
    """Time limit of one attempt, from its first sign of life, in seconds."""
    max_wait_seconds: Seconds | None = None
    """Longest that an attempt waits for a worker with its resources. None: for ever."""

    def of_step(self) -> LimitSpec:
        """The same as those of a search's step."""
        named = {"max_attempts": self.max_attempts, "max_preemptions": self.max_preemptions, "max_wait_seconds": self.max_wait_seconds}
        return validate({**named, "max_rung_seconds": self.max_attempt_seconds}, adapter=_LIMITS)


@_value
class DistillationRequest:
    """A full distillation of a student that a search has found."""

    search_id: Annotated[str, Field(pattern=r"^srch_[0-9a-z]{1,64}$")]
    """The search; it has succeeded."""
    trial: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """A trial that the confirm step verified; null: the winner of `budget`."""
    budget: Annotated[int, Field(ge=0, le=15)] = 0
    """Whose winner: 0 the search's own, 1 the first of its `more_budgets`, ..."""
    recipe: RecipeChanges = Field(default_factory=RecipeChanges)
    resources: DistillationResources = Field(default_factory=DistillationResources)
    limits: DistillationLimits = Field(default_factory=DistillationLimits)
    label: Annotated[str, Field(max_length=200)] = ""
    """For people."""

    @model_validator(mode="after")
    def _one_student(self) -> DistillationRequest:
        if self.trial is not None and self.budget:
            raise ValueError("either a trial, or the budget whose winner is meant; not both")
        return self


ADAPTER = TypeAdapter(DistillationRequest)
_CHANGES = TypeAdapter(RecipeChanges)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationPlan:
    """A distillation that can be run."""

    trial: int
    spec: dict[str, Any]
    """As it is stored and run, the recipe complete."""
    inputs: dict[str, Any]
    """The teacher and the corpora, as they were registered when the search was submitted."""
    tokens: int
    """That it trains on: whole steps."""


def parse_distillation(text: str | bytes) -> DistillationRequest:
    """Read JSON strictly.

    Raises:
        InvalidSpec
    """
    return validate(read_object(text), adapter=ADAPTER)


def check_distillation(asked: DistillationRequest, *, store: Store, settings: Settings, project: str = DEFAULT_PROJECT) -> DistillationPlan:
    """Look up the student, and complete the recipe.

    Raises:
        InvalidSpec: no such search of the project, trial or winner; a recipe that does not fit together, or not the teacher's context.
        Conflict: the search has not succeeded, the trial was not verified, or its student was not kept.
        FilesUnavailable: the machines share files by URL, which cannot be reached now.
    """
    if re.fullmatch(LINE, asked.label) is None:
        raise InvalidSpec(Problem(field="label", expected="a line of text without control characters", got=repr(asked.label)[:80]))
    try:
        search = store.get_search(asked.search_id, project=project)
    except NotFound:
        raise InvalidSpec(Problem(field="search_id", expected="the id of a search of this project", got=asked.search_id)) from None
    if search.state is not SearchState.SUCCEEDED:
        raise Conflict(f"search {search.id}: expected the state succeeded, got {search.state}; there is nothing to distil")
    spec = parse_spec(json.dumps(search.spec))
    trial = _find_trial(asked, search=search, store=store, settings=settings)
    recipe = _complete(asked.recipe, spec=spec, context=search.inputs["teacher"]["config"].get("max_position_embeddings"))
    stored = {**ADAPTER.dump_python(asked, mode="json"), "trial": trial, "recipe": asdict(recipe)}
    inputs = {name: search.inputs[name] for name in ("teacher", "corpora")}
    step = recipe.batch_size * recipe.sequence_length
    return DistillationPlan(trial=trial, spec=stored, inputs=inputs, tokens=-(-recipe.tokens // step) * step)


def winner_of(search: SearchRecord, *, trial: int) -> dict[str, Any] | None:
    """The winner that is this trial; None where it is none, and has no bundle yet."""
    return next((winner for winner in all_winners(search) if winner["trial"] == trial), None)


def _find_trial(asked: DistillationRequest, *, search: SearchRecord, store: Store, settings: Settings) -> int:
    if asked.trial is None:
        winners = {winner["budget"]: winner["trial"] for winner in all_winners(search)}
        if asked.budget not in winners:
            raise InvalidSpec(Problem(field="budget", expected=f"one that has a winner ({', '.join(map(str, winners)) or 'none has'})", got=str(asked.budget)))
        return int(winners[asked.budget])
    try:
        trial = store.get_trial(search.id, asked.trial)
    except NotFound:
        raise InvalidSpec(Problem(field="trial", expected=f"the number of a trial of search {search.id}", got=str(asked.trial))) from None
    if winner_of(search, trial=asked.trial) is None:
        check_student(search, trial, store=store, settings=settings)
    return asked.trial


def _complete(changes: RecipeChanges, *, spec: SearchSpec, context: object) -> Recipe:
    overrides = {name: value for name, value in _CHANGES.dump_python(changes, mode="json").items() if value is not None}
    try:
        recipe = full_recipe(spec, **overrides)
    except InvalidSpec as wrong:
        raise InvalidSpec(*(Problem(field=f"recipe.{one.field}", expected=one.expected, got=one.got) for one in wrong.problems)) from wrong
    problems = []
    if isinstance(context, int) and recipe.sequence_length > context:
        problems.append(Problem(field="recipe.sequence_length", expected=f"at most the teacher's context of {context}", got=str(recipe.sequence_length)))
    if recipe.tokens < (least := 2 * recipe.batch_size * recipe.sequence_length):
        problems.append(Problem(field="recipe.tokens", expected=f"at least two steps of batch_size x sequence_length = {least // 2}", got=str(recipe.tokens)))
    if recipe.warmup_tokens > recipe.tokens:
        problems.append(Problem(field="recipe.warmup_tokens", expected=f"at most the {recipe.tokens} tokens of the whole", got=str(recipe.warmup_tokens)))
    if problems:
        raise InvalidSpec(*problems)
    return recipe
