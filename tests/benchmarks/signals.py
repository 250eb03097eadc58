"""Tokens per second of distillation from stored teacher signals against the teacher in the loop, beside the ceiling that the shapes allow.

With s the student's share of the teacher's parameters and h the head's: a step costs 6 s and, with the teacher in the loop, 2 of its forward pass. Exact
signals leave the head's 2 h of that, so the ceiling of the speed-up is (6 s + 2) / (6 s + 2 h); top-K signals leave nothing: (6 s + 2) / 6 s.
The kinds take turns on one thread; a number is the median over the rounds of the ratio of median steps. That exact signals give the same student, bit
for bit, is checked first. Random weights, since speed does not depend on them; needs no reference material.
"""

from __future__ import annotations

import copy
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nas.architecture import read_architecture
from nas.compress.distillation import distil
from nas.compress.objective import Objective, TeacherLogits
from nas.compress.signals import StoredSignals, StoredTeacher, StoredTopK, build_signals
from nas.compress.train_plan import TrainPlan
from nas.cost import SignalKind
from nas.search.prepare import random_model
from tests.benchmarks.training_speed import SEQUENCE_LENGTH, TEACHERS

GOAL = 0.85
"""Of the ceiling, at half size and at a quarter, with exact signals. Nothing of the teacher's body is left, and reading takes no time that a profile shows;
what is missing is the student's own step, which in small matrices costs more than three times its share of the teacher's forward pass."""
TOP_K = 512
STUDENTS: dict[str, dict[str, dict[str, int]]] = {
    "stories260K": {
        "half": {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
        "quarter": {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 112, "num_attention_heads": 2, "num_key_value_heads": 1},
        "quarter, half of the heads": {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    },
    "tales4M": {
        "half": {"num_hidden_layers": 7, "hidden_size": 128, "intermediate_size": 480, "num_attention_heads": 4, "num_key_value_heads": 2},
        "quarter": {"num_hidden_layers": 6, "hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    },
}
"""What students of a half and a quarter of the parameters have of their own. Attention costs time by heads, which the ceiling does not know: at this size,
where it takes half of the time, a student that keeps more heads than its share of parameters stays further below."""
RUNS = {"stories260K": ((4, 16), (16, 8)), "tales4M": ((4, 5),)}
"""(batch size, steps) of the timed runs."""
ROUNDS = 5

console = Console(width=150)


def bench() -> bool:
    """Prints the table; False where exact signals do not give the teacher's student. Speed never fails: machines are noisy."""
    table = Table("student, batch x tokens", "s", "h", "teacher in the loop", "exact", "ceiling", "share", "top-512", "ceiling", "share", "goal", box=None)
    threads, same = torch.get_num_threads(), True
    torch.set_num_threads(1)
    for name, sizes in STUDENTS.items():
        teacher = _model(TEACHERS[name]).requires_grad_(False)
        head_share = TEACHERS[name]["vocab_size"] * TEACHERS[name]["hidden_size"] / _count(teacher)
        for batch_size, steps in RUNS[name]:
            shape = steps * batch_size, SEQUENCE_LENGTH
            blocks_NT = torch.randint(0, TEACHERS[name]["vocab_size"], shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
            with tempfile.TemporaryDirectory() as folder:
                objectives = _objectives(teacher, blocks_NT, folder=Path(folder), batch_size=batch_size)
                for size, changes in sizes.items():
                    student = _model({**TEACHERS[name], **changes})
                    same = _is_same_student(student, objectives, blocks_NT, batch_size) and same
                    share = _count(student) / _count(teacher)
                    cells = _compare(student, objectives, blocks_NT, batch_size, share=share, head_share=head_share)
                    table.add_row(f"{name}, {size}, {batch_size} x {SEQUENCE_LENGTH}", f"{share:.2f}", f"{head_share:.2f}", *cells, f">= {GOAL:.0%}")
    torch.set_num_threads(threads)
    console.print(table)
    console.print(f"exact signals and the teacher in the loop give {'the same student, bit for bit' if same else 'students that DIFFER'}")
    return same


def _model(config: dict[str, Any]) -> nn.Module:
    return random_model(read_architecture(config), config=config, seed=0, device="cpu")


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _objectives(teacher: nn.Module, blocks_NT: Tensor, *, folder: Path, batch_size: int) -> dict[str, Objective]:
    kinds: tuple[SignalKind, ...] = ("exact", "top_k")
    for kind in kinds:
        build_signals(teacher, blocks_NT=blocks_NT, part=kind, kind=kind, top_k=TOP_K, folder=folder, teacher_digest="", batch_size=batch_size)
    exact, kept = (StoredSignals(folder, part=kind) for kind in kinds)
    return {"teacher": TeacherLogits(teacher), "exact": TeacherLogits(StoredTeacher(exact)), "top_k": StoredTopK(kept)}


def _train(student: nn.Module, objective: Objective, blocks_NT: Tensor, batch_size: int) -> tuple[nn.Module, float]:
    """The trained student, and the tokens per second of its median step."""
    clock: list[float] = []

    def tick() -> bool:
        clock.append(time.perf_counter())
        return False

    model = copy.deepcopy(student)
    plan = TrainPlan(tokens=blocks_NT.numel(), learning_rate=1e-3, batch_size=batch_size)
    distil(model, objective=objective, blocks_NT=blocks_NT, plan=plan, should_stop=tick)
    return model, batch_size * SEQUENCE_LENGTH / median(end - start for start, end in pairwise(clock[1:]))


def _is_same_student(student: nn.Module, objectives: dict[str, Objective], blocks_NT: Tensor, batch_size: int) -> bool:
    expected, found = (_train(student, objectives[kind], blocks_NT, batch_size)[0] for kind in ("teacher", "exact"))
    return all(torch.equal(one, other) for one, other in zip(expected.parameters(), found.parameters(), strict=True))


def _compare(student: nn.Module, objectives: dict[str, Objective], blocks_NT: Tensor, batch_size: int, *, share: float, head_share: float) -> list[str]:
    """Cells of the table: the teacher's tokens per second; per kind the speed-up, its ceiling and the share of it."""
    rounds = [{kind: _train(student, objective, blocks_NT, batch_size)[1] for kind, objective in objectives.items()} for _ in range(ROUNDS)]
    cells = [f"{median(speeds['teacher'] for speeds in rounds):,.0f}/s"]
    for kind, left in (("exact", 2 * head_share), ("top_k", 0.0)):
        ratio, ceiling = median(speeds[kind] / speeds["teacher"] for speeds in rounds), (6 * share + 2) / (6 * share + left)
        cells += [f"{ratio:.2f}x", f"{ceiling:.2f}x", f"{ratio / ceiling:.0%}"]
    return cells
