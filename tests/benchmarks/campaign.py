"""Computes the data under tests/benchmarks/data: every run in a process of its own on one thread, some side by side; stopped and started again at will.

    NAS_REFERENCE=... python -m tests.benchmarks.campaign grid|curves|headline [--teacher T] [--method M] [--processes N] [--folder build/benchmarks]

First `grid` (which learning rate and batch suits each method), then `curves` and `headline` with what the grid's data says. Each adds its curves to its
file under data/. Hours on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from tests.benchmarks.learning import Curve, Run, read_curves
from tests.benchmarks.recipes import METHODS, SHAPES, compute

DATA = Path(__file__).parent / "data"
WORK = Path("build/benchmarks")
"""Below the checkout: packed text, sorted teachers, signals, checkpoints."""

GRID = ((1, 5e-4), (1, 1e-3), (1, 2e-3), (2, 1e-3), (2, 2e-3), (4, 1e-3), (4, 2e-3), (4, 4e-3))
"""(batch size, learning rate): of every distilled method."""
GRID_SHAPES = {"stories260K": ("mlp50", "mixed51"), "tales4M": ("mixed52",)}
GRID_TOKENS = {"stories260K": 100_000, "tales4M": 50_000}
SCRATCH_GRID = ((4, 1e-3), (4, 2e-3), (4, 4e-3), (16, 2e-3), (16, 4e-3), (16, 8e-3))
SCRATCH_GRID_TOKENS = {"stories260K": 1_000_000, "tales4M": 250_000}

CURVE_TOKENS = {
    "stories260K": [12_500, 25_000, 50_000, 100_000, 200_000, 400_000, 1_000_000],
    "tales4M": [12_500, 25_000, 50_000, 100_000, 200_000, 500_000],
}
SHORTER_TOKENS = {"stories260K": 400_000, "tales4M": 200_000}
"""Where the curves of all seeds but the first end."""
CURVE_TRAIN_TOKENS = 2**20
CURVE_SHAPES = {
    "stories260K": ("mlp75", "mlp50", "heads84", "hidden75", "depth65", "mixed75", "mixed51", "mixed30"),
    "tales4M": ("mixed52", "mlp75", "hidden50", "depth59"),
}
CURVE_SEEDS = {"stories260K": (0, 1, 2), "tales4M": (0, 1)}

HEADLINE_SHAPE = {"stories260K": "winner58", "tales4M": "mixed52"}
HEADLINE_TRAIN_TOKENS = 10_000_000
STUDENT_TOKENS = [25_000, 50_000, 100_000, 250_000]
SCRATCH_TOKENS = [250_000, 500_000, 1_000_000, 2_000_000, 4_000_000, 6_500_000, 10_000_000]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(CAMPAIGNS))
    parser.add_argument("--teacher", choices=list(SHAPES), action="append")
    parser.add_argument("--method", choices=list(METHODS), action="append")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=WORK)
    arguments = parser.parse_args()
    runs = [
        (run, tokens)
        for teacher in arguments.teacher or SHAPES
        for method in arguments.method or METHODS
        for run, tokens in CAMPAIGNS[arguments.name](teacher, method)
    ]
    console = Console()
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [pool.submit(compute, run, tokens=tokens, folder=arguments.folder / "curves", cache=arguments.folder) for run, tokens in runs]
        for number, future in enumerate(as_completed(futures), start=1):
            curve = future.result()
            merge([curve], file=DATA / f"{arguments.name}.jsonl")
            console.print(f"{number} of {len(runs)}: {curve.run.key} loss {curve.loss[-1]} after {curve.tokens[-1]:,} tokens")


def merge(curves: Iterable[Curve], *, file: Path) -> None:
    """Add curves to a data file, sorted; a curve replaces one of the same run."""
    known = {curve.run: curve for curve in (*read_curves(file), *curves)}
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(known[run].as_line() + "\n" for run in sorted(known)), encoding="utf-8")


def grid(teacher: str, method: str) -> list[tuple[Run, list[int]]]:
    """Every rate and batch of a method: two shapes, or for scratch the headline's."""
    if METHODS[method].distilled:
        combinations, shapes, tokens, train_tokens = GRID, GRID_SHAPES[teacher], GRID_TOKENS[teacher], CURVE_TRAIN_TOKENS
    else:
        combinations, shapes, tokens, train_tokens = SCRATCH_GRID, (HEADLINE_SHAPE[teacher],), SCRATCH_GRID_TOKENS[teacher], HEADLINE_TRAIN_TOKENS
    return [
        (Run(teacher=teacher, shape=shape, method=method, learning_rate=rate, batch_size=batch_size, train_tokens=train_tokens), [tokens])
        for shape in shapes
        for batch_size, rate in combinations
    ]


def curves(teacher: str, method: str) -> list[tuple[Run, list[int]]]:
    """Every shape and seed with the method's best rate and batch; none where it is not distilled."""
    if not METHODS[method].distilled:
        return []
    rate, batch_size = best_recipe(teacher, method)
    base = Run(teacher=teacher, shape="", method=method, learning_rate=rate, batch_size=batch_size, train_tokens=CURVE_TRAIN_TOKENS)
    shorter = [tokens for tokens in CURVE_TOKENS[teacher] if tokens <= SHORTER_TOKENS[teacher]]
    return [
        (replace(base, shape=shape, seed=seed), shorter if seed else CURVE_TOKENS[teacher]) for seed in CURVE_SEEDS[teacher] for shape in CURVE_SHAPES[teacher]
    ]


def headline(teacher: str, method: str) -> list[tuple[Run, list[int]]]:
    """The winner's shape, with the method's best rate and batch."""
    rate, batch_size = best_recipe(teacher, method)
    run = Run(
        teacher=teacher,
        shape=HEADLINE_SHAPE[teacher],
        method=method,
        learning_rate=rate,
        batch_size=batch_size,
        train_tokens=HEADLINE_TRAIN_TOKENS,
    )
    return [(run, STUDENT_TOKENS if METHODS[method].distilled else SCRATCH_TOKENS)]


CAMPAIGNS = {"grid": grid, "curves": curves, "headline": headline}


def best_recipe(teacher: str, method: str) -> tuple[float, int]:
    """(learning rate, batch size): the method's own, or those with the lowest held-out loss in the grid's data, on average over its shapes."""
    if (own := METHODS[method].recipes.get(teacher)) is not None:
        return own
    losses: dict[tuple[float, int], list[float]] = {}
    for curve in read_curves(DATA / "grid.jsonl"):
        if (curve.run.teacher, curve.run.method) == (teacher, method):
            losses.setdefault((curve.run.learning_rate, curve.run.batch_size), []).append(curve.loss[-1])
    if not losses:
        raise SystemExit(f"{DATA / 'grid.jsonl'} has no runs of {method} on {teacher}: run the campaign `grid` for it first")
    most = max(map(len, losses.values()))
    return min((recipe for recipe, found in losses.items() if len(found) == most), key=lambda recipe: sum(losses[recipe]))


if __name__ == "__main__":
    main()
