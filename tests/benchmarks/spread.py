"""The spread between training seeds on the ground truth, and what repeats of one shape tell of it (`controls.num_repeats`).

`python -m tests.benchmarks.spread --seeds 3 4 5` trains the best shapes of the first grid with further seeds, up to the tokens of a search's last rung,
one process on one thread; what is there is not trained again. Seeds 0 to 2 are the ground truth's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from statistics import fmean, variance

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from nas.search.results import Metric
from nas.search.seeds import SeedSpread, pooled_spread
from nas.spec import RungSpec
from tests.benchmarks.campaign import DATA, WORK
from tests.benchmarks.ground_truth import Cell, compute, read_blocks, read_rows

MORE = DATA / "seeds.npz"
"""Shape.key/seed -> KL [points, blocks] on the blocks that rungs see."""
TEACHER, MAX_FRACTION = "stories260K", 0.6
POINTS = (6_250, 12_500, 25_000, 50_000, 100_000, 200_000)
NUM_REPEATS = (1, 2, 3)

Runs = Mapping[str, Mapping[int, NDArray[np.float64]]]
"""Shape -> seed -> KL [points, blocks]"""
console = Console(width=160)


def read_runs() -> Runs:
    """Every shape of the grid that was trained with several seeds."""
    cells = [row for row in read_rows() if (row.cell.teacher, row.cell.max_fraction) == (TEACHER, MAX_FRACTION)]
    several = {row.cell.shape for row in cells if row.cell.seed}
    blocks, found = read_blocks(), {shape: dict[int, NDArray[np.float64]]() for shape in sorted(several)}
    for row in cells:
        if row.cell.shape in several:
            half = blocks[row.cell.key][[row.tokens.index(tokens) for tokens in POINTS]]
            found[row.cell.shape][row.cell.seed] = half[:, : half.shape[1] // 2].astype(np.float64)
    for key, kl in np.load(MORE).items():
        shape, seed = key.split("/")
        found[shape][int(seed)] = kl.astype(np.float64)
    return found


def parts(runs: Runs, *, point: int) -> dict[str, float]:
    """Standard deviations of log KL after so many tokens: within a shape, and what it is made of.

    `own` is what is left of a least-squares fit of shapes and seeds; `common` the fit's seeds; `blocks` is in `within` and `own` both.
    """
    logs = [(shape, seed, math.log(kl[point].mean())) for shape, seeds in runs.items() for seed, kl in seeds.items()]
    shapes, seeds = sorted({shape for shape, _, _ in logs}), sorted({seed for _, seed, _ in logs})
    design = np.array([[*(shape == one for one in shapes), *(seed == one for one in seeds[1:])] for shape, seed, _ in logs], dtype=np.float64)
    values = np.array([log for _, _, log in logs])
    fit = np.linalg.lstsq(design, values, rcond=None)[0]
    left = values - design @ fit
    pairs = [pair for found in runs.values() for pair in combinations(found.values(), 2)]
    blocks = [pooled_spread(1.0, runs=[_metric(one[point]), _metric(other[point])]).of_blocks or 0.0 for one, other in pairs]
    return {
        "within": math.sqrt(fmean(variance([math.log(kl[point].mean()) for kl in found.values()]) for found in runs.values())),
        "own": math.sqrt(float(left @ left) / (len(values) - design.shape[1])),
        "common": float(np.std([0.0, *fit[len(shapes) :]], ddof=1)),
        "blocks": math.sqrt(fmean(number**2 for number in blocks)),
    }


def estimates(runs: Runs, *, point: int, num_repeats: int, prior: float) -> list[SeedSpread]:
    """What each choice of so many repeats, of each shape, comes to."""
    return [
        pooled_spread(prior, runs=[_metric(kl[point]) for kl in chosen])
        for found in runs.values()
        for chosen in combinations([found[seed] for seed in sorted(found)], num_repeats + 1)
    ]


def bench() -> bool:
    runs, prior = read_runs(), RungSpec().seed_spread
    console.print(
        f"{TEACHER} at {MAX_FRACTION:.0%}: {len(runs)} shapes, {sum(map(len, runs.values()))} runs; standard deviations of log KL, in thousandths. "
        "Beyond the blocks: the tie test needs the own part, repeats of one shape show own and common."
    )
    pooled = (f"{number} repeats" for number in NUM_REPEATS)
    table = Table("tokens", "within a shape", "own", "common", "blocks", "own beyond blocks", "within beyond blocks", "prior", *pooled, box=None)
    for point, tokens in enumerate(POINTS):
        found = parts(runs, point=point)
        beyond = [math.sqrt(max(0.0, found[name] ** 2 - found["blocks"] ** 2)) for name in ("own", "within")]
        values = [[one.value for one in estimates(runs, point=point, num_repeats=number, prior=prior)] for number in NUM_REPEATS]
        numbers = [found["within"], found["own"], found["common"], found["blocks"], *beyond, prior]
        shown = (f"{1000 * fmean(each):.1f} ± {1000 * np.std(each):.1f}" for each in values)
        table.add_row(f"{tokens:,}", *(f"{1000 * number:.1f}" for number in numbers), *shown)
    console.print(table)
    return True


def _metric(blocks_N: NDArray[np.float64]) -> Metric:
    return Metric.from_documents(tuple(blocks_N.tolist()), higher_is_better=False)


def _add(shape: str, *, seed: int, folder: Path) -> None:
    cell = Cell(teacher=TEACHER, max_fraction=MAX_FRACTION, shape=shape, seed=seed)
    compute(cell, points=(0, *POINTS), folder=folder, work=folder)
    found = [np.load(folder / "ground_truth" / cell.key / f"{tokens}.npz")["kl_N"] for tokens in POINTS]
    kept = dict(np.load(MORE)) if MORE.exists() else {}
    kept[f"{shape}/{seed}"] = np.stack([kl_N[: len(kl_N) // 2] for kl_N in found]).astype(np.float16)
    np.savez_compressed(MORE, **{key: kept[key] for key in sorted(kept)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--folder", type=Path, default=WORK)
    arguments = parser.parse_args()
    known = dict(np.load(MORE)) if MORE.exists() else {}
    shapes = sorted({row.cell.shape for row in read_rows() if (row.cell.teacher, row.cell.max_fraction) == (TEACHER, MAX_FRACTION) and row.cell.seed})
    for seed in arguments.seeds:
        for shape in shapes:
            if f"{shape}/{seed}" not in known:
                _add(shape, seed=seed, folder=arguments.folder)


if __name__ == "__main__":
    main()
