"""What one rung of one trial measured, and what the teacher and random weights measured: plain values, JSON both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nas.spec import SearchSpec

CONTROL = "control"
"""Origin of the random shapes that show what the search was worth, on top of max_trials; they are ranked but never win."""
_REPEAT = "repeat"


def repeat_origin(index: int) -> str:
    """Origin of the index-th further training of a shape that is there already, from 1: it measures the spread between seeds, and is never ranked."""
    return f"{_REPEAT}:{index}"


def is_repeat(origin: str) -> bool:
    return origin.partition(":")[0] == _REPEAT


def is_searched(origin: str) -> bool:
    """Whether a trial of this origin is one of those that the search chooses among, and that count in max_trials."""
    return origin != CONTROL and not is_repeat(origin)


def training_seed(spec: SearchSpec, *, origin: str) -> int:
    """Seed of a trial's data order: the search's, the same for all shapes, but for a repeat."""
    return spec.seed + int(origin.partition(":")[2]) if is_repeat(origin) else spec.seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A mean over documents (or held-out blocks), always the same ones in the same order, so that trials are compared pairwise.

    A ratio such as bits per byte is linearised: `documents` are its influence values, whose mean is the value.
    """

    value: float
    standard_error: float
    higher_is_better: bool
    documents: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "standard_error": self.standard_error,
            "higher_is_better": self.higher_is_better,
            "documents": list(self.documents),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Metric:
        return cls(
            value=values["value"],
            standard_error=values["standard_error"],
            higher_is_better=values["higher_is_better"],
            documents=tuple(values["documents"]),
        )

    @classmethod
    def from_documents(cls, documents: tuple[float, ...], *, higher_is_better: bool) -> Metric:
        """The mean of the documents and its standard error (n - 1 in the variance; 0 for a single document)."""
        count = len(documents)
        mean = math.fsum(documents) / count
        variance = math.fsum((value - mean) ** 2 for value in documents) / max(count - 1, 1)
        return cls(value=mean, standard_error=math.sqrt(variance / count), higher_is_better=higher_is_better, documents=documents)


@dataclass(frozen=True, slots=True, kw_only=True)
class RungResult:
    """One trial at one rung, or the teacher or random weights (rung 0) on the same documents."""

    rung: int
    tokens: int
    kl: Metric
    """KL(teacher || student) per token on the held-out blocks, nats. Zero for the teacher."""
    loss: Metric
    """Cross-entropy per token on the held-out blocks, nats."""
    tasks: Mapping[str, Metric]
    """Per task the metric that the spec asks for. Empty at a rung that is compared on KL alone."""
    parameters: int
    """Counted from the tensors, not from the shape."""
    seconds: Mapping[str, float]
    """Wall seconds by step: load (teacher and blocks), slice (and reconstruct), distil, evaluate, save."""
    details: Mapping[str, Any]
    """All metrics that lm-eval returned, by task, for display."""
    reconstruction: Mapping[str, Any] | None = None
    """How the student's weights were fitted before training, and what it gained (`compress.reconstruction.Reconstruction`); None: not asked for."""
    likelihoods: Mapping[str, Mapping[str, Metric]] = field(default_factory=dict)
    """Per task its likelihood forms, as far as the task has them: `logprob_per_byte`, `margin`, `bits_per_byte` (evaluate/scoring.py)."""
    costs: Mapping[str, float] = field(default_factory=dict)
    """What the model costs, by name: `parameters`, `memory_bytes`, `flops_per_token` in closed form (`nas/cost.py`), and at rung 0
    `prefill_ms:NAME` and `decode_ms:NAME`, measured at the named workloads of the budget. Lower is better."""

    reused_from: Mapping[str, Any] | None = None
    """`search` and `trial` that measured it before this search began; None: measured here."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "rung": self.rung,
            "tokens": self.tokens,
            "kl": self.kl.as_dict(),
            "loss": self.loss.as_dict(),
            "tasks": {name: metric.as_dict() for name, metric in self.tasks.items()},
            "parameters": self.parameters,
            "seconds": dict(self.seconds),
            "details": dict(self.details),
            "reconstruction": None if self.reconstruction is None else dict(self.reconstruction),
            "likelihoods": {task: {form: metric.as_dict() for form, metric in forms.items()} for task, forms in self.likelihoods.items()},
            "costs": dict(self.costs),
            "reused_from": None if self.reused_from is None else dict(self.reused_from),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RungResult:
        return cls(
            rung=values["rung"],
            tokens=values["tokens"],
            kl=Metric.from_dict(values["kl"]),
            loss=Metric.from_dict(values["loss"]),
            tasks={name: Metric.from_dict(metric) for name, metric in values["tasks"].items()},
            parameters=values["parameters"],
            seconds=dict(values["seconds"]),
            details=dict(values["details"]),
            reconstruction=values.get("reconstruction"),
            likelihoods={task: {form: Metric.from_dict(metric) for form, metric in forms.items()} for task, forms in values.get("likelihoods", {}).items()},
            costs=dict(values.get("costs", {})),
            reused_from=values.get("reused_from"),
        )


def trained_tokens(reused: Mapping[int, bool], *, spec: SearchSpec) -> dict[int, int]:
    """Tokens that a trial was trained on to reach each of its rungs; none for a result that an earlier search knew.

    Above such a rung there was no trunk to resume: the trial was trained from the start.

    Args:
        reused: by finished rung, whether its result was known.
    """
    above_known = {rung: spec.rungs.tokens(rung) for rung in reused if reused.get(rung - 1, False)}
    return {rung: 0 if known else above_known.get(rung, spec.trained_tokens(rung)) for rung, known in reused.items()}
