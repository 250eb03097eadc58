"""Learning curves: one student, one recipe, held-out loss after N tokens for several N; stopped and started again at will.

One constant-rate trunk with a short decay branch for every point, so each point is a finished run of that many tokens.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nas.compress.distillation import distil
from nas.compress.held_out import evaluate_kl
from nas.compress.objective import Objective
from nas.compress.teacher_outputs import TeacherOutputs
from nas.compress.train_plan import TrainPlan
from nas.compress.train_state import load_trunk


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Run:
    """What is trained and how. Equal runs give equal curves."""

    teacher: str
    shape: str
    """Name of a shape of that teacher (recipes.py)."""
    method: str
    """Name of a method (recipes.py)."""
    learning_rate: float
    batch_size: int
    seed: int = 0
    """Of the data order, and of the weights where they are random."""
    train_tokens: int
    """Of the text that is trained on; tokens beyond are further epochs."""

    @property
    def key(self) -> str:
        return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in asdict(self).values())


@dataclass(slots=True, kw_only=True)
class Curve:
    """Held-out loss and KL (nats per token) of one run after so many tokens; the lists run in parallel, tokens ascending."""

    run: Run
    tokens: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    loss_se: list[float] = field(default_factory=list)
    """Standard error over the held-out blocks."""
    kl: list[float] = field(default_factory=list)
    kl_se: list[float] = field(default_factory=list)
    epoch_tokens: int = 0
    """Distinct training tokens."""

    def at(self, tokens: int, *, quantity: str) -> float:
        values: list[float] = getattr(self, quantity)
        return values[self.tokens.index(tokens)]

    def as_line(self) -> str:
        """Compact JSON."""
        columns = {column.name: getattr(self, column.name) for column in fields(self) if column.name != "run"}
        return json.dumps({**asdict(self.run), **columns}, separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str) -> Curve:
        values: dict[str, Any] = json.loads(line)
        return cls(run=Run(**{item.name: values.pop(item.name) for item in fields(Run)}), **values)


def read_curves(file: Path) -> list[Curve]:
    """The curves of a data file; none where there is no file."""
    if not file.exists():
        return []
    return [Curve.from_line(line) for line in file.read_text(encoding="utf-8").splitlines()]


def trace(
    run: Run,
    *,
    tokens: Sequence[int],
    student: Callable[[], nn.Module],
    objective: Objective,
    plan: Callable[[int], TrainPlan],
    train_NT: Tensor,
    held_out_NT: Tensor,
    held_out: TeacherOutputs,
    folder: Path,
) -> Curve:
    """The curve of a run at these tokens (ascending); what `folder` holds of it is not computed again, and it holds all of it afterwards.

    Args:
        student: makes it as it is before training.
        plan: of a run of that many tokens; plans differ in their length only.
        held_out: the teacher's outputs on `held_out_NT`.
    """
    file, work = folder / f"{run.key}.json", folder / "work" / run.key
    curve = Curve.from_line(file.read_text(encoding="utf-8")) if file.exists() else Curve(run=run, epoch_tokens=train_NT.numel())
    folder.mkdir(parents=True, exist_ok=True)
    for before, number in pairwise((None, *tokens)):
        assert number is not None
        if number in curve.tokens:
            continue
        model = student()
        state = None if before is None else load_trunk(work / str(before))
        distil(model, objective=objective, blocks_NT=train_NT, plan=plan(number), state=state, checkpoint=work / str(number))
        measured = evaluate_kl(model, teacher=held_out, blocks_NT=held_out_NT, batch_size=16)
        place = bisect(curve.tokens, number)
        curve.tokens.insert(place, number)
        for name in ("loss", "kl"):
            getattr(curve, name).insert(place, round(getattr(measured, name), 4))
            getattr(curve, f"{name}_se").insert(place, round(getattr(measured, f"{name}_standard_error"), 4))
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(curve.as_line(), encoding="utf-8")
        temporary.replace(file)
        if before is not None:
            shutil.rmtree(work / str(before), ignore_errors=True)
    return curve


def tokens_to_reach(target: float, *, tokens: Sequence[int], values: Sequence[float]) -> float:
    """Tokens at which a falling curve first is at `target`, linear in the log of the tokens; 0 before its first point, infinity after its last."""
    if values[0] <= target:
        return 0.0
    for (t0, v0), (t1, v1) in pairwise(zip(tokens, values, strict=True)):
        if v1 <= target:
            return math.exp(math.log(t0) + (v0 - target) / (v0 - v1) * math.log(t1 / t0))
    return math.inf
