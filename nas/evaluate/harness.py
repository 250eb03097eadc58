"""The one call into lm-eval: seeded, silent, and without a trace in the process.

It runs one built task on chosen documents and hands back lm-eval's own result. It knows no catalogue (`tasks.py`) and
gives the numbers no meaning (`scoring.py`). Not thread-safe: lm-eval keeps state on the task and uses global seeds.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from lm_eval import evaluator
from lm_eval.api import metrics as lm_eval_metrics

_FEWSHOT_SEED = 1234
_PYTHON_SEED, _NUMPY_SEED, _TORCH_SEED = 0, 1234, 1234
"""The defaults of `lm_eval.simple_evaluate`, so that a stock run draws the same few-shot examples."""

PAIRED_AGGREGATIONS = (lm_eval_metrics.mean, lm_eval_metrics.perplexity, lm_eval_metrics.weighted_perplexity, lm_eval_metrics.bits_per_byte)
"""Those whose metrics are a mean, a ratio or the exponential of one over documents: two models can be compared document by document."""

_BOOTSTRAP_ITERATIONS = 100
"""Only metrics without a closed form (f1, mcc, bleu) use them. 0 would drop every standard error, and 1 divides by zero."""


def run(lm: Any, *, task: Any, documents: Sequence[int]) -> dict[str, Any]:
    """lm-eval's result of `lm` on some documents of a task, with one logged sample per document and filter, by document id.

    Args:
        lm: an `lm_eval.api.model.LM`.
        task: from `tasks.load_tasks`; may be used again, lm-eval rebuilds its requests on every call.
        documents: ids within the task's evaluation split; order and repetitions do not matter.
    Raises:
        ValueError: no document, or one that the task does not have.
    """
    name = task_name(task)
    document_ids = _checked(documents, task=task)
    with _seeded(task):
        result: dict[str, Any] = evaluator.evaluate(
            lm,
            {"tasks": {name: task}},
            samples={name: document_ids},
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
            log_samples=True,
        )
    return result


def build_requests(task: Any, *, documents: Sequence[int]) -> list[Any]:
    """The requests that `run` would make, document by document; `doc_id` is the document's place among the sorted ones.

    Raises:
        ValueError: as `run`.
    """
    document_ids = _checked(documents, task=task)
    with _seeded(task):
        task.build_all_requests(samples=document_ids, rank=0, world_size=1)
    return list(task.instances)


class Document(dict[str, Any]):
    """One document of a task, with what its templates rendered: rendering them anew takes longer than a small model takes to read them."""

    __slots__ = ("rendered",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.rendered: dict[str, Any] = {}


def read_document(task: Any, document_id: int) -> Document:
    """A document whose renderings are kept from now on, if the task was made to `remember`."""
    return Document(task.eval_docs[document_id])


def remember(task: Any) -> None:
    """Makes a built task render the question, the choices and the target of a `Document` once."""
    for name in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        setattr(task, name, _remembering(getattr(task, name), name=name))


def _remembering(render: Callable[..., Any], *, name: str) -> Callable[..., Any]:
    def rendered(document: Any, *template: Any) -> Any:
        if template or not isinstance(document, Document):
            return render(document, *template)
        if name not in document.rendered:
            document.rendered[name] = render(document)
        return document.rendered[name]

    return rendered


def process(task: Any, *, document: Document, responses: Sequence[Any]) -> dict[str, Any]:
    """What lm-eval makes of the answers to one document's requests: a contribution to each metric, by lm-eval's name.

    Args:
        responses: (log-probability, is greedy) of each request in order; of a page, its log-probability alone.
    """
    contributions: dict[str, Any] = task.process_results(document, list(responses))
    return contributions


def right_answers(task: Any, *, document: Mapping[str, Any], num_requests: int) -> list[bool | None]:
    """For each request of a document whether it holds a right answer, as lm-eval reads it; None where it is no answer. All None: the document has no gold."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return [True] * num_requests
    # Behind the choices come the same ones without a context, where mutual information is a metric.
    num_choices = num_requests // 2 if "acc_mutual_info" in task.aggregation() else num_requests
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if isinstance(gold, str):
        choices = task.doc_to_choice(document)
        gold = choices.index(gold) if gold in choices else -1
    right = {index for index in (gold if isinstance(gold, list) else [gold]) if 0 <= index < num_choices}
    if not right:
        return [None] * num_requests
    return [index in right for index in range(num_choices)] + [None] * (num_requests - num_choices)


def _checked(documents: Sequence[int], *, task: Any) -> list[int]:
    document_ids, num_documents = sorted(set(documents)), len(task.eval_docs)
    if not document_ids or document_ids[0] < 0 or document_ids[-1] >= num_documents:
        # lm-eval takes an empty list for "all documents".
        got = f"{document_ids[0]}..{document_ids[-1]}" if document_ids else "none"
        raise ValueError(f"documents of {task_name(task)}: expected ids in 0..{num_documents - 1}, at least one, got {got}")
    return document_ids


@contextlib.contextmanager
def _seeded(task: Any) -> Iterator[None]:
    """Silent, and with the few-shot examples that a stock run draws."""
    with isolated():
        random.seed(_PYTHON_SEED)
        numpy.random.seed(_NUMPY_SEED)
        torch.manual_seed(_TORCH_SEED)
        task.set_fewshot_seed(_FEWSHOT_SEED)  # the sampler keeps its state between calls
        yield


def task_name(task: Any) -> str:
    """A built task's name; its own `task_name` draws from the global random state on every look."""
    return str(task.config.task)


def metric_name(metric: str, *, filter_name: str, task: Any) -> str:
    """Our name of a metric: lm-eval's without the filter, except behind a second or later filter of the task (`exact_match,flexible-extract`)."""
    filters = task.config.filter_list
    first_filter = filters[0]["name"] if filters else "none"
    return metric if filter_name == first_filter else f"{metric},{filter_name}"


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Runs lm-eval and datasets silently and without a trace: no bars, prints or lm-eval warnings, random state as before, no forked pool for a bootstrap.

    Standard output and error are swapped, since not every bar can be turned off by argument; logging handlers keep the stream they have.
    """
    lm_eval_logger = logging.getLogger("lm_eval")
    level = lm_eval_logger.level
    multiprocessing_disabled = os.environ.get("DISABLE_MULTIPROC")
    try:
        lm_eval_logger.setLevel(logging.ERROR)
        os.environ["DISABLE_MULTIPROC"] = "1"
        with _untouched_random_state(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if multiprocessing_disabled is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = multiprocessing_disabled
        lm_eval_logger.setLevel(level)


@contextlib.contextmanager
def _untouched_random_state() -> Iterator[None]:
    python_state, numpy_state, torch_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
