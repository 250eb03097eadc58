"""The leaderboard."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from api.schemas.common import Answer
from api.schemas.searches import Cost
from nas.shape import Shape
from nas.store.records import SearchState


class DifferenceAnswer(Answer):
    """A score minus the best one, paired over the same documents."""

    value: float | None
    standard_error: float | None
    low: float | None
    """Lower end of the 95 % interval."""
    high: float | None


class LeaderboardRow(Answer):
    """One shape on the board."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    rank: int | None
    """Place of the first row of its tie group; null below the last rung."""
    tie_group: int | None
    """Rows of one group cannot be told apart from the best score among them (1.96 standard errors of the paired difference)."""
    tied: bool = False
    """Whether there are others in its tie group."""
    number: int
    origin: str
    shape: Shape
    parameters: int
    share_of_teacher: float
    rung: int
    tokens: int
    score: float | None
    """Weighted mean over tasks of (metric - random) / (teacher - random): 1 is the teacher, 0 is random weights."""
    standard_error: float | None
    difference: DifferenceAnswer | None = None
    """To the row with the best score; null below the last rung. In the first tie group its interval holds zero."""
    kl: float | None
    """Null if it was not finite."""
    kl_standard_error: float | None
    kl_by_rung: list[float | None] = Field(default=[])
    """The same at each rung that it has finished, rung 0 first."""
    loss: float | None
    tasks: dict[str, dict[str, Any]]
    """By task: value, standard_error, higher_is_better, and its share of the way from random weights (0) to the teacher (1)."""
    costs: dict[str, float] = Field(default={})
    """By name: parameters, memory_bytes, flops_per_token, and latencies in milliseconds where the spec names workloads."""
    state: str | None = None
    verified: bool | None = None
    """Whether plain transformers, in a fresh process, loaded its file and gave the logits that were scored; null for a trial that was not reloaded."""
    probability_best: float | None = None
    """Of a finalist, once all are confirmed: that it has the best score of them, from documents that the search did not use."""
    confirmation: dict[str, Any] | None = None
    """Of a finalist and of the trials that the board compares with: held_out, latency, deployability (where it can be served, by rule), seconds."""


class AgreementAnswer(Answer):
    """How well one order of the trials predicts another, over those that have both."""

    first: str
    second: str
    tau: float | None
    """Kendall's tau-b: 1 for the same order; null with fewer than three trials."""
    num_trials: int


class ControlsAnswer(Answer):
    """Medians over the random controls that reached the last rung."""

    num_trials: int
    score: float | None
    kl: float | None


class TaskSignalAnswer(Answer):
    """How far the teacher stands from random weights on one task."""

    task: str
    teacher: float
    random: float
    z: float | None
    """Combined standard errors by which the teacher is better; null where neither has one."""
    clear: bool
    in_objective: bool
    """Clear, or the spec insists."""
    clear_forms: list[str]
    """Likelihood forms by which the teacher is clear: any can be the task's metric."""


class SeedSpreadAnswer(Answer):
    """The spread between training seeds at one rung."""

    value: float
    """Standard deviation of the KL that is compared there, relative to it, as every tie test takes it: the prior and what was measured, pooled."""
    prior: float
    """From `rungs.seed_spread`."""
    measured: float | None
    """Between the runs of the shape that `controls.num_repeats` trains again, what their blocks show among it; null without repeats."""
    of_blocks: float | None
    """The part of it that the held-out blocks explain."""
    num_runs: int
    """Trainings that it was measured on; 0: the prior alone."""


class RepeatAnswer(Answer):
    """An anchor trained again with another seed: it measures the spread between seeds and is not ranked."""

    number: int
    seed: int
    state: str
    rung: int
    kl_by_rung: list[float | None]
    """Held-out KL at each rung that it has finished, rung 0 first."""
    score: float | None


class LeaderboardAnswer(Answer):
    """A page of the board. In the board's own order rows of the last rung come first, by rank, then those stopped earlier."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    object: Literal["leaderboard"] = "leaderboard"
    search: str
    state: SearchState
    budget: int = 0
    """Index of the search's budget that this is the board of; cost and baselines are of the whole search."""
    version: int | None = None
    """Of the board: the sequence of the event `leaderboard.changed` that announced it; null before the first result."""
    num_rows: int = 0
    """Rows of the whole board of this budget, whatever this page was filtered by."""
    has_more: bool = False
    next_cursor: str | None = None
    """Give it as `after` to get the next page of this version; null on the last one."""
    winners: list[int | None] = Field(default_factory=list)
    """The winner of each budget, null where there is none yet."""
    rows: list[LeaderboardRow]
    leader: int | None = None
    """The first finalist until there is a winner, then the winner."""
    finalists: list[int] = Field(default=[])
    """Trials among which the confirm step decides: the first of the first tie group, controls left out, and those that failed their confirmation."""
    winner: int | None = None
    """The finalist with the best score on documents that the search did not use; null until all finalists are confirmed."""
    weak_tasks: list[str] = Field(default=[])
    """Tasks on which the teacher beats random weights by less than two standard errors: left out of the score, unless the spec insists."""
    task_signals: list[TaskSignalAnswer] = Field(default=[])
    """The teacher against random weights on every task, in the spec's order."""
    pareto: list[int] = Field(default_factory=list)
    """Trials that no other one beats in score and the costs that `objectives` names (the parameters, where it names none)."""
    agreement: list[AgreementAnswer] = Field(default_factory=list)
    controls: ControlsAnswer | None = None
    """Null while no control has reached the last rung."""
    seed_spread: float | None = None
    """Standard deviation of the held-out KL between training seeds at the last rung, relative to the KL."""
    seed_error: float | None = None
    """That of the score: every standard error and interval of a score holds it, beside the error over documents."""
    seed_spreads: list[SeedSpreadAnswer] = Field(default_factory=list)
    """At each trained rung, the first first, and where the number comes from."""
    repeats: list[RepeatAnswer] = Field(default_factory=list)
    """Further trainings of an anchor, apart from the rows."""
    cost: Cost | None = None
    importances: dict[str, float] = Field(default={})
    """Share of the spread of log KL that each choice explains among the shapes measured at one rung (fANOVA), once the search has its winner;
    empty where too few were measured."""
