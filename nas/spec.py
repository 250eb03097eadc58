"""SearchSpec: all that one search needs, defined once; the API, the CLI and the store use this same definition.

Strict: no unknown field, no coercion, no non-finite number. What can be checked without knowing the teacher is checked
here; what needs it (ranges, budget) is checked in `space.py`, what needs the registry (names) in `submission.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from nas.shape import Shape
from nas.strict_json import read_object, validate

_CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
_value = dataclass(frozen=True, slots=True, kw_only=True, config=_CONFIG)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
Count = Annotated[int, Field(ge=1, le=2**53)]
Share = Annotated[float, Field(gt=0, le=1)]
LabelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")]
LINE = r"[^\x00-\x1f\x7f-\x9f]{0,200}"
"""A line of text: control characters are commands to a terminal, and PostgreSQL reads nothing out of JSON that has a NUL in it."""
LabelValue = Annotated[str, Field(pattern=f"^{LINE}$", max_length=200)]
ONLY_THESE: dict[str, JsonValue] = {"additionalProperties": False}
"""For the schema of a mapping whose keys have a pattern: pydantic refuses others, but its schema lets them through."""
Seconds = Annotated[float, Field(gt=0, le=10_000_000)]
Objective = Annotated[str, Field(pattern=r"^(parameters|memory_bytes|flops_per_token|(prefill_ms|decode_ms):[A-Za-z0-9][A-Za-z0-9._-]{0,95})$")]
"""A cost that a rung's result carries; of a measured latency with the name of its workload."""


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("each name once")
    return names


@_value
class CorpusPart:
    """One registered corpus of the mixture."""

    name: Name
    """Name under which the operator registered the corpus."""
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Share of the training blocks drawn from this corpus, relative to the other parts."""


@_value
class CorpusSpec:
    """The text to prune and distil on."""

    parts: Annotated[tuple[CorpusPart, ...], Field(min_length=1, max_length=64)]
    """The mixture; one part with weight 1 for a single corpus."""
    sequence_length: Annotated[int, Field(ge=8, le=131072)] = 512
    """Tokens per packed block; at most the teacher's context."""
    calibration_tokens: Annotated[int, Field(ge=256, le=2**31)] = 131_072
    """Tokens on which importance and depth are measured."""
    validation_tokens: Annotated[int, Field(ge=256, le=2**31)] = 32_768
    """Held-out tokens on which the rungs are compared (KL to the teacher)."""


@_value
class TaskSpec:
    """One lm-eval task of the objective."""

    name: Name
    """Name under which the operator registered the task."""
    metric: str | None = None
    """lm-eval metric without its filter: acc, acc_norm, bits_per_byte, ..., or a likelihood form: logprob_per_byte or bits_per_byte of the right answer,
    margin over the best wrong choice. None: the first of acc_norm, acc, exact_match, bits_per_byte that the task has."""
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Weight in the objective, relative to the other tasks."""
    num_fewshot: Annotated[int, Field(ge=0, le=64)] = 0
    """Worked examples in front of each document."""
    insist: bool = False
    """Keep the task in the objective even where the teacher does not stand clear of random weights; else such a task is named and left out."""


@_value
class WorkloadSpec:
    """The load under which a budget's memory and FLOPs are counted, in closed form."""

    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Sequences at once."""
    context_length: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """Tokens of each sequence, prompt and answer; at most the teacher's context. None: 4096, or the teacher's context where it is shorter."""
    dtype: Literal["float32", "bfloat16", "float8"] = "bfloat16"
    """Of the weights."""
    cache_dtype: Literal["float32", "bfloat16", "float8"] | None = None
    """Of the KV cache. None: that of the weights."""


@_value
class LatencySpec:
    """A named workload, timed on the worker's own device at rung 0, before anything is distilled (plain transformers, greedy, median of 5)."""

    name: Name
    """Its costs are `prefill_ms:NAME` and `decode_ms:NAME`."""
    prompt_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Length of every prompt."""
    new_tokens: Annotated[int, Field(ge=2, le=100_000)] = 32
    """Tokens generated; with the prompt at most the teacher's context."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Sequences at once."""
    max_prefill_ms: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Ceiling of the prompt's pass, in milliseconds. None: measured, not limited."""
    max_decode_ms: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Ceiling of one decoding step, a token of every sequence, in milliseconds. None: measured, not limited."""


@_value
class BudgetSpec:
    """The most that the compressed model may cost: any of these ceilings together, at least one."""

    max_parameters: Count | None = None
    """Absolute ceiling, in parameters."""
    max_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The same ceiling as a share of the teacher's parameters."""
    counting: Literal["total", "non_embedding"] = "total"
    """Which parameters count: all, or all but the embedding tables."""
    max_memory_bytes: Count | None = None
    """Ceiling of the weights and the KV cache together, in bytes, under `workload`."""
    max_flops_per_token: Count | None = None
    """Ceiling of the forward FLOPs of one token at the end of the context of `workload`."""
    workload: WorkloadSpec = field(default_factory=WorkloadSpec)
    latency: Annotated[tuple[LatencySpec, ...], Field(max_length=16)] = ()
    """Measured ceilings. A shape that is over one is stopped at rung 0 and takes no place from others."""
    min_use: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Shapes that use less than this share of every ceiling but those of latency are not proposed (Minitron: 0.95). Anchors and named shapes may be smaller."""

    @model_validator(mode="after")
    def _ceilings(self) -> BudgetSpec:
        if self.max_parameters is not None and self.max_fraction is not None:
            raise ValueError("at most one of max_parameters and max_fraction")
        names = [workload.name for workload in self.latency]
        if len(set(names)) < len(names):
            raise ValueError(f"latency: each name once, got {', '.join(names)}")
        limited = any(workload.max_prefill_ms is not None or workload.max_decode_ms is not None for workload in self.latency)
        counted = (self.max_parameters, self.max_fraction, self.max_memory_bytes, self.max_flops_per_token)
        if all(ceiling is None for ceiling in counted) and not limited:
            raise ValueError("a ceiling: max_parameters, max_fraction, max_memory_bytes, max_flops_per_token, or a maximum of latency")
        if self.min_use and all(ceiling is None for ceiling in counted):
            raise ValueError("no min_use without a ceiling of which it is a share; latency has none")
        return self


@_value
class AxisSpec:
    """The values that one axis of the shape may take."""

    min: Count | None = None
    """Smallest value. None: half of the teacher's (a quarter for intermediate_size)."""
    max: Count | None = None
    """Largest value. None: the teacher's, which is legal whatever the multiple."""
    multiple: Count | None = None
    """Values are multiples of this. None: 1 for layers and heads, else the largest power of two, up to 256, that leaves 8 steps."""

    @model_validator(mode="after")
    def _ordered(self) -> AxisSpec:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min at most max={self.max}")
        return self


@_value
class SpaceSpec:
    """The shapes among which the search chooses."""

    num_hidden_layers: AxisSpec = field(default_factory=AxisSpec)
    hidden_size: AxisSpec = field(default_factory=AxisSpec)
    intermediate_size: AxisSpec = field(default_factory=AxisSpec)
    num_key_value_heads: AxisSpec = field(default_factory=AxisSpec)
    query_heads_per_kv: AxisSpec = field(default_factory=AxisSpec)
    """Query heads that share one KV head."""
    num_experts: AxisSpec = field(default_factory=AxisSpec)
    """Experts of each layer, at least as many as a token is sent to; only of a teacher that has experts."""
    min_mlp_fill: Share = 0.5
    """The MLP takes at least this share of what the other axes leave of the budget; unused parameters rarely help."""
    multiples_of: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Hidden and MLP sizes must divide by this (64 or 128 for most kernels and quantised formats), those of named shapes and of the teacher too,
    which an axis' own `multiple` lets pass."""
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    """Devices over which every shape must divide evenly: query heads, MLP, and KV heads, which are copied where there are fewer than devices."""


@_value
class SamplerSpec:
    """Who proposes shapes, and how many."""

    name: Literal["auto", "gp", "tpe", "nsga2", "random", "enumerate"] = "auto"
    """auto: enumerate when the space is no larger than max_trials, GP up to 150 trials (of all samplers it ended nearest the best of 6,016 shapes, LOG.md),
    TPE above. nsga2: generations of num_startup_trials shapes."""
    max_trials: Annotated[int, Field(ge=1, le=100_000)] = 24
    """Shapes proposed, anchors and named shapes among them; controls are on top."""
    num_startup_trials: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Trained results, the anchors' among them, before the model of the sampler is asked; until then shapes are drawn at random. About half of the shapes are
    stopped untrained, so 8 left a search of 24 trials a third of its proposals (LOG.md)."""


@_value
class ControlSpec:
    """Shapes that are not proposed by the sampler, so that the board can show what the search was worth."""

    anchors: bool = True
    """Evaluate the width-only, depth-only and uniform shapes of the budget first."""
    num_forced_anchors: Annotated[int, Field(ge=0, le=4)] = 1
    """So many of them, the uniform one first, reach the last rung whatever their results; the others compete. Each takes the tokens of a whole trial:
    three of them are two fifths of what the replayed searches spend (LOG.md)."""
    num_random: Annotated[int, Field(ge=0, le=1000)] = 0
    """Legal shapes drawn at random after the search, taken to the last rung: the honest baseline."""
    num_repeats: Annotated[int, Field(ge=0, le=16)] = 0
    """Times that the first forced anchor of a budget is trained again, each time in another data order and to the last rung, to measure the spread
    between training seeds that `rungs.seed_spread` else assumes. Each takes the tokens of a whole trial; they are not ranked. 0: on the ground
    truth they changed no regret (LOG.md). Worth it where the default spread may be far off: models, data or tokens unlike those it is from."""

    @model_validator(mode="after")
    def _repeated(self) -> ControlSpec:
        if self.num_repeats and not (self.anchors and self.num_forced_anchors):
            raise ValueError("no num_repeats without anchors and num_forced_anchors of at least 1: a forced anchor is what is repeated")
        return self


@_value
class RungSpec:
    """Rung 0 scores the pruned model without training; rung r > 0 trains to first_tokens * factor ** (r - 1) tokens."""

    first_tokens: Count = 2_000_000
    """Tokens of the first trained rung."""
    total_tokens: Count | None = None
    """Tokens that the whole search is expected to train, anchors, controls and ties paid for: first_tokens is worked out from it at submit,
    whatever it says here. A failed trial, or a promotion while others are still training, comes on top. None: first_tokens decides."""
    factor: Annotated[int, Field(ge=2, le=64)] = 4
    """Tokens grow by this from rung to rung."""
    num_trained: Annotated[int, Field(ge=1, le=10)] = 3
    """Trained rungs."""
    keep_untrained: Share = 0.4
    """Share of each depth class that goes on from rung 0. Its order says nothing between depths (arXiv 2407.14679, table 1), something within one (LOG.md)."""
    keep: Share = 0.3
    """Share of a trained rung that goes on to the next; shapes tied with its last one go on too. Chosen by replayed searches (LOG.md)."""
    keep_depth: Annotated[float, Field(ge=0, le=1)] = 0.5
    """At the first trained rung each depth class has this part of its proportional places for sure, beside the best share. 0: none."""
    max_tie_growth: Annotated[float, Field(ge=1, le=10)] = 1.5
    """Depth classes and ties may enlarge the promoted share at most by this."""
    projection: Annotated[float, Field(ge=0, le=2)] = 0.5
    """Decades of tokens by which a rung's KL is drawn on along its last step before students are compared; the ground truth found 0.3 to 0.5 best
    (LOG.md). 0: the KL as it is."""
    seed_spread: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Standard deviation of the held-out KL of a shape between training seeds, relative to the KL, beyond what the blocks show and without what one data
    order does to all shapes alike; part of every tie test; what `controls.num_repeats` measure is pooled with it. On the ground
    truth .012 at 12,500 tokens, .007 at 25,000, below .004 from 50,000 on (LOG.md)."""
    stop_losers: bool = True
    """Do not train to the last rung whoever is certain to lose there, by a margin of 5 % of its KL (`nas/search/rungs.py`). Not with several objectives."""

    def tokens(self, rung: int) -> int:
        """Tokens that a shape has seen at a rung."""
        return 0 if rung == 0 else self.first_tokens * self.factor ** (rung - 1)


@_value
class EvaluationSpec:
    """How candidates are scored."""

    tasks_at: Literal["last_rung", "trained_rungs"] = "last_rung"
    """Rungs at which the tasks are scored. Only the last one ranks by them, the others promote on held-out KL; scoring all trained
    rungs by lm-eval took 2.7 times the distillation on the 260K-parameter reference, and packs are 2 to 4 times as fast (LOG.md)."""
    documents_per_task: Annotated[int, Field(ge=2, le=10_000_000)] = 200
    """Documents of each task on which the rungs are scored, the same for every trial; at most half of the task.
    The others are held out: no rung sees them, and the finalists are scored on them."""
    held_out_documents: Annotated[int, Field(ge=2, le=10_000_000)] | None = None
    """Held-out documents of each task on which finalists, anchors and controls are scored, drawn once by the seed; None: all of them."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 64
    """Requests per forward pass of lm-eval itself, which scores the finalists and the few tasks that have no pack; packs batch by tokens."""
    latency_prompt_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Prompt length of the latency measurement of the finalists."""
    latency_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 32
    """Tokens decoded in the latency measurement."""


@_value
class CompressionSpec:
    """How the teacher is pruned."""

    importance: Literal["energy", "l2_mean", "mean_mean", "second_moment"] = "energy"
    """energy: mean squared activation times the weights that read it, the best after distillation (LOG.md). l2_mean: Minitron's, mean over the
    sequence, L2 over the batch (arXiv 2407.14679, 2.2); mean_mean: the mean over both. second_moment: the mean square without the readers."""
    depth: Literal["bridged_damage", "damage", "contiguous", "block_influence", "task"] = "bridged_damage"
    """bridged_damage: KL of contiguous and of greedy removals after each gap is bridged by least squares, the best after distillation (LOG.md).
    damage: KL of the bare cut. contiguous: KL of contiguous cuts alone (arXiv 2408.11796). block_influence: lowest 1 - cos(in, out) dropped.
    task: what the bare cut loses of the tasks' own metrics on the search's documents, each set a run of lm-eval (arXiv 2408.11796)."""
    reconstruction: bool = True
    """Fit what stays to what was removed, by least squares on the calibration tokens, wherever that lowers the held-out loss of the plain slice (LOG.md)."""
    norm_gains: Literal["energy", "teacher"] = "energy"
    """Of a student whose residual stream reconstruction narrowed (Llama and its kin): which part of its weights are the norms' gains; the function is the
    same. teacher: as much as in the teacher, so that a step is the same share of a weight in every student. energy: the weights take over the gains."""
    teacher_correction_tokens: Annotated[int, Field(ge=0, le=2**53)] = 0
    """Tokens of the corpus on which the teacher itself is trained (next token, a fifth of the distillation's rate) before anything else is done with it:
    the corrected teacher is then pruned and distilled from (arXiv 2408.11796). 0: the teacher as it is."""


@_value
class DistillationSpec:
    """The short distillation of the rungs: forward KL on the logits, temperature 1, no cross-entropy (arXiv 2407.14679, A.3)."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Constant along the trunk (Minitron: 1e-4 at 8B, where small models want 1e-3 and more). None: 0.02 / sqrt(the teacher's hidden size), times
    the fourth root of the running KL in nats; near the best constant rate of every shape and size that was measured (LOG.md)."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    """Sequences per step."""
    micro_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Sequences per forward pass; None: the batch size. Halved by itself when a device runs out of memory."""
    warmup_tokens: Annotated[int, Field(ge=0, le=2**53)] = 0
    """Linear warm-up at the start of the trunk."""
    decay_share: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """The last share of a rung's tokens is a linear decay to zero, a branch off the constant trunk that the next rung resumes."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the same KL from about 15 % fewer tokens (LOG.md) for more arithmetic a token: of the student's own about 4 x hidden_size / tokens of a step.
    Worth it where tokens are dear, or steps are large."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward and backward passes, where the device has it; parameters and optimiser are float32. On a CPU it is worth it from a hidden
    size of about 192 (LOG.md)."""
    moments: Literal["auto", "float32", "offloaded", "bfloat16"] = "auto"
    """Optimiser state: float32 on the device; offloaded to the host's memory, the same student; bfloat16, half of it, nearly the same student.
    auto: the first of them that fits. Micro-batch and checkpointing are fitted to the device's memory in any case."""
    signals: Literal["auto", "exact", "top_k", "off"] = "auto"
    """The teacher's outputs, computed once and read by every trial. exact: final hidden states, the same student as with the teacher in the loop.
    top_k: its largest log-probabilities. auto: the first of these two that fits the disk. off: the teacher runs beside every student."""
    top_k: Annotated[int, Field(ge=512, le=2**20)] = 512
    """Log-probabilities of each token that top_k keeps, at most the vocabulary; the mass of all others is kept as one number."""
    max_signal_bytes: Annotated[int, Field(ge=0, le=2**60)] = 64 * 2**30
    """Most bytes of signals on disk: 8 KB a token exact for a hidden size of 4096 in bfloat16, 3 KB for the 512 largest."""
    hidden_states: Literal["auto", "off", "last", "all"] = "auto"
    """What the student matches beside the logits (LOG.md). last: the final hidden state. all: the stream behind every layer; fewer
    tokens, but the teacher runs beside every student. auto: last where it is at hand, which it is not with top_k. off: nothing."""

    @model_validator(mode="after")
    def _states_at_hand(self) -> DistillationSpec:
        if self.hidden_states == "all" and self.signals in ("exact", "top_k"):
            raise ValueError(f"hidden_states: expected 'auto', 'off' or 'last' with signals {self.signals!r}, which hold no other state, got 'all'")
        if self.hidden_states == "last" and self.signals == "top_k":
            raise ValueError("hidden_states: expected 'auto' or 'off' with signals 'top_k', which hold no state, got 'last'")
        return self


@_value
class ResourceSpec:
    """What one trial may use on a worker."""

    cpus: Annotated[float, Field(ge=0.01, le=1024)] = 1.0
    """CPU cores of a trial; its threads match them."""
    gpus: Annotated[float, Field(ge=0, le=64)] = 0.0
    """GPUs of a trial: a whole number, or a share of one."""
    max_parallel_trials: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Trials in flight at once. With 1, the same seed gives the same leaderboard."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> ResourceSpec:
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"a whole number of gpus, or a share of one, not {self.gpus}")
        return self


@_value
class LimitSpec:
    """When to give up."""

    max_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    """Times that one step (a rung, the prepare step) is tried; a restart of the service does not count, nor does a preemption."""
    max_preemptions: Annotated[int, Field(ge=1, le=1000)] = 20
    """Times that one step may be lost with its worker (the node went away, or fell silent) before it fails: it may be what takes nodes along."""
    max_failed_trials: Annotated[int, Field(ge=1, le=100_000)] = 8
    """Failed trials after which the search fails, with the first reasons."""
    max_rung_seconds: Seconds = 86_400.0
    """Time limit of a rung, and of the other steps that have none of their own, in seconds; counted from the step's first sign of life."""
    max_prepare_seconds: Seconds | None = None
    """Time limit of the prepare step. None: max_rung_seconds."""
    max_confirm_seconds: Seconds | None = None
    """Time limit of the confirmation of one finalist. None: max_rung_seconds."""
    max_bundle_seconds: Seconds | None = None
    """Time limit of packing a winner. None: max_rung_seconds."""
    max_wait_seconds: Seconds | None = None
    """Longest that a step waits for a worker with its resources; the try then fails with the reason no_resources. None: for ever."""
    max_queued_seconds: Seconds | None = None
    """Longest that the search waits for a controller, after its submission or a pause; it then fails with the reason queued_too_long. None: for ever."""
    max_search_seconds: Seconds | None = None
    """Longest that the search works, pauses not counted. Then nothing more is proposed or trained: what has reached the last rung is confirmed, and without
    any the search fails with the reason time_limit. None: no limit."""
    max_tokens: Count | None = None
    """Most tokens trained over all trials, whole rungs counted when they begin. A rung that would take the search above ends it as max_search_seconds
    does, once those that run have ended; reason token_limit. None: no limit."""
    max_device_seconds: Annotated[float, Field(gt=0, le=1e12)] | None = None
    """Most wall seconds times GPUs (CPU cores where it has none) of all steps, failed ones too; as max_search_seconds, reason device_seconds_limit.
    None: no limit."""
    max_disk_bytes: Count | None = None
    """Most bytes of the search's folder. Above it the checkpoints of waiting trials go, the least promising first (they would train from the start again);
    still above, the search pauses with the reason disk_budget. None: no limit."""

    def step_limit(self, stage: Literal["prepare", "rung", "confirm", "bundle", "distil"]) -> tuple[str, float]:
        """The field that limits the time of one step, and its seconds."""
        own = {"prepare": self.max_prepare_seconds, "confirm": self.max_confirm_seconds, "bundle": self.max_bundle_seconds}.get(stage)
        return ("max_rung_seconds", self.max_rung_seconds) if own is None else (f"max_{stage}_seconds", own)


@_value
class RetentionSpec:
    """What stays on disk when the search has ended, beside the bundle of the winner."""

    students: Literal["finalists", "pareto", "best", "none"] = "finalists"
    """finalists: the students that were verified, which can still be bundled and serve later searches. pareto: those of them that no other beats in score
    and costs. best: the winner's own. none: no student."""


@_value
class SearchSpec:
    """One search: teacher, corpus, tasks and budget, and how to go about it."""

    teacher: Name
    """Name under which the operator registered the teacher; or the id of a search of the same project, whose winner then is the teacher. While that search
    has not ended this one waits in the queue, planned for the largest shape that may win, and is planned again, fractions included, for the winner."""
    corpus: CorpusSpec
    tasks: Annotated[tuple[TaskSpec, ...], Field(min_length=1, max_length=64)]
    budget: BudgetSpec
    teacher_budget: Annotated[int, Field(ge=0, le=15)] = 0
    """Where `teacher` is a search of several budgets: index of the one whose winner is meant."""
    objectives: Annotated[tuple[Objective, ...], Field(max_length=3), AfterValidator(_each_once)] = ()
    """Costs to be small beside a good score, each once: parameters, memory_bytes, flops_per_token, prefill_ms:NAME, decode_ms:NAME. Empty: the score alone.
    With any, sampler and rungs work on the front of (KL, costs), and the board shows a front; the winner that is picked by itself has the best score."""
    warm_start_from: Annotated[tuple[str, ...], Field(max_length=100), AfterValidator(_each_once)] = ()
    """Ids of ended searches on the same teacher, corpus and recipe. Their results at this search's tokens teach the sampler, and a shape that was
    trained there under the same conditions, seed included, is not trained again."""
    more_budgets: Annotated[tuple[BudgetSpec, ...], Field(max_length=15)] = ()
    """Further budgets over the same prepare step: a family of sizes. Each has its own trials (`sampler.max_trials`, anchors and controls of its own),
    promotions, finalists and winner; a shape is evaluated once, for the budget that proposes it first. Named shapes belong to the first that they fit."""
    label: Annotated[str, Field(max_length=200)] = ""
    """A line of free text for lists."""
    labels: Annotated[Mapping[LabelName, LabelValue], Field(max_length=32, json_schema_extra=ONLY_THESE)] = field(default_factory=dict)
    """Names and values of the user's own, to filter lists by."""
    preset: Literal["minitron"] | None = None
    """Published method whose choices fill what this spec leaves out."""
    shapes: Annotated[tuple[Shape, ...], Field(max_length=1000)] = ()
    """Shapes of the user's own, evaluated first; they always reach the last rung."""
    num_finalists: Annotated[int, Field(ge=1, le=100)] = 3
    """Most shapes of the first tie group that are confirmed on held-out documents, which decide among them."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Seed of everything: proposals, data order, document split."""
    space: SpaceSpec = field(default_factory=SpaceSpec)
    sampler: SamplerSpec = field(default_factory=SamplerSpec)
    controls: ControlSpec = field(default_factory=ControlSpec)
    rungs: RungSpec = field(default_factory=RungSpec)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    compression: CompressionSpec = field(default_factory=CompressionSpec)
    distillation: DistillationSpec = field(default_factory=DistillationSpec)
    resources: ResourceSpec = field(default_factory=ResourceSpec)
    limits: LimitSpec = field(default_factory=LimitSpec)
    retention: RetentionSpec = field(default_factory=RetentionSpec)

    @property
    def budgets(self) -> tuple[BudgetSpec, ...]:
        """All budgets; a trial names its own by the index."""
        return (self.budget, *self.more_budgets)

    def scores_tasks(self, rung: int) -> bool:
        """Whether the tasks are scored at a rung; held-out KL is measured at every one."""
        return rung == self.rungs.num_trained or (rung > 0 and self.evaluation.tasks_at == "trained_rungs")

    def trained_tokens(self, rung: int) -> int:
        """Tokens that bring a trial from the rung below to this one: the decay branch below was thrown away, its share is trained again."""
        if rung == 0:
            return 0
        below = self.rungs.tokens(rung - 1)
        return self.rungs.tokens(rung) - below + int(below * self.distillation.decay_share)


SPEC_ADAPTER: TypeAdapter[SearchSpec] = TypeAdapter(SearchSpec)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # arXiv 2407.14679: (L2, mean) importance, every feasible shape within 5 % of the budget to the same tokens, plain slicing, its rate.
    "minitron": {
        "budget": {"min_use": 0.95},
        "sampler": {"name": "enumerate", "max_trials": 100_000},
        "controls": {"anchors": False},
        "compression": {"importance": "l2_mean", "depth": "block_influence", "reconstruction": False},
        "distillation": {"learning_rate": 1e-4},
        "rungs": {"num_trained": 1, "keep_untrained": 1.0},
    }
}


def parse_spec(text: str | bytes) -> SearchSpec:
    """A spec from JSON, its preset filled in.

    Raises:
        InvalidSpec: not JSON, or any field that is unknown, missing, of another type or out of range.
    """
    values = read_object(text)
    preset = values.get("preset")
    if isinstance(preset, str) and preset in PRESETS:
        values = _merge(PRESETS[preset], values)
    return validate(values, adapter=SPEC_ADAPTER)


def dump_spec(spec: SearchSpec) -> dict[str, Any]:
    """The spec as plain JSON values; `parse_spec(json.dumps(dump_spec(spec))) == spec`."""
    values = SPEC_ADAPTER.dump_python(spec, mode="json")
    assert isinstance(values, dict)
    return values


def objective_metrics(spec: SearchSpec, *, inputs: Mapping[str, Any]) -> dict[str, str]:
    """The metric that the objective reads from each task: the spec's, or the task's own default. `inputs`: the submission's snapshot."""
    cards = {task["name"]: task["card"] for task in inputs["tasks"]}
    return {task.name: task.metric or cards[task.name]["default_metric"] for task in spec.tasks}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**base, **over}
    for key, value in base.items():
        if isinstance(value, Mapping) and isinstance(over.get(key), Mapping):
            merged[key] = _merge(value, over[key])
    return merged
