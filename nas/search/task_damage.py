"""What a set of layers costs on the search's own tasks, for the prepare step: validation loss can pick the wrong layers where a task picks the right ones.

Source: arXiv 2408.11796, figures 8 and 9 (Winogrande). The bare cut is scored, as there, on the documents that the rungs see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nas.compress.depth import Damage
from nas.compress.slicing import build_student
from nas.compress.sorting import Sorting
from nas.evaluate.scores import MetricValue
from nas.search.shared import teacher_dtype
from nas.search.task_scoring import TaskScorer
from nas.spec import SearchSpec, objective_metrics

TIE_WEIGHT = 1e-6
"""Of the KL: accuracies on a few hundred documents tie, and then it decides. Far below what one document changes."""


def task_damage(spec: SearchSpec, *, inputs: Mapping[str, Any], prepared: Path, sorting: Sorting, kl: Damage, device: str) -> Damage:
    """A function kept layers -> what is lost of the teacher's metrics, as a share of them, weighted as in the objective.

    NaN where the cut model's scores are not finite.

    Args:
        prepared: has the split of the documents, and keeps the packs.
        sorting: of the whole teacher; whatever layers it has selected are not read.
        kl: decides ties.
    """
    scorer = TaskScorer(spec, inputs=inputs, prepared=prepared, teacher=sorting.folder, device=device)
    metrics = objective_metrics(spec, inputs=inputs)
    total = math.fsum(task.weight for task in spec.tasks)

    def values(kept: tuple[int, ...]) -> dict[str, MetricValue]:
        model = _cut(sorting, kept=kept, dtype=teacher_dtype(spec, device=device), device=device)
        scores = scorer.score(model)
        return {name: scores.tasks[name].metric(metric) for name, metric in metrics.items()}

    whole = values(tuple(range(sorting.architecture.shape.num_hidden_layers)))

    def damage(kept: tuple[int, ...]) -> float:
        try:
            cut = values(kept)
        except FloatingPointError:
            return math.nan
        return math.fsum(task.weight / total * _share_lost(whole[task.name], cut[task.name]) for task in spec.tasks) + TIE_WEIGHT * kl(kept)

    return damage


@torch.no_grad()
def _cut(sorting: Sorting, *, kept: tuple[int, ...], dtype: str, device: str) -> PreTrainedModel:
    shape = replace(sorting.architecture.shape, num_hidden_layers=len(kept))
    return build_student(replace(sorting, layers={len(kept): kept}), shape, dtype=dtype, device=device).eval()


def _share_lost(teacher: MetricValue, cut: MetricValue) -> float:
    lost = teacher.value - cut.value if teacher.higher_is_better else cut.value - teacher.value
    return lost / max(abs(teacher.value), 1e-9)
