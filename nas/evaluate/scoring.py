"""A model's scores on lm-eval tasks: lm-eval's own numbers, and the per-document values that paired comparisons need.

Foreign results become `Scores` here and nowhere else. Ranking, ties and chance levels are not its business (`search/ranking.py`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any

from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.models.huggingface import HFLM
from torch import nn

from nas.errors import InvalidSpec, Problem, TaskUnavailable
from nas.evaluate import harness


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
class TaskScore:
    """One task's scores."""

    name: str
    metrics: Mapping[str, MetricValue]
    document_ids: tuple[int, ...]
    """Ascending; the order of every per-document tuple, so that two trials with equal ids are compared pairwise."""
    documents: Mapping[str, DocumentValues]
    """By metric; a metric that is no mean, ratio or perplexity over all these documents (f1, bleu) is not here."""
    likelihood: tuple[float, ...] | None
    """log2 of the probability of the right answer per UTF-8 byte of it, by document: bits per byte, at most 0, higher is better.
    The right answer is the gold choice (the best one, if several), the target, or the whole document. None for generate_until."""
    seconds: float

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
            likelihood=None if values["likelihood"] is None else tuple(values["likelihood"]),
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


def score(
    model: nn.Module,
    *,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    documents: Mapping[str, Sequence[int]],
    batch_size: int,
    max_length: int | None,
) -> Scores:
    """Scores a model with lm-eval; model, tokenizer and random state are left as they were.

    Args:
        model: a transformers causal language model, on its device.
        tokenizer: its tokenizer.
        tasks: from `tasks.load_tasks`.
        documents: ids to score, by task; a task without an entry is not scored.
        batch_size: requests per forward pass; its logits take batch_size x tokens x vocabulary floats, twice.
        max_length: tokens of context, longer prompts lose their start; None: the model's own.
    Raises:
        InvalidSpec: `documents` names a task that is not in `tasks`, or `batch_size` is below 1.
        TaskUnavailable: a document's target has no tokens, or more than `max_length`.
        FloatingPointError: a log-likelihood is not finite: the model has diverged. lm-eval itself would go on, and its argmax
            over NaN picks the first choice, which is the right one throughout BLiMP.
    """
    problems = [Problem(field=f"documents.{name}", expected="a task of " + ", ".join(tasks), got=repr(name)) for name in documents if name not in tasks]
    if batch_size < 1:
        problems.append(Problem(field="batch_size", expected="an integer of at least 1", got=str(batch_size)))
    if problems:
        raise InvalidSpec(*problems)
    with _left_as_it_was(model, tokenizer), harness.isolated():
        # In bfloat16 log-probabilities tie, and lm-eval counts a tie for the first choice.
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, softmax_dtype="float32")
        return Scores(tasks={name: _score_task(lm, task=tasks[name], documents=documents[name]) for name in documents})


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module, tokenizer: Any) -> Iterator[None]:
    """HFLM switches the model to evaluation and gives the tokenizer a padding token, which would end up in a saved checkpoint."""
    training = [module for module in model.modules() if module.training]
    padding = tokenizer.pad_token
    try:
        yield
    finally:
        for module in training:
            module.training = True
        tokenizer.pad_token = padding


def _score_task(lm: HFLM, *, task: Any, documents: Sequence[int]) -> TaskScore:
    started = time.perf_counter()
    name = harness.task_name(task)
    try:
        result = harness.run(lm, task=task, documents=documents)
    except OverflowError as overflow:
        raise FloatingPointError(f"task {name}: the perplexity is too large for a number: the model has diverged") from overflow
    except AssertionError as refusal:
        raise TaskUnavailable(
            f"task {name}: expected targets of 1 to {lm.max_length} tokens behind a context, got another (lm-eval refuses it without a word); "
            "the target of a loglikelihood task must bring its own leading space, or it melts into the context"
        ) from refusal
    document_ids = tuple(sorted(set(documents)))
    samples: dict[str, list[dict[str, Any]]] = {}
    for sample in result["samples"][name]:
        samples.setdefault(sample["filter"], []).append(sample)
    first_filter = next(iter(samples.values()))
    assert tuple(sample["doc_id"] for sample in first_filter) == document_ids
    _refuse_non_finite(first_filter, task=task)
    metrics, values = _read_metrics(result, samples=samples, task=task)
    return TaskScore(
        name=name,
        metrics=metrics,
        document_ids=document_ids,
        documents=values,
        likelihood=_likelihood(first_filter, task=task),
        seconds=time.perf_counter() - started,
    )


def _read_metrics(
    result: Mapping[str, Any], *, samples: Mapping[str, Sequence[Mapping[str, Any]]], task: Any
) -> tuple[dict[str, MetricValue], dict[str, DocumentValues]]:
    """lm-eval's numbers, and what each document adds to them, by our names of the metrics; a metric without a direction is left out."""
    name = harness.task_name(task)
    values_by_key, directions = result["results"][name], result["higher_is_better"][name]
    metrics: dict[str, MetricValue] = {}
    values: dict[str, DocumentValues] = {}
    for key, value in values_by_key.items():
        metric, comma, filter_name = key.partition(",")
        higher_is_better = directions.get(metric)
        if not comma or metric.endswith("_stderr") or not isinstance(higher_is_better, bool):
            continue
        our_name = harness.metric_name(metric, filter_name=filter_name, task=task)
        standard_error = values_by_key.get(f"{metric}_stderr,{filter_name}")
        if (contributions := _document_values(samples[filter_name], metric=metric, aggregation=task.aggregation().get(metric))) is not None:
            values[our_name] = contributions
            if task.aggregation()[metric] is not lm_eval_metrics.mean:
                standard_error = contributions.standard_error
        metrics[our_name] = MetricValue(
            value=float(value),
            standard_error=float(standard_error) if isinstance(standard_error, float) else None,
            higher_is_better=higher_is_better,
        )
    return metrics, values


def _document_values(samples: Sequence[Mapping[str, Any]], *, metric: str, aggregation: Any) -> DocumentValues | None:
    """A metric's per-document part, where lm-eval's aggregation is a mean, a ratio or the exponential of one."""
    if any(metric not in sample for sample in samples):
        return None  # reported for some documents only, so that two models could not be paired
    items = [sample[metric] for sample in samples]
    if aggregation is lm_eval_metrics.mean:
        return DocumentValues(numerators=tuple(map(float, items)), denominators=tuple(repeat(1.0, len(items))), exponential=False)
    if aggregation is lm_eval_metrics.perplexity:
        return DocumentValues(numerators=tuple(-float(nats) for nats in items), denominators=tuple(repeat(1.0, len(items))), exponential=True)
    if aggregation in (lm_eval_metrics.weighted_perplexity, lm_eval_metrics.bits_per_byte):
        is_bits = aggregation is lm_eval_metrics.bits_per_byte
        unit = math.log(2) if is_bits else 1.0
        return DocumentValues(
            numerators=tuple(-float(nats) / unit for nats, _ in items),
            denominators=tuple(float(weight) for _, weight in items),
            exponential=not is_bits,
        )
    return None


def _refuse_non_finite(samples: Sequence[Mapping[str, Any]], *, task: Any) -> None:
    if task.OUTPUT_TYPE == "generate_until":
        return
    broken = sum(not all(math.isfinite(nats) for nats in _log_probabilities(sample, task=task)) for sample in samples)
    if broken:
        raise FloatingPointError(
            f"task {harness.task_name(task)}: the log-likelihood is not finite on {broken} of {len(samples)} documents: the model has diverged"
        )


def _log_probabilities(sample: Mapping[str, Any], *, task: Any) -> list[float]:
    """Nats, one per request of the document."""
    responses = [repeats[0] for repeats in sample["resps"]]
    return [float(response if task.OUTPUT_TYPE == "loglikelihood_rolling" else response[0]) for response in responses]


def _likelihood(samples: Sequence[Mapping[str, Any]], *, task: Any) -> tuple[float, ...] | None:
    if task.OUTPUT_TYPE == "generate_until":
        return None
    per_document = []
    for sample in samples:
        # Everything scored stands last among a request's arguments: the choice, the target, the document.
        lengths = [len(arguments[-1].encode()) for arguments in sample["arguments"]]
        rates = [nats / math.log(2) / max(1, length) for nats, length in zip(_log_probabilities(sample, task=task), lengths, strict=True)]
        right = [rates[index] for index in _right_answers(sample, task=task) if 0 <= index < len(rates)]
        if not right:
            return None  # the task has no gold for this document
        per_document.append(max(right))
    return tuple(per_document)


def _right_answers(sample: Mapping[str, Any], *, task: Any) -> list[int]:
    """Indices of the requests that hold the right answer, read as lm-eval reads them in `process_results`."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return [0]
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    if isinstance(gold, str):
        choices = task.doc_to_choice(sample["doc"])
        return [choices.index(gold)] if gold in choices else []
    return list(gold) if isinstance(gold, list) else [gold]
