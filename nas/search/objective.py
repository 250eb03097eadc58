"""The score of a trial: tasks on the scale between random weights and the teacher, with its error. Pure.

Every error of a score holds both parts: over documents, and between training seeds (`nas/search/seeds.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nas.search.results import RungResult
from nas.search.rungs import paired_difference
from nas.search.seeds import score_error
from nas.search.task_signals import check_signals, read_signals
from nas.spec import TaskSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScale:
    """One task of the objective: 0 is what random weights score, 1 what the teacher scores."""

    name: str
    weight: float
    """Share of the objective; the weights of all scales sum to 1."""
    teacher: float
    random: float
    higher_is_better: bool
    seed_error: float = 0.0
    """Its part of the standard deviation of the objective between training seeds. The parts of all scales add up: one seed moves all tasks together."""

    @property
    def slope(self) -> float:
        """Change of the objective per unit of this task's metric; negative where lower is better."""
        return self.weight / (self.teacher - self.random)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A weighted mean over tasks. The error is that over documents, tasks taken as independent, and that between training seeds; teacher and random
    weights count as exact."""

    value: float
    standard_error: float


def make_scales(tasks: Sequence[TaskSpec], *, teacher: RungResult, random: RungResult) -> tuple[TaskScale, ...]:
    """The scale of each task of the objective, weights normalised: a task on which the teacher does not stand clear of random weights is left out.

    Raises:
        InvalidSpec: no task is left, or one that the spec insists on cannot be part of an objective (`task_signals.check_signals`).
    """
    signals = read_signals(tasks, teacher=teacher, random=random)
    check_signals(signals)
    kept = [task for task, signal in zip(tasks, signals, strict=True) if signal.in_objective]
    total = math.fsum(task.weight for task in kept)
    return tuple(
        TaskScale(
            name=task.name,
            weight=task.weight / total,
            teacher=teacher.tasks[task.name].value,
            random=random.tasks[task.name].value,
            higher_is_better=teacher.tasks[task.name].higher_is_better,
        )
        for task in kept
    )


def objective(result: RungResult, *, scales: Sequence[TaskScale]) -> Score:
    """Weighted mean over tasks of (metric - random) / (teacher - random): 0 for random weights, 1 for the teacher."""
    value = math.fsum(scale.slope * (result.tasks[scale.name].value - scale.random) for scale in scales)
    of_documents = (scale.slope * result.tasks[scale.name].standard_error for scale in scales)
    return Score(value=value, standard_error=math.hypot(seed_error(scales), *of_documents))


def with_seed_error(scales: Sequence[TaskScale], *, results: Sequence[RungResult], seed_spread: float) -> tuple[TaskScale, ...]:
    """The scales with the objective's spread between seeds, by how the objective follows the KL among these results of one rung (`seeds.score_error`)."""
    error = score_error([(result.kl.value, objective(result, scales=scales).value) for result in results], seed_spread=seed_spread)
    return tuple(replace(scale, seed_error=scale.weight * error) for scale in scales)


def seed_error(scales: Sequence[TaskScale]) -> float:
    """Standard deviation of the objective between training seeds; 0 before `with_seed_error`."""
    return math.fsum(scale.seed_error for scale in scales)


def difference(result: RungResult, other: RungResult, *, scales: Sequence[TaskScale]) -> Score:
    """objective(result) - objective(other), paired over the documents of each task: a far smaller error than that of either. Seeds are not paired."""
    pairs = [(scale.slope, paired_difference(result.tasks[scale.name], other.tasks[scale.name])) for scale in scales]
    return Score(
        value=math.fsum(slope * paired.value for slope, paired in pairs),
        standard_error=math.hypot(math.sqrt(2) * seed_error(scales), *(slope * paired.standard_error for slope, paired in pairs)),
    )
