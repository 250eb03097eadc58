"""What the API answers, as pydantic models: the schemas of the OpenAPI document, and the one place where records become JSON.

The request body of a submit is not here: it is `nas.spec.SearchSpec` itself.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from nas.shape import Shape
from nas.store.records import AttemptState, SearchState, TrialState

_Item = TypeVar("_Item", bound=BaseModel)


class Answer(BaseModel):
    """Base of all answers: built from records by attribute, documented by the docstrings of the fields."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)


class Page(Answer, Generic[_Item]):
    """One page of a list."""

    object: Literal["list"] = "list"
    data: list[_Item]
    has_more: bool = False
    next_cursor: str | None = None
    """Give it as `after` to get the next page; null on the last one."""


class TeacherAnswer(Answer):
    """A registered teacher."""

    object: Literal["teacher"] = "teacher"
    name: str
    digest: str
    """SHA-256 over its files."""
    parameters: int
    config: dict[str, Any]
    """Its Hugging Face `config.json`."""
    added_at: datetime


class CorpusAnswer(Answer):
    """A registered corpus."""

    object: Literal["corpus"] = "corpus"
    name: str
    digest: str
    num_documents: int
    num_bytes: int
    added_at: datetime


class TaskAnswer(Answer):
    """A registered lm-eval task."""

    object: Literal["task"] = "task"
    name: str
    digest: str
    card: dict[str, Any]
    """Its metrics (the first one is the default), documents and lm-eval version."""
    added_at: datetime


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
    state: SearchState
    teacher: str
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
    decisions: list[DecisionCost] = []


class Input(Answer):
    """One registered thing that the search uses, as it was when the search was submitted."""

    kind: Literal["teacher", "corpus", "task"]
    name: str
    digest: str


class SearchAnswer(SearchSummary):
    """One search in full."""

    spec: dict[str, Any]
    """The submitted spec with presets and defaults filled in; it can be submitted again as it is."""
    plan: dict[str, Any]
    """What submit worked out: legal shapes, budget, teacher parameters, anchors, tokens per rung."""
    inputs: list[Input]
    rungs: list[RungProgress]
    cost: Cost
    error: dict[str, Any] | None
    """Why the search failed; null unless it did."""
    end_reason: str | None = None
    """Why it proposes no more shapes: `max_trials`, or `space_exhausted` where there are fewer legal ones; null while it does."""


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
    """For each `shape` of the query: its parameters, whether it is legal, and the rules that it breaks."""


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
    """One try at one step of a trial."""

    id: str
    stage: str
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
    confirmation: dict[str, Any] | None
    """Of a finalist: verified, the reason if not, parameters of the file, the held-out result, latency."""
    created_at: datetime
    updated_at: datetime


class TrialDetail(TrialAnswer):
    """One trial with everything that was measured."""

    rungs: list[RungAnswer]
    attempts: list[AttemptAnswer]
    points: list[PointAnswer]


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
    loss: float | None
    tasks: dict[str, dict[str, Any]]
    """By task: value, standard_error, higher_is_better, and its share of the way from random weights (0) to the teacher (1)."""
    costs: dict[str, float] = {}
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


class LeaderboardAnswer(Answer):
    """The board as it stands: rows of the last rung first, by rank, then those stopped earlier."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    object: Literal["leaderboard"] = "leaderboard"
    search: str
    state: SearchState
    budget: int = 0
    """Index of the search's budget that this is the board of; cost and baselines are of the whole search."""
    winners: list[int | None] = Field(default_factory=list)
    """The winner of each budget, null where there is none yet."""
    rows: list[LeaderboardRow]
    leader: int | None = None
    """The first finalist until there is a winner, then the winner."""
    finalists: list[int] = []
    """Trials among which the confirm step decides: the first of the first tie group, controls left out, and those that failed their confirmation."""
    winner: int | None = None
    """The finalist with the best score on documents that the search did not use; null until all finalists are confirmed."""
    weak_tasks: list[str] = []
    """Tasks on which the teacher beats random weights by less than two standard errors: left out of the score, unless the spec insists."""
    task_signals: list[TaskSignalAnswer] = []
    """The teacher against random weights on every task, in the spec's order."""
    pareto: list[int] = Field(default_factory=list)
    """Trials that no other one beats in score and the costs that `objectives` names (the parameters, where it names none)."""
    agreement: list[AgreementAnswer] = Field(default_factory=list)
    controls: ControlsAnswer | None = None
    """Null while no control has reached the last rung."""
    seed_spread: float | None = None
    """Standard deviation of the held-out KL between training seeds, relative to the KL."""
    seed_error: float | None = None
    """That of the score: every standard error and interval of a score holds it, beside the error over documents."""
    cost: Cost | None = None
    importances: dict[str, float] = {}
    """Share of the spread of log KL that each choice explains among the shapes measured at one rung (fANOVA), once the search has its winner;
    empty where too few were measured."""


class GapAnswer(Answer):
    """The second search's figure minus the first one's."""

    value: float
    standard_error: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    paired: bool
    """Whether it was taken document by document; otherwise it has the errors of both sides."""


class BothFigures(Answer):
    """One shape that is on both boards."""

    shape: Shape
    parameters: int
    first: dict[str, Any]
    """Its row on the first board: number, origin, rank, rung, tokens, score, standard_error, kl."""
    second: dict[str, Any]


class ComparisonAnswer(Answer):
    """Two searches side by side; every pair is (first, second)."""

    object: Literal["comparison"] = "comparison"
    searches: tuple[str, str]
    states: tuple[SearchState, SearchState]
    spec: dict[str, tuple[Any, Any]]
    """Fields of the spec that differ, by dotted path."""
    inputs: dict[str, tuple[str | None, str | None]]
    """Digests of teacher, corpora and tasks that differ, by kind and name."""
    documents: Literal["held_out", "search"]
    """held_out where both leaders were confirmed; search: the documents by which they were chosen, which flatters both."""
    other_documents: list[str]
    """Why the two were not scored on the same documents; empty: they were, and differences are paired."""
    best: tuple[dict[str, Any] | None, dict[str, Any] | None]
    """The leading rows."""
    tasks: dict[str, GapAnswer]
    """Leader against leader, by task that both scored with the same metric."""
    kl: GapAnswer | None
    """Of KL to the teacher, where that is the same."""
    shapes: list[BothFigures]
    """Shapes on both boards, in the order of the first."""
    cost: tuple[Cost, Cost]


class EventAnswer(Answer):
    """One thing that happened in a search."""

    sequence: int
    """1, 2, ... without a gap; the id of the event in the stream."""
    type: str
    data: dict[str, Any]
    created_at: datetime


class WinnerAnswer(Answer):
    """The winning shape: its config, where it comes from, and what it scored."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    object: Literal["winner"] = "winner"
    search: str
    bundle_url: str
    """Where the bundle (a tar file) is downloaded."""
    bundle_sha256: str


class Health(Answer):
    """The service answers."""

    status: Literal["ok", "ready"]


class FieldError(Answer):
    """One thing that is wrong with a request."""

    field: str
    """Dotted path of the field: `budget.max_parameters`."""
    expected: str
    got: str


class ProblemAnswer(Answer):
    """RFC 9457 problem: every error has this shape."""

    type: str
    """Address of the page that explains this kind of problem."""
    title: str
    status: int
    detail: str
    instance: str
    errors: list[FieldError] | None = None
