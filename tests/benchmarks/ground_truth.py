"""The ground truth of a search: every shape of a coarse grid distilled far beyond a search's last rung, as a search would distil it.

    NAS_REFERENCE=... python -m tests.benchmarks.ground_truth [--teacher T] [--processes N] [--full] [--folder build/benchmarks]

Every cell (shape, seed) in a process of its own on one thread, some side by side; stopped and started again at will. First all cells to FIRST_TOKENS, with
--full to the last of POINTS. Means go to data/ground_truth.jsonl, the KL of every validation block (float16) to data/ground_truth.npz, and the
student of every point stays under the folder (to be scored on tasks). Hours on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import save_file

from nas.architecture import Architecture, read_architecture
from nas.compress.distillation import distil
from nas.compress.held_out import evaluate_kl
from nas.compress.train_plan import TrainPlan, trunk_rate
from nas.compress.train_state import load_trunk
from nas.shape import Shape
from nas.space import SearchSpace
from nas.spec import AxisSpec, BudgetSpec, SpaceSpec
from tests.benchmarks.campaign import DATA, WORK
from tests.benchmarks.recipes import DECAY_SHARE, METHODS
from tests.benchmarks.reference import reference_folder
from tests.benchmarks.subjects import load_subject

MEANS, BLOCKS = DATA / "ground_truth.jsonl", DATA / "ground_truth.npz"
METHOD = "ours"
"""The defaults of a search: reconstruction, AdamW at the automatic rate, signals with the final hidden state."""
BATCH_SIZE = 4
"""Sequences of 128 tokens: what LOG.md found for teachers this small."""
TRAIN_TOKENS = {"stories260K": 2_000_000, "tales4M": 1_000_000}
POINTS = {
    "stories260K": (0, 6_250, 12_500, 25_000, 50_000, 100_000, 200_000, 1_000_000, 2_000_000),
    "tales4M": (0, 6_250, 12_500, 25_000, 50_000, 250_000, 500_000),
}
"""Tokens at which a student is measured: the rungs of a search, and ten times the last two of them."""
FIRST_TOKENS = {"stories260K": 1_000_000, "tales4M": 250_000}
BEST = 8
"""So many of the best shapes of the first budget get two more seeds."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Grid:
    """A coarse part of the legal space: of every frame the widest MLP that fits."""

    teacher: str
    max_fraction: float
    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    """(query heads, KV heads)."""
    width_multiple: int
    more: tuple[tuple[int, int, int, int], ...] = ()
    """(layers, hidden, query heads, KV heads) of single frames."""
    num_drawn: int = 0
    """Shapes drawn from the fine space beside the grid, on which the surrogate is checked (surrogate.py)."""
    fine: tuple[str, ...] = ()
    """Keys of single shapes of the fine space."""

    def shapes(self) -> list[Shape]:
        """In a fixed order."""
        space = self.space()
        widest: dict[tuple[int, int, int, int], Shape] = {}
        for shape in space.shapes():
            widest[shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads] = shape
        frames = [(layers, hidden, *heads) for layers, hidden, heads in product(self.layers, self.hidden, self.heads)]
        return [widest[frame] for frame in [*frames, *self.more] if frame in widest]

    def off_grid(self) -> list[Shape]:
        """The drawn and the single shapes that are not of the grid, in a fixed order."""
        generator, space = np.random.default_rng(0), self.fine_space()
        drawn = [space.draw(generator) for _ in range(self.num_drawn)]
        found = {shape.key: shape for shape in (*drawn, *map(Shape.from_key, self.fine))}
        return [shape for shape in found.values() if shape not in self.shapes()]

    def fine_space(self) -> SearchSpace:
        """The default ranges in steps of 2: every legal shape, and no longer only the widest of a frame."""
        steps = AxisSpec(multiple=2)
        return SearchSpace(
            teacher_architecture(self.teacher), space=SpaceSpec(hidden_size=steps, intermediate_size=steps), budget=BudgetSpec(max_fraction=self.max_fraction)
        )

    def space(self) -> SearchSpace:
        """The legal shapes among which the grid is."""
        architecture = teacher_architecture(self.teacher)
        steps = {"stories260K": 8, "tales4M": 24}[self.teacher]
        every = AxisSpec(min=1)
        return SearchSpace(
            architecture,
            space=SpaceSpec(
                num_hidden_layers=AxisSpec(min=2),
                hidden_size=AxisSpec(min=steps, multiple=steps),
                num_key_value_heads=every,
                query_heads_per_kv=every,
                intermediate_size=AxisSpec(min=self.width_multiple, multiple=self.width_multiple),
            ),
            budget=BudgetSpec(max_fraction=self.max_fraction),
        )


GRIDS = (
    Grid(
        teacher="stories260K",
        max_fraction=0.6,
        layers=(3, 4, 5),
        hidden=(40, 48, 56, 64),
        heads=((2, 2), (4, 2), (4, 4), (8, 4)),
        width_multiple=4,
        more=((2, 64, 8, 4),),
        num_drawn=32,
    ),
    Grid(
        teacher="stories260K",
        max_fraction=0.4,
        layers=(3, 4, 5),
        hidden=(40, 48, 56, 64),
        heads=((4, 2), (8, 4)),
        width_multiple=4,
        more=((5, 32, 8, 4), (3, 48, 4, 4)),
        num_drawn=12,
    ),
    Grid(teacher="tales4M", max_fraction=0.6, layers=(4, 6, 8), hidden=(144, 168, 192), heads=((4, 2), (6, 3)), width_multiple=16),
)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cell:
    """One shape of a grid, trained in one data order."""

    teacher: str
    max_fraction: float
    shape: str
    """Shape.key"""
    seed: int = 0

    @property
    def key(self) -> str:
        return f"{self.teacher}-{self.max_fraction}-{self.shape}-{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """What is known of a cell, at each of its points."""

    cell: Cell
    parameters: int
    tokens: list[int]
    kl: list[float]
    """On the first half of the validation blocks, those that a search's rungs see."""
    final_kl: list[float]
    """On the second half, which no rung sees."""
    final_loss: list[float]

    def as_line(self) -> str:
        """Compact JSON."""
        return json.dumps({**asdict(self.cell), **{item.name: getattr(self, item.name) for item in fields(self) if item.name != "cell"}}, separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str) -> Row:
        values: dict[str, Any] = json.loads(line)
        return cls(cell=Cell(**{item.name: values.pop(item.name) for item in fields(Cell)}), **values)


@cache
def teacher_architecture(teacher: str) -> Architecture:
    return read_architecture(json.loads((reference_folder() / "models" / teacher / "config.json").read_text(encoding="utf-8")))


def compute(cell: Cell, *, points: Sequence[int], folder: Path, work: Path) -> Row:
    """Train a cell through the points (ascending, 0 first), in this process on one thread; what `folder` holds of it is not computed again."""
    torch.set_num_threads(1)
    own = folder / "ground_truth" / cell.key
    own.mkdir(parents=True, exist_ok=True)
    subject = load_subject(cell.teacher, choices="ours", train_tokens=TRAIN_TOKENS[cell.teacher], cache=work)
    shape, method = Shape.from_key(cell.shape), METHODS[METHOD]
    start = method.start(subject, shape, cell.seed)
    rate, follows = trunk_rate(None, teacher_hidden_size=subject.sorting.architecture.shape.hidden_size)
    for before, tokens in pairwise((None, *points)):
        if (own / f"{tokens}.npz").exists():
            continue
        student = method.start(subject, shape, cell.seed).student if tokens else start.student
        if tokens:
            distil(
                student,
                objective=method.objective(subject, shape, start),
                blocks_NT=subject.train_NT,
                plan=TrainPlan(
                    tokens=tokens,
                    decay_tokens=int(DECAY_SHARE * tokens),
                    learning_rate=rate,
                    rate_follows_loss=follows,
                    batch_size=BATCH_SIZE,
                    seed=cell.seed,
                ),
                state=load_trunk(own / str(before)) if before else None,
                checkpoint=own / str(tokens),
            )
        measured = evaluate_kl(student, teacher=subject.held_out_outputs, blocks_NT=subject.held_out_NT, batch_size=16)
        assert measured.kl_N is not None
        save_file({name: tensor.contiguous().clone() for name, tensor in student.state_dict().items()}, own / f"{tokens}.safetensors")
        temporary = own / f"{tokens}.{os.getpid()}.npz"
        np.savez(temporary, kl_N=measured.kl_N.numpy(), loss_N=measured.loss_N.numpy())
        temporary.replace(own / f"{tokens}.npz")
        if before:
            shutil.rmtree(own / str(before), ignore_errors=True)
    parameters = sum(parameter.numel() for parameter in start.student.parameters())
    return _read(cell, parameters=parameters, own=own)


def _read(cell: Cell, *, parameters: int, own: Path) -> Row:
    tokens = sorted(int(file.stem) for file in own.glob("*.npz") if file.stem.isdigit())
    found = [np.load(own / f"{number}.npz") for number in tokens]
    half = len(found[0]["kl_N"]) // 2
    return Row(
        cell=cell,
        parameters=parameters,
        tokens=tokens,
        kl=[round(float(point["kl_N"][:half].mean()), 5) for point in found],
        final_kl=[round(float(point["kl_N"][half:].mean()), 5) for point in found],
        final_loss=[round(float(point["loss_N"][half:].mean()), 5) for point in found],
    )


def read_rows(file: Path = MEANS) -> list[Row]:
    """The rows of the committed table; none where there is no file."""
    return [Row.from_line(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def read_blocks(file: Path = BLOCKS) -> Mapping[str, NDArray[np.float16]]:
    """Cell.key -> KL [points, validation blocks]; the first half of the blocks is what rungs see."""
    return np.load(file)


def merge(rows: Sequence[Row], *, folder: Path) -> None:
    """Add rows to the table; a row replaces one of the same cell."""
    known = {row.cell: row for row in (*read_rows(), *rows)}
    MEANS.write_text("".join(known[cell].as_line() + "\n" for cell in sorted(known)), encoding="utf-8")
    blocks = dict(read_blocks()) if BLOCKS.exists() else {}
    for row in rows:
        own = folder / "ground_truth" / row.cell.key
        blocks[row.cell.key] = np.stack([np.load(own / f"{tokens}.npz")["kl_N"] for tokens in row.tokens]).astype(np.float16)
    np.savez_compressed(BLOCKS, **{key: blocks[key] for key in sorted(blocks)})


def cells(teacher: str, *, full: bool) -> Iterator[tuple[Cell, tuple[int, ...]]]:
    """What is to be computed, in the order of its worth: all shapes, then more seeds of the best (once they are known)."""
    points = tuple(tokens for tokens in POINTS[teacher] if full or tokens <= FIRST_TOKENS[teacher])
    for grid in GRIDS:
        if grid.teacher == teacher:
            yield from ((Cell(teacher=teacher, max_fraction=grid.max_fraction, shape=shape.key), points) for shape in [*grid.shapes(), *grid.off_grid()])
    shapes = {shape.key for shape in next(grid for grid in GRIDS if grid.teacher == teacher).shapes()}
    known = [row for row in read_rows() if (row.cell.teacher, row.cell.max_fraction, row.cell.seed) == (teacher, 0.6, 0) and row.tokens[-1] >= points[-1]]
    first = [row for row in known if row.cell.shape in shapes]
    if teacher == "stories260K" and len(first) == len(shapes):
        for row in sorted(first, key=lambda row: row.final_kl[row.tokens.index(points[-1])])[:BEST]:
            yield from ((Cell(teacher=teacher, max_fraction=0.6, shape=row.cell.shape, seed=seed), points) for seed in (1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=list(POINTS), action="append")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=WORK)
    arguments = parser.parse_args()
    console = Console()
    for teacher in arguments.teacher or POINTS:
        load_subject(teacher, choices="ours", train_tokens=TRAIN_TOKENS[teacher], cache=arguments.folder)  # made once, before the others read it
        while todo := _missing(cells(teacher, full=arguments.full)):
            with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
                futures = [pool.submit(compute, cell, points=points, folder=arguments.folder, work=arguments.folder) for cell, points in todo]
                for number, future in enumerate(as_completed(futures), start=1):
                    row = future.result()
                    merge([row], folder=arguments.folder)
                    console.print(f"{number} of {len(todo)}: {row.cell.key} KL {row.final_kl[-1]} after {row.tokens[-1]:,} tokens")


def _missing(wanted: Iterator[tuple[Cell, tuple[int, ...]]]) -> list[tuple[Cell, tuple[int, ...]]]:
    known = {row.cell: set(row.tokens) for row in read_rows()}
    return [(cell, points) for cell, points in wanted if not set(points) <= known.get(cell, set())]


if __name__ == "__main__":
    main()
