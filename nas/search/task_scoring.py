"""The search's tasks: scored through packs on the documents that the rungs see, by lm-eval itself on the others and where a task has no pack."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from nas.compress.teacher import load_config, load_tokenizer
from nas.evaluate.pack import Pack, can_pack, find_pack
from nas.evaluate.scores import Scores
from nas.evaluate.scoring import PackedTask, open_pack, score_packed, score_stock
from nas.evaluate.tasks import load_tasks
from nas.search.layout import PACKS, SPLITS
from nas.spec import SearchSpec

CPU_BATCH_TOKENS = 1024
"""Tokens of a forward pass of the scoring on a CPU: more of them leave its caches (LOG.md)."""


class TaskScorer:
    """The tasks of a search, the documents of each, and the packs of those that the rungs see."""

    def __init__(self, spec: SearchSpec, *, inputs: Mapping[str, Any], prepared: Path, teacher: Path, device: str) -> None:
        """
        Args:
            prepared: has the split of the documents.
            teacher: a folder with the teacher's tokenizer and config.
        """
        self._tokenizer = load_tokenizer(teacher)
        self._tasks = load_tasks([Path(task["folder"]) for task in inputs["tasks"]], num_fewshot={task.name: task.num_fewshot for task in spec.tasks})
        self._splits: dict[str, dict[str, list[int]]] = json.loads((prepared / SPLITS).read_text(encoding="utf-8"))
        self._config = load_config(teacher)
        self._max_length: int = self._config.max_position_embeddings
        self._folder, self._digests = prepared / PACKS, {task["name"]: task["digest"] for task in inputs["tasks"]}
        self._num_fewshot = {task.name: task.num_fewshot for task in spec.tasks}
        self._batch_size = spec.evaluation.batch_size
        batch_tokens = (spec.distillation.micro_batch_size or spec.distillation.batch_size) * spec.corpus.sequence_length
        self._batch_tokens = batch_tokens if device != "cpu" else min(batch_tokens, CPU_BATCH_TOKENS)

    @cached_property
    def packed(self) -> dict[str, PackedTask]:
        """The tasks that have a pack; made where it is missing."""
        return {name: open_pack(self._find(name, task=task), task=task) for name, task in self._tasks.items() if can_pack(task)}

    def _find(self, name: str, *, task: Any) -> Pack:
        return find_pack(
            self._folder,
            task=task,
            digest=self._digests[name],
            num_fewshot=self._num_fewshot[name],
            tokenizer=self._tokenizer,
            config=self._config,
            documents=self._splits[name]["search"],
            max_length=self._max_length,
        )

    def score(self, model: PreTrainedModel) -> Scores:
        """A model's scores on the documents that the rungs see.

        Raises:
            FloatingPointError: the model has diverged.
        """
        scores = score_packed(model, self.packed, batch_tokens=self._batch_tokens)
        others = {name: split["search"] for name, split in self._splits.items() if name not in self.packed}
        return scores if not others else Scores(tasks={**scores.tasks, **self._score_stock(model, documents=others).tasks})

    def score_held_out(self, model: PreTrainedModel) -> Scores:
        """By lm-eval itself, on the documents that no rung sees."""
        return self._score_stock(model, documents={name: split["held_out"] for name, split in self._splits.items()})

    def _score_stock(self, model: PreTrainedModel, *, documents: Mapping[str, list[int]]) -> Scores:
        return score_stock(model, tokenizer=self._tokenizer, tasks=self._tasks, documents=documents, batch_size=self._batch_size, max_length=self._max_length)
