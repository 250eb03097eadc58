"""An lm-eval task as token arrays: what lm-eval would ask of any model with this tokenizer and context, recorded once and kept on disk.

The prompts are lm-eval's own: its task renders them, its Hugging Face model encodes, splits and windows them; only the model is missing.
Scores come from `scoring.py`. A pack is bound to the task's digest, its worked examples, the tokenizer, the context and the documents.

Shape suffixes: S tokens of all sequences, Q sequences, R requests, N documents.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from nas.compress.manifest import load_tensors, save_tensors
from nas.errors import CorruptFile, NotFound, TaskUnavailable
from nas.evaluate import harness
from nas.evaluate.prefix_trees import Ints

logger = logging.getLogger(__name__)

PACKED_KINDS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
"""lm-eval's output types that are sums of log-probabilities of given tokens."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pack:
    """The requests of some documents of a task. A request's log-probability is the sum over its sequences (the windows of a long page)."""

    task: str
    document_ids: tuple[int, ...]
    """Ascending."""
    key: str
    """Digest of what the prompts depend on: `pack_key`."""
    tokens_S: Ints
    starts_Q: Ints
    """Where each sequence begins in `tokens_S`; it ends where the next one begins."""
    num_scored_Q: Ints
    """Tokens at the end of each sequence whose probability is asked for."""
    requests_Q: Ints
    """The request that a sequence belongs to, ascending."""
    documents_R: Ints
    """Position in `document_ids` of the document that a request belongs to, ascending."""
    bytes_R: Ints
    """UTF-8 bytes of the scored text."""

    def sequences(self) -> list[Ints]:
        return np.split(self.tokens_S, self.starts_Q[1:])

    def select(self, document_ids: Sequence[int]) -> Pack:
        """The pack of some of its documents.

        Raises:
            ValueError: a document is not in the pack.
        """
        chosen = sorted(set(document_ids))
        if not chosen or (absent := set(chosen) - set(self.document_ids)):
            raise ValueError(
                f"documents of {self.task}: expected at least one of the {len(self.document_ids)} in the pack, got {sorted(absent)[:5] if chosen else 'none'}"
            )
        if tuple(chosen) == self.document_ids:
            return self
        places_R = np.searchsorted(chosen, np.asarray(self.document_ids)[self.documents_R])
        kept_R = np.isin(np.asarray(self.document_ids)[self.documents_R], chosen)
        kept_Q = kept_R[self.requests_Q]
        sequences = [sequence for sequence, kept in zip(self.sequences(), kept_Q, strict=True) if kept]
        return Pack(
            task=self.task,
            document_ids=tuple(chosen),
            key=self.key,
            **_flatten(sequences),
            num_scored_Q=self.num_scored_Q[kept_Q],
            requests_Q=(np.cumsum(kept_R) - 1)[self.requests_Q[kept_Q]],
            documents_R=places_R[kept_R],
            bytes_R=self.bytes_R[kept_R],
        )


def find_pack(folder: Path, *, task: Any, digest: str, num_fewshot: int | None, tokenizer: Any, config: Any, documents: Sequence[int], max_length: int) -> Pack:
    """The pack in a folder, made anew where it is missing, damaged or of something else. Arguments and errors as of `pack_key` and `build_pack`."""
    key = pack_key(digest, num_fewshot=num_fewshot, tokenizer=tokenizer, max_length=max_length, documents=documents)
    try:
        return load_pack(folder, name=harness.task_name(task), key=key)
    except (NotFound, CorruptFile) as missing:
        logger.info("pack of task %s has to be made", harness.task_name(task), extra={"action": "build_pack", "reason": str(missing)})
    pack = build_pack(task, tokenizer=tokenizer, config=config, documents=documents, max_length=max_length, key=key)
    save_pack(pack, folder=folder)
    return pack


def can_pack(task: Any) -> bool:
    """Whether a built lm-eval task is scored by sums of log-probabilities and reads them unfiltered, once each."""
    filters = task.config.filter_list or []
    is_plain = all([step["function"] for step in one["filter"]] == ["take_first"] for one in filters)
    return task.OUTPUT_TYPE in PACKED_KINDS and task.config.repeats == 1 and len(filters) <= 1 and is_plain


def pack_key(digest: str, *, num_fewshot: int | None, tokenizer: Any, max_length: int, documents: Sequence[int]) -> str:
    """Digest of all that a pack depends on.

    Args:
        digest: of the task's folder (`TaskCard.digest`).
        num_fewshot: worked examples; None: as many as the task's YAML says.
    """
    prefix = [tokenizer.bos_token, tokenizer.eos_token, type(tokenizer).__name__]
    parts = [digest, num_fewshot, hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(), prefix, max_length, sorted(set(documents))]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def build_pack(task: Any, *, tokenizer: Any, config: Any, documents: Sequence[int], max_length: int, key: str) -> Pack:
    """Records what lm-eval asks of a model on some documents.

    Args:
        task: from `tasks.load_tasks`, one that `can_pack`.
        config: a transformers config of the model's architecture; no weight is read.
        documents: ids within the task's evaluation split.
        max_length: tokens of context; longer prompts lose their start, pages are cut into windows.
        key: from `pack_key`.
    Raises:
        TaskUnavailable: a document's target has no tokens, or more than `max_length`.
    """
    name, chosen = harness.task_name(task), sorted(set(documents))
    instances = harness.build_requests(task, documents=chosen)
    with without_trace(tokenizer), harness.isolated():
        sequences = _Recorder(tokenizer, config=config, max_length=max_length).record(instances)
    requests_Q = np.repeat(np.arange(len(sequences)), [len(windows) for windows in sequences])
    flat = [sequence for windows in sequences for sequence in windows]
    if any(not 1 <= scored <= max_length or scored >= len(tokens) for tokens, scored in flat) or not all(sequences):
        raise TaskUnavailable(
            f"task {name}: expected targets of 1 to {max_length} tokens behind a context, got another (lm-eval refuses it without a word); "
            "the target of a loglikelihood task must bring its own leading space, or it melts into the context"
        )
    return Pack(
        task=name,
        document_ids=tuple(chosen),
        key=key,
        **_flatten([tokens for tokens, _ in flat]),
        num_scored_Q=np.asarray([scored for _, scored in flat], np.int64),
        requests_Q=requests_Q,
        documents_R=np.asarray([instance.doc_id for instance in instances], np.int64),
        # What is scored stands last among a request's arguments: the choice, the target, the page.
        bytes_R=np.asarray([len(instance.args[-1].encode()) for instance in instances], np.int64),
    )


def _flatten(sequences: Sequence[Ints]) -> dict[str, Ints]:
    lengths = [len(sequence) for sequence in sequences]
    return {"tokens_S": np.concatenate(sequences), "starts_Q": np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)}


_ARRAYS = ("tokens_S", "starts_Q", "num_scored_Q", "requests_Q", "documents_R", "bytes_R")


def save_pack(pack: Pack, *, folder: Path) -> None:
    """Writes a pack under its task's name; replaces an older one."""
    tensors = {name: torch.from_numpy(getattr(pack, name)) for name in _ARRAYS}
    save_tensors(folder, name=pack.task, tensors=tensors, facts={"task": pack.task, "key": pack.key, "document_ids": list(pack.document_ids)})


def load_pack(folder: Path, *, name: str, key: str) -> Pack:
    """A memory-mapped pack.

    Raises:
        NotFound: there is none. CorruptFile: its file was changed, or it was made for something else.
    """
    tensors, facts = load_tensors(folder, name=name)
    if facts.get("key") != key:
        raise CorruptFile(f"{folder / name}.json: expected a pack with the key {key}, got {facts.get('key')}")
    return Pack(
        task=facts["task"],
        key=key,
        document_ids=tuple(facts["document_ids"]),
        **{array: tensor.numpy() for array, tensor in tensors.items() if array in _ARRAYS},
    )


class _Recorder(HFLM):  # type: ignore[misc]
    """lm-eval's own model without the model: it encodes as lm-eval encodes and keeps what it would have run."""

    def __init__(self, tokenizer: Any, *, config: Any, max_length: int) -> None:
        super().__init__(pretrained=SimpleNamespace(device=torch.device("cpu"), config=config), tokenizer=tokenizer, batch_size=1, max_length=max_length)
        self._recorded: list[tuple[Ints, int]] = []

    def record(self, instances: Sequence[Any]) -> list[list[tuple[Ints, int]]]:
        """(tokens, how many at their end are scored) of each sequence of each request."""
        if instances[0].request_type == "loglikelihood":
            self.loglikelihood(list(instances), disable_tqdm=True)
            return [[sequence] for sequence in self._recorded]
        windows = []
        for instance in instances:  # one by one, since only their number tells whose windows they are
            self._recorded = []
            self.loglikelihood_rolling([instance], disable_tqdm=True)
            windows.append(self._recorded)
        return windows

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_options: Any) -> list[tuple[float, bool]]:
        # Cut from the left as HFLM does: max_length tokens are read, and the one behind them is predicted.
        self._recorded += [
            (np.asarray((context + continuation)[-(self.max_length + 1) :], np.int64), len(continuation)) for _, context, continuation in requests
        ]
        return [(0.0, False)] * len(requests)


@contextlib.contextmanager
def without_trace(tokenizer: Any) -> Iterator[None]:
    """HFLM gives the tokenizer a padding token, which would end up in a saved checkpoint."""
    padding = tokenizer.pad_token
    try:
        yield
    finally:
        tokenizer.pad_token = padding
