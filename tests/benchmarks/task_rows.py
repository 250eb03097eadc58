"""What tasks said of the students of the ground truth, as committed; ground_truth_tasks.py makes it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks.campaign import DATA

TASKS = DATA / "ground_truth_tasks.jsonl"
NAMED = ("teacher", "random")
"""What a row has for its shape, if it is of no student."""
ACCURACIES = ("acc_norm", "acc")
"""lm-eval's names; the first that a task has is its accuracy."""

Values = Mapping[str, Mapping[str, float]]
"""Task -> metric or likelihood form -> value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """The scores of a student, or of the teacher or random weights (NAMED; max_fraction and tokens 0)."""

    teacher: str
    max_fraction: float
    shape: str
    seed: int
    tokens: int
    values: Values

    @property
    def place(self) -> tuple[str, float, str, int, int]:
        return self.teacher, self.max_fraction, self.shape, self.seed, self.tokens


def read_task_rows(file: Path = TASKS) -> list[TaskRow]:
    """The committed table; nothing where there is no file."""
    return [TaskRow(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def write_task_rows(rows: Iterable[TaskRow], *, file: Path = TASKS) -> None:
    """In a fixed order, compact."""
    file.write_text("".join(json.dumps(asdict(row), separators=(",", ":")) + "\n" for row in sorted(rows, key=lambda row: row.place)), encoding="utf-8")


def shares(row: TaskRow, *, teacher: TaskRow, random: TaskRow) -> dict[str, dict[str, float]]:
    """Task -> form -> how much of the way from random weights (0) to the teacher (1) a student has; higher is better, whatever the direction of the metric.

    The forms are `accuracy` and the likelihood forms, as far as the teacher stands clear of random weights by them.
    """
    found: dict[str, dict[str, float]] = {}
    for task, metrics in row.values.items():
        best, worst = teacher.values[task], random.values[task]
        ways = {metric: (value - worst[metric]) / (best[metric] - worst[metric]) for metric, value in metrics.items()}
        accuracy = next(ways[metric] for metric in ACCURACIES if metric in ways)
        found[task] = {"accuracy": accuracy} | {form: way for form, way in ways.items() if form not in ACCURACIES}
    return found
