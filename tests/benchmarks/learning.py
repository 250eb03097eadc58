"""Learning curves: one student, one recipe, held-out loss after N tokens for several N, as JSON lines; stopped and started again at will.

One constant-rate trunk with a short decay branch for every point, so each point is a finished run of that many tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nas.compress.distillation import distil
from nas.compress.held_out import evaluate_kl
from nas.compress.objective import Objective
from nas.compress.train_plan import TrainPlan
from nas.compress.train_state import load_trunk

DECAY_SHARE = 0.3
"""Of a run's tokens; chosen in LOG.md (learning rate, batch and decay of a short run)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One curve: what is trained and how. Equal runs give equal curves."""

    teacher: str
    shape: str
    """Name of a shape of that teacher."""
    method: str
    learning_rate: float
    batch_size: int
    seed: int = 0
    """Of the data order, and of the weights where they are random."""

    @property
    def key(self) -> str:
        return f"{self.teacher}-{self.shape}-{self.method}-{self.learning_rate:g}-{self.batch_size}-{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The end of a run of `tokens`, on held-out blocks; nats per token."""

    run: Run
    tokens: int
    loss: float
    loss_se: float
    kl: float
    kl_se: float
    seconds: float
    """Training only, since the point before: trunk and branch."""

    def line(self) -> str:
        values = asdict(self)
        return json.dumps({**values.pop("run"), **{name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}})


def read_points(files: Iterable[Path]) -> list[Point]:
    """All points of JSON-line files; the last of equal ones counts."""
    points: dict[tuple[Run, int], Point] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            values: dict[str, Any] = json.loads(line)
            run = Run(**{name: values.pop(name) for name in Run.__dataclass_fields__})
            point = Point(run=run, **values)
            points[run, point.tokens] = point
    return list(points.values())


def trace(
    run: Run,
    *,
    tokens: Sequence[int],
    student: Callable[[], nn.Module],
    objective: Objective,
    plan: Callable[[int], TrainPlan],
    train_NT: Tensor,
    held_out: tuple[nn.Module, Tensor],
    folder: Path,
) -> Iterator[Point]:
    """The points of one run that `folder` does not hold yet, in order; each is appended to `folder`/KEY.jsonl as it is done.

    Args:
        tokens: ascending.
        student: makes it as it is before training.
        plan: of a run of that many tokens; they differ in length only.
        held_out: the teacher of the KL and the blocks.
    """
    file, work = folder / f"{run.key}.jsonl", folder / "work" / run.key
    done = {point.tokens for point in read_points([file])} if file.exists() else set()
    folder.mkdir(parents=True, exist_ok=True)
    for index, number in enumerate(tokens):
        if number in done:
            continue
        state = load_trunk(work / str(tokens[index - 1])) if index else None
        model = student()
        trained = distil(model, objective=objective, blocks_NT=train_NT, plan=plan(number), state=state, checkpoint=work / str(number))
        measured = evaluate_kl(model, teacher=held_out[0], blocks_NT=held_out[1], batch_size=16)
        assert measured.kl is not None
        assert measured.kl_standard_error is not None
        point = Point(
            run=run,
            tokens=number,
            loss=measured.loss,
            loss_se=measured.loss_standard_error,
            kl=measured.kl,
            kl_se=measured.kl_standard_error,
            seconds=trained.seconds,
        )
        with file.open("a", encoding="utf-8") as stream:
            stream.write(point.line() + "\n")
        if index:
            shutil.rmtree(work / str(tokens[index - 1]), ignore_errors=True)
        yield point
