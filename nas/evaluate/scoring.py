"""A model's scores on lm-eval tasks: through a pack where the task has one, through lm-eval itself elsewhere, with the same numbers.

What lm-eval makes of log-probabilities is lm-eval's own code in both. Ranking, ties and chance levels are not its business (`search/ranking.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.models.huggingface import HFLM
from torch import nn

from nas.errors import InvalidSpec, Problem, TaskUnavailable
from nas.evaluate import harness
from nas.evaluate.likelihoods import sequence_likelihoods
from nas.evaluate.pack import Pack, without_trace
from nas.evaluate.scores import Answer, DocumentValues, MetricValue, Scores, TaskScore, form_value, likelihood_forms


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedTask:
    """A task and its pack, opened once and scored any number of times; `open_pack` makes it."""

    task: Any
    pack: Pack
    documents: tuple[harness.Document, ...]
    """In the order of the pack's ids."""
    right_R: tuple[bool | None, ...]
    """`harness.right_answers` of every request."""


def open_pack(pack: Pack, *, task: Any) -> PackedTask:
    """A pack beside the task that it was built from."""
    documents = tuple(harness.read_document(task, document_id) for document_id in pack.document_ids)
    num_requests = np.bincount(pack.documents_R, minlength=len(documents)).tolist()
    right = [harness.right_answers(task, document=document, num_requests=count) for document, count in zip(documents, num_requests, strict=True)]
    return PackedTask(task=task, pack=pack, documents=documents, right_R=tuple(answer for answers in right for answer in answers))


def score_packed(model: nn.Module, packed: Mapping[str, PackedTask], *, batch_tokens: int) -> Scores:
    """Scores a model on all documents of some packs; it is left as it was.

    Args:
        model: a transformers causal language model with the packs' tokenizer, on its device.
        batch_tokens: tokens of a forward pass, padding counted.
    Raises:
        FloatingPointError: a log-likelihood is not finite: the model has diverged.
    """
    with _evaluating(model):
        return Scores(tasks={name: _score_pack(model, task, batch_tokens=batch_tokens) for name, task in packed.items()})


def _score_pack(model: nn.Module, packed: PackedTask, *, batch_tokens: int) -> TaskScore:
    started = time.perf_counter()
    task, pack = packed.task, packed.pack
    found = sequence_likelihoods(model, sequences=pack.sequences(), num_scored=pack.num_scored_Q.tolist(), batch_tokens=batch_tokens)
    num_requests = len(pack.documents_R)
    nats_R = np.bincount(pack.requests_Q, weights=found.nats_Q, minlength=num_requests).tolist()
    missed_R = np.bincount(pack.requests_Q, weights=~found.is_greedy_Q, minlength=num_requests).tolist()
    samples, answers = [], []
    starts = np.searchsorted(pack.documents_R, np.arange(len(packed.documents) + 1)).tolist()
    is_rolling = task.OUTPUT_TYPE == "loglikelihood_rolling"
    _refuse_non_finite([nats_R[first:last] for first, last in itertools.pairwise(starts)], task=task)
    for document, (first, last) in zip(packed.documents, itertools.pairwise(starts), strict=True):
        responses = [nats if is_rolling else (nats, not missed) for nats, missed in zip(nats_R[first:last], missed_R[first:last], strict=True)]
        samples.append(harness.process(task, document=document, responses=responses))
        answers.append(_answers(nats_R[first:last], num_bytes=pack.bytes_R[first:last].tolist(), right=packed.right_R[first:last]))
    metrics, values = _aggregate(samples, task=task)
    return _with_forms(
        TaskScore(name=pack.task, metrics=metrics, document_ids=pack.document_ids, documents=values, seconds=time.perf_counter() - started), answers=answers
    )


def _aggregate(samples: Sequence[Mapping[str, Any]], *, task: Any) -> tuple[dict[str, MetricValue], dict[str, DocumentValues]]:
    """lm-eval's aggregation of what each document adds; a metric without a direction is left out."""
    metrics: dict[str, MetricValue] = {}
    values: dict[str, DocumentValues] = {}
    for metric in dict.fromkeys(metric for sample in samples for metric in sample):
        higher_is_better, aggregation = task.higher_is_better().get(metric), task.aggregation().get(metric)
        if not isinstance(higher_is_better, bool):
            continue
        standard_error: float | None = None
        if (contributions := _document_values(samples, metric=metric, aggregation=aggregation)) is not None:
            values[metric] = contributions
            standard_error = contributions.standard_error
        try:
            value = float(aggregation([sample[metric] for sample in samples if metric in sample]))
        except OverflowError as overflow:
            raise _too_large(task) from overflow
        metrics[metric] = MetricValue(value=value, standard_error=standard_error, higher_is_better=higher_is_better)
    return metrics, values


def _with_forms(score: TaskScore, *, answers: Sequence[Sequence[Answer]]) -> TaskScore:
    """A score with its likelihood forms; a metric of the task that has a form's name is that form."""
    forms = likelihood_forms(answers)
    return replace(
        score,
        metrics=dict(score.metrics) | {form: form_value(form, values) for form, values in forms.items() if form not in score.metrics},
        documents=dict(score.documents) | {form: values for form, values in forms.items() if form not in score.documents},
        forms=tuple(forms),
    )


def _answers(nats: Sequence[float], *, num_bytes: Sequence[int], right: Sequence[bool | None]) -> list[Answer]:
    requests = zip(nats, num_bytes, right, strict=True)
    return [Answer(nats=nat, num_bytes=size, is_right=is_right) for nat, size, is_right in requests if is_right is not None]


def score_stock(
    model: nn.Module,
    *,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    documents: Mapping[str, Sequence[int]],
    batch_size: int,
    max_length: int | None,
) -> Scores:
    """Scores a model with lm-eval itself; model, tokenizer and random state are left as they were.

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
        FloatingPointError: a log-likelihood is not finite: the model has diverged.
    """
    problems = [Problem(field=f"documents.{name}", expected="a task of " + ", ".join(tasks), got=repr(name)) for name in documents if name not in tasks]
    if batch_size < 1:
        problems.append(Problem(field="batch_size", expected="an integer of at least 1", got=str(batch_size)))
    if problems:
        raise InvalidSpec(*problems)
    with _evaluating(model), without_trace(tokenizer), harness.isolated():
        # In bfloat16 log-probabilities tie, and lm-eval counts a tie for the first choice.
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, softmax_dtype="float32")
        return Scores(tasks={name: _score_stock_task(lm, task=tasks[name], documents=documents[name]) for name in documents})


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode for a while."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _score_stock_task(lm: HFLM, *, task: Any, documents: Sequence[int]) -> TaskScore:
    started = time.perf_counter()
    name = harness.task_name(task)
    try:
        result = harness.run(lm, task=task, documents=documents)
    except OverflowError as overflow:
        raise _too_large(task) from overflow
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
    if task.OUTPUT_TYPE != "generate_until":
        _refuse_non_finite([_log_probabilities(sample, task=task) for sample in first_filter], task=task)
    metrics, values = _read_metrics(result, samples=samples, task=task)
    score = TaskScore(name=name, metrics=metrics, document_ids=document_ids, documents=values, seconds=time.perf_counter() - started)
    return score if task.OUTPUT_TYPE == "generate_until" else _with_forms(score, answers=[_sample_answers(sample, task=task) for sample in first_filter])


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


def _too_large(task: Any) -> FloatingPointError:
    return FloatingPointError(f"task {harness.task_name(task)}: the perplexity is too large for a number: the model has diverged")


def _refuse_non_finite(nats: Sequence[Sequence[float]], *, task: Any) -> None:
    """By document, one for each request. lm-eval itself would go on, and its argmax over NaN picks the first choice, the right one throughout BLiMP."""
    broken = sum(not all(map(math.isfinite, document)) for document in nats)
    if broken:
        raise FloatingPointError(
            f"task {harness.task_name(task)}: the log-likelihood is not finite on {broken} of {len(nats)} documents: the model has diverged"
        )


def _log_probabilities(sample: Mapping[str, Any], *, task: Any) -> list[float]:
    """Nats, one per request of the document."""
    responses = [repeats[0] for repeats in sample["resps"]]
    return [float(response if task.OUTPUT_TYPE == "loglikelihood_rolling" else response[0]) for response in responses]


def _sample_answers(sample: Mapping[str, Any], *, task: Any) -> list[Answer]:
    # Everything scored stands last among a request's arguments: the choice, the target, the document.
    sizes = [len(arguments[-1].encode()) for arguments in sample["arguments"]]
    right = harness.right_answers(task, document=sample["doc"], num_requests=len(sizes))
    return _answers(_log_probabilities(sample, task=task), num_bytes=sizes, right=right)
