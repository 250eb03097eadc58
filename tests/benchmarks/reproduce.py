"""A few random cells of the committed curves and of the ground truth, computed again: they must lie within what another seed changes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import mean, variance

from rich.console import Console

from tests.benchmarks import ground_truth
from tests.benchmarks.campaign import DATA, WORK
from tests.benchmarks.ground_truth import Row, read_rows
from tests.benchmarks.learning import Curve, read_curves
from tests.benchmarks.recipes import compute
from tests.benchmarks.truth import Truth, read_truths

CELLS = {"stories260K": 3, "tales4M": 1}
MOST_TOKENS = 12_500
"""Seconds on one core, beside what is prepared once."""
TRUTH_CELLS = 3
MOST_TRUTH_TOKENS = {"stories260K": 25_000, "tales4M": 6_250}
"""Half a minute on one core each."""
ALLOWED = 3.0
"""Standard deviations between seeds."""
LEAST_SPREAD = 0.003
"""Nats per token; two processors round differently."""

console = Console(width=160)


def bench() -> bool:
    if not os.environ.get("NAS_REFERENCE"):
        console.print("NAS_REFERENCE is not set: the committed curves are not checked")
        return True
    curves, random = read_curves(DATA / "curves.jsonl"), Random()
    held = True
    for teacher, number in CELLS.items():
        short = [curve for curve in curves if curve.run.teacher == teacher and curve.tokens[0] <= MOST_TOKENS]
        for curve in random.sample(short, min(number, len(short))):
            held = _holds(curve, spread=seed_spread(curves, like=curve, tokens=curve.tokens[0])) and held
    rows, truths = read_rows(), {(truth.grid.teacher, truth.grid.max_fraction): truth for truth in read_truths()}
    rows = [row for row in rows if (row.cell.teacher, row.cell.max_fraction) in truths]
    for row in random.sample(rows, min(TRUTH_CELLS, len(rows))):
        held = _holds_true(row, truth=truths[row.cell.teacher, row.cell.max_fraction]) and held
    return held


def seed_spread(curves: Sequence[Curve], *, like: Curve, tokens: int) -> float:
    """Standard deviation of the loss between seeds, after so many tokens, pooled over the shapes of that teacher and method."""
    by_shape: dict[str, list[float]] = {}
    for curve in curves:
        if (curve.run.teacher, curve.run.method) == (like.run.teacher, like.run.method):
            by_shape.setdefault(curve.run.shape, []).append(curve.at(tokens, quantity="loss"))
    variances = [variance(losses) for losses in by_shape.values() if len(losses) > 1]
    return max(LEAST_SPREAD, mean(variances) ** 0.5 if variances else 0.0)


def _holds(curve: Curve, *, spread: float) -> bool:
    tokens = curve.tokens[0]
    with tempfile.TemporaryDirectory() as folder:
        again = compute(curve.run, tokens=[tokens], folder=Path(folder), cache=WORK)
    apart = abs(again.loss[0] - curve.loss[0])
    held = apart <= ALLOWED * spread
    console.print(
        f"{curve.run.key} after {tokens:,} tokens: committed {curve.loss[0]:.4f}, again {again.loss[0]:.4f}, "
        f"apart {apart:.4f} of {ALLOWED * spread:.4f} allowed: {'holds' if held else 'DOES NOT HOLD'}"
    )
    return held


def farthest(row: Row, kl: Sequence[float], *, truth: Truth) -> tuple[float, float, int]:
    """(apart, allowed, tokens) of the point of a cell whose KL, computed again, lies farthest from the committed one, by what a seed may change."""
    found = []
    for tokens, committed, again in zip(row.tokens, row.kl, kl, strict=False):
        allowed = ALLOWED * max(LEAST_SPREAD, truth.seed_sd(tokens) * committed if tokens in truth.tokens and tokens else 0.0)
        found.append((abs(again - committed), allowed, tokens))
    return max(found, key=lambda point: point[0] / point[1])


def _holds_true(row: Row, *, truth: Truth) -> bool:
    points = [tokens for tokens in row.tokens if tokens <= MOST_TRUTH_TOKENS[row.cell.teacher]]
    with tempfile.TemporaryDirectory() as folder:
        again = ground_truth.compute(row.cell, points=points, folder=Path(folder), work=WORK)
    apart, allowed, tokens = farthest(row, again.kl, truth=truth)
    held = apart <= allowed
    console.print(
        f"ground truth, {row.cell.key}, farthest after {tokens:,} tokens: KL apart {apart:.4f} of {allowed:.4f} allowed: {'holds' if held else 'DOES NOT HOLD'}"
    )
    return held
