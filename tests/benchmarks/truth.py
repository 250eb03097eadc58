"""One grid of the ground truth as arrays: what every shape measured at every point, and its final result with its error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from nas.shape import Shape
from tests.benchmarks.campaign import DATA
from tests.benchmarks.ground_truth import GRIDS, Grid, Row, read_blocks, read_rows
from tests.benchmarks.learning import read_curves

BEYOND = 10
"""The final result has this many times the tokens of the last rung."""
LEAST_SHAPES = 8
"""A grid with fewer finished shapes says nothing yet."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Truth:
    """The shapes of a grid that have their final result. S shapes, P points, N validation blocks; the first half of the blocks is what rungs see."""

    grid: Grid
    shapes: tuple[Shape, ...]
    parameters: NDArray[np.int64]
    """[S]"""
    tokens: tuple[int, ...]
    """Of the points, the last one that of the final result."""
    kl: tuple[tuple[NDArray[np.float64], ...], ...]
    """Of each shape, of each of its seeds: KL [P, N]. What a seed does to all shapes alike is taken out, since not every shape has every seed."""
    zero_shot_loss: NDArray[np.float64]
    """[S], on the blocks of the final result."""

    @property
    def name(self) -> str:
        return f"{self.grid.teacher} at {self.grid.max_fraction:.0%}"

    @property
    def last_rung_tokens(self) -> int:
        """The most tokens of a rung: a tenth of the final result's."""
        return self.tokens[-1] // BEYOND

    @property
    def final(self) -> NDArray[np.float64]:
        """[S], on the held-out half; the mean of its seeds."""
        return self.held_out().mean(axis=1)

    def at(self, tokens: int, *, seed: int = 0) -> NDArray[np.float64]:
        """KL that a search sees at so many tokens, [S, N / 2]; the first seed where the shape has no other."""
        point = self.tokens.index(tokens)
        seen = [seeds[min(seed, len(seeds) - 1)][point] for seeds in self.kl]
        return np.stack([blocks[: len(blocks) // 2] for blocks in seen])

    def seed_sd(self, tokens: int) -> float:
        """Relative standard deviation between seeds of one shape after so many tokens, what a seed does to all shapes taken out.

        Pooled over the shapes that have several; where too few have, what the committed curves of that teacher say.
        """
        point = self.tokens.index(tokens)
        several = [np.log([seed[point].mean() for seed in seeds]) for seeds in self.kl if len(seeds) > 1]
        if len(several) < 2:
            return seed_sd_of_curves(self.grid.teacher)
        variance = np.mean([np.var(logs, ddof=1) for logs in several])
        return float(np.sqrt(variance * len(several) / (len(several) - 1)))

    def final_error(self) -> NDArray[np.float64]:
        """[S] standard error of the final result of one run: over documents and seeds."""
        held_out = self.held_out()
        blocks = held_out.std(axis=1, ddof=1) / np.sqrt(held_out.shape[1])
        return np.hypot(blocks, self.seed_sd(self.tokens[-1]) * self.final)

    def difference_error(self) -> NDArray[np.float64]:
        """[S, S] standard error of the difference of two final results, on the same documents; seed noise included."""
        held_out = self.held_out()
        centred = held_out - held_out.mean(axis=1, keepdims=True)
        covariance = centred @ centred.T / (held_out.shape[1] - 1)
        variance = np.diag(covariance)
        documents = np.maximum(variance[:, None] + variance[None, :] - 2 * covariance, 0.0) / held_out.shape[1]
        seeds = (self.seed_sd(self.tokens[-1]) * self.final) ** 2 / np.array([len(each) for each in self.kl])
        return np.sqrt(documents + seeds[:, None] + seeds[None, :])

    def held_out(self) -> NDArray[np.float64]:
        """[S, N / 2] the final result block by block, the mean of the seeds."""
        finals = [np.mean([seed[-1] for seed in seeds], axis=0) for seeds in self.kl]
        return np.stack([blocks[len(blocks) // 2 :] for blocks in finals])


def seed_sd_of_curves(teacher: str) -> float:
    """Relative standard deviation between seeds in the committed curves, the median over methods, shapes and points (what all shapes share included)."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for curve in read_curves(DATA / "curves.jsonl"):
        if curve.run.teacher == teacher:
            for tokens, kl in zip(curve.tokens, curve.kl, strict=True):
                found.setdefault((curve.run.method, curve.run.shape, tokens), []).append(kl)
    spreads = [float(np.std(values, ddof=1) / np.mean(values)) for values in found.values() if len(values) > 1]
    if not spreads:
        raise LookupError(f"curves.jsonl: expected several seeds of some curve of {teacher}, got none")
    return median(spreads)


def read_truths() -> list[Truth]:
    """Every grid of the committed table with enough finished shapes."""
    rows = read_rows()
    blocks = read_blocks() if rows else {}
    found = [make_truth(grid, rows=rows, blocks=blocks) for grid in GRIDS]
    return [truth for truth in found if truth is not None and len(truth.shapes) >= LEAST_SHAPES]


def make_truth(grid: Grid, *, rows: Sequence[Row], blocks: Mapping[str, NDArray[np.float16]]) -> Truth | None:
    """The table of one grid at the most tokens that all but a few of its known shapes have; None without a row.

    A shape that has not come as far is left out; so is a further seed.
    """
    rows = [row for row in rows if (row.cell.teacher, row.cell.max_fraction) == (grid.teacher, grid.max_fraction)]
    keys = {shape.key for shape in grid.shapes()}
    first = [row for row in rows if row.cell.seed == 0 and row.cell.shape in keys]
    if not first:
        return None
    final = _common_end(first)
    by_shape: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.cell.seed):
        if final in row.tokens:
            by_shape.setdefault(row.cell.shape, []).append(row)
    known = [(shape, found) for shape in grid.shapes() if (found := by_shape.get(shape.key)) and found[0].cell.seed == 0]
    tokens = tuple(number for number in first[0].tokens if number <= final and all(number in row.tokens for _, found in known for row in found))
    points = {row.cell.key: [row.tokens.index(number) for number in tokens] for _, found in known for row in found}
    return Truth(
        grid=grid,
        shapes=tuple(shape for shape, _ in known),
        parameters=np.array([found[0].parameters for _, found in known]),
        tokens=tokens,
        kl=_aligned([[blocks[row.cell.key][points[row.cell.key]].astype(np.float64) for row in found] for _, found in known]),
        zero_shot_loss=np.array([found[0].final_loss[0] for _, found in known]),
    )


def _common_end(rows: Sequence[Row]) -> int:
    """The most tokens that at least nine in ten rows have."""
    ends = sorted((row.tokens[-1] for row in rows), reverse=True)
    return ends[min(len(ends) - 1, int(0.9 * len(ends)))]


def _aligned(kl: Sequence[Sequence[NDArray[np.float64]]]) -> tuple[tuple[NDArray[np.float64], ...], ...]:
    """Further seeds scaled, point by point, so that over the shapes that have them their mean log KL is that of the first seed."""
    scales = []
    for seed in range(max(len(seeds) for seeds in kl)):
        ratios = [np.log(seeds[seed].mean(axis=1) / seeds[0].mean(axis=1)) for seeds in kl if len(seeds) > seed]
        scales.append(np.exp(-np.mean(ratios, axis=0))[:, None])
    return tuple(tuple(blocks * scales[seed] for seed, blocks in enumerate(seeds)) for seeds in kl)
