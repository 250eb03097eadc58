"""Whether a task can rank anything: how far the teacher stands from random weights on it, by its metric and by its likelihood forms. Pure.

A student lies between the two. Where they cannot be told apart (stock BLiMP on a teacher of 260 thousand parameters) a score is noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nas.errors import InvalidSpec, Problem
from nas.search.results import Metric, RungResult
from nas.spec import TaskSpec

WEAK_Z = 2.0
"""A task is weak when the teacher beats random weights by fewer than this many combined standard errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSignal:
    """The teacher against random weights on one task of the spec, on the documents of the rungs."""

    task: str
    teacher: float
    random: float
    z: float | None
    """By how many combined standard errors the teacher is better; negative where it is worse. None: both are exact, and it is."""
    clear: bool
    in_objective: bool
    """Clear, or the spec insists."""
    clear_forms: tuple[str, ...]
    """Likelihood forms by which the teacher is clear; any of them can be the task's metric."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_signals(tasks: Sequence[TaskSpec], *, teacher: RungResult, random: RungResult) -> tuple[TaskSignal, ...]:
    """The signal of each task of the spec, in its order."""
    signals = []
    for task in tasks:
        high, low = teacher.tasks[task.name], random.tasks[task.name]
        forms = teacher.likelihoods.get(task.name, {}), random.likelihoods.get(task.name, {})
        z = standard_errors_apart(high, low)
        signals.append(
            TaskSignal(
                task=task.name,
                teacher=high.value,
                random=low.value,
                z=z if math.isfinite(z) else None,
                clear=z >= WEAK_Z,
                in_objective=z >= WEAK_Z or task.insist,
                clear_forms=tuple(form for form, metric in forms[0].items() if form in forms[1] and standard_errors_apart(metric, forms[1][form]) >= WEAK_Z),
            )
        )
    return tuple(signals)


def check_signals(signals: Sequence[TaskSignal]) -> None:
    """
    Raises:
        InvalidSpec: no task is left for the objective, or on one that the spec insists on the teacher does not beat random weights at all:
            the objective would divide by zero, or reward shapes for being worse.
    """
    problems = []
    nothing_left = not any(signal.in_objective for signal in signals)
    for index, signal in enumerate(signals):
        got = f"{signal.task}: teacher {signal.teacher:.6g}, random weights {signal.random:.6g}"
        if signal.in_objective and signal.z is not None and signal.z <= 0:
            problems.append(Problem(field=f"tasks.{index}", expected="a task on which the teacher beats random weights", got=got))
        elif nothing_left:
            hint = f", or its metric {' or '.join(signal.clear_forms)}, by which it does" if signal.clear_forms else ""
            expected = f"a task on which the teacher is better than random weights by {WEAK_Z:g} standard errors, or insist{hint}"
            problems.append(Problem(field=f"tasks.{index}", expected=expected, got=f"{got}, {signal.z or 0.0:.2f} standard errors"))
    if problems:
        raise InvalidSpec(*problems)


def standard_errors_apart(teacher: Metric, random: Metric) -> float:
    """By how many combined standard errors the teacher is better than random weights; infinite where both are exact."""
    gain = teacher.value - random.value if teacher.higher_is_better else random.value - teacher.value
    error = math.hypot(teacher.standard_error, random.standard_error)
    if error > 0:
        return gain / error
    return math.copysign(math.inf, gain) if gain else 0.0
