"""Scores as plain values: lm-eval's metrics of a model, what each document adds to them, and the likelihood forms beside them.

No torch and no lm-eval, so that a spec can be checked against the names here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nas.errors import TaskUnavailable

FORMS_BY_KIND: Mapping[str, tuple[str, ...]] = {
    "multiple_choice": ("logprob_per_byte", "margin", "bits_per_byte"),
    "loglikelihood": ("logprob_per_byte", "bits_per_byte"),
    "loglikelihood_rolling": ("logprob_per_byte", "bits_per_byte"),
}
"""Likelihood forms by lm-eval's output type; they are metrics of every such task, beside its own. Of the right answer and the bytes of its text as it
is scored (the gold choice with its delimiter, the target, the page), nats: logprob_per_byte, the mean over documents; margin, that of the right minus
that of the best wrong choice; bits_per_byte, all bits over all bytes, lower is better. A form is left out where the task has no answer to compare with."""
_HIGHER_IS_BETTER = {"logprob_per_byte": True, "margin": True, "bits_per_byte": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricValue:
    """One metric of one task."""

    value: float
    standard_error: float | None
    """Over documents: lm-eval's for means, the delta method for ratios and perplexities; None where neither has a form."""
    higher_is_better: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentValues:
    """What each document adds to a metric: value = sum(numerators) / sum(denominators), its exponential if `exponential`.

    An accuracy has denominators of 1. bits_per_byte has bits over bytes; perplexities have nats over words, bytes or
    documents, and are exponentials. Two models are compared by taking the same documents of both.
    """

    numerators: tuple[float, ...]
    denominators: tuple[float, ...]
    exponential: bool

    @property
    def value(self) -> float:
        ratio = math.fsum(self.numerators) / math.fsum(self.denominators)
        return math.exp(ratio) if self.exponential else ratio

    @property
    def standard_error(self) -> float | None:
        """Delta method for a ratio of sums over independent documents; for a mean it is the usual formula. None below two documents.

        Source: Cochran, Sampling Techniques, 3rd ed., 6.4, without the finite population correction.
        """
        count, total = len(self.numerators), math.fsum(self.denominators)
        if count < 2:
            return None
        ratio = math.fsum(self.numerators) / total
        residuals = math.fsum((numerator - ratio * denominator) ** 2 for numerator, denominator in zip(self.numerators, self.denominators, strict=True))
        error = math.sqrt(count / (count - 1) * residuals) / total
        return error * math.exp(ratio) if self.exponential else error


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One choice of a document (or its only text): how probable a model found it, and how long it is."""

    nats: float
    num_bytes: int
    is_right: bool

    @property
    def rate(self) -> float:
        """Nats per byte, at most 0."""
        return self.nats / max(1, self.num_bytes)


def likelihood_forms(documents: Sequence[Sequence[Answer]]) -> dict[str, DocumentValues]:
    """The likelihood forms of a task; of several right answers the most probable one per byte counts.

    Args:
        documents: the answers of each document.
    Returns:
        Form -> its values; without `margin` where a document has no wrong answer, empty where one has no right answer.
    """
    right = [max((answer for answer in answers if answer.is_right), key=lambda answer: answer.rate, default=None) for answers in documents]
    wrong = [max((answer.rate for answer in answers if not answer.is_right), default=None) for answers in documents]
    best = [answer for answer in right if answer is not None]
    if len(best) < len(right):
        return {}
    rates = [answer.rate for answer in best]
    found = {
        "logprob_per_byte": _mean(rates),
        "bits_per_byte": DocumentValues(
            numerators=tuple(-answer.nats / math.log(2) for answer in best),
            denominators=tuple(float(max(1, answer.num_bytes)) for answer in best),
            exponential=False,
        ),
    }
    margins = [rate - other for rate, other in zip(rates, wrong, strict=True) if other is not None]
    return found | {"margin": _mean(margins)} if len(margins) == len(rates) else found


def form_value(form: str, values: DocumentValues) -> MetricValue:
    """A likelihood form as a metric."""
    return MetricValue(value=values.value, standard_error=values.standard_error, higher_is_better=_HIGHER_IS_BETTER[form])


def _mean(values: Sequence[float]) -> DocumentValues:
    return DocumentValues(numerators=tuple(values), denominators=(1.0,) * len(values), exponential=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One task's scores."""

    name: str
    metrics: Mapping[str, MetricValue]
    document_ids: tuple[int, ...]
    """Ascending; the order of every per-document tuple, so that two trials with equal ids are compared pairwise."""
    documents: Mapping[str, DocumentValues]
    """By metric; a metric that is no mean, ratio or perplexity over all these documents (f1, bleu) is not here."""
    forms: tuple[str, ...] = ()
    """Which of the metrics are likelihood forms."""
    seconds: float = 0.0

    @property
    def num_documents(self) -> int:
        return len(self.document_ids)

    def metric(self, name: str) -> MetricValue:
        """One metric by name.

        Raises:
            TaskUnavailable: the task does not report it; the message lists what it reports.
        """
        if name not in self.metrics:
            raise TaskUnavailable(f"metric of task {self.name}: expected one of {', '.join(self.metrics)}, got {name!r}")
        return self.metrics[name]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskScore:
        return cls(
            name=values["name"],
            metrics={name: MetricValue(**metric) for name, metric in values["metrics"].items()},
            document_ids=tuple(values["document_ids"]),
            documents={
                name: DocumentValues(
                    numerators=tuple(document["numerators"]),
                    denominators=tuple(document["denominators"]),
                    exponential=document["exponential"],
                )
                for name, document in values["documents"].items()
            },
            forms=tuple(values["forms"]),
            seconds=values["seconds"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """A model's scores, by task."""

    tasks: Mapping[str, TaskScore]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scores:
        return cls(tasks={name: TaskScore.from_dict(task) for name, task in values["tasks"].items()})
