"""Which sampler finds the best shape of a large space? Whole searches replayed on the surrogate of the ground truth (surrogate.py).

The tables enumerate 49 shapes, which no sampler is needed for; the fine space of the same teacher and budget has 6,016. Study, rungs and decisions are
the product's own (replay.py). Regret is that of the shape with which a search ends to the best legal one of the landscape, in standard errors of its score.

    NAS_REFERENCE=... python -m tests.benchmarks.samplers [--replays 100] [--fraction 0.6] [--trials 16 24 48 96] [--sampler gp ...] [--change JSON]

`bench` is the same with few replays, minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.benchmarks.replay import Replay
from tests.benchmarks.surrogate import TOKENS, Check, Field, Measured, fine_space, fit, judge, leave_one_out, make_field, read_measured

SAMPLERS = ("gp", "tpe", "nsga2", "random")
NUM_TRIALS = (16, 24, 48, 96)
BENCH_TRIALS, NUM_REPLAYS = (16, 24, 48), 8
"""Of `bench`: a GP that is asked 85 times takes a minute a search. An interval over landscapes stands beside every mean."""
MAX_FRACTION = 0.6
LEAST_DRAWN = 3
"""Shapes beside the grids without which nothing is said of them."""

console = Console(width=160)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Of many replays of one setting."""

    regrets: tuple[float, ...]
    """Of the shape that each search ended with."""
    proposed: tuple[float, ...]
    """Of the best shape that each search proposed, whatever became of it."""
    tokens: float
    """Of one search, the median."""
    seconds: float
    """Processor time of one search."""

    def row(self) -> tuple[str, ...]:
        """For a table."""
        regrets = np.array(self.regrets)
        return (
            f"{np.median(regrets):.1f}",
            f"{regrets.mean():.1f} +- {regrets.std(ddof=1) / np.sqrt(len(regrets)):.1f}",
            f"{np.quantile(regrets, 0.95):.1f}",
            f"{np.mean(regrets <= 1):.0%}",
            f"{np.mean(self.proposed):.1f}",
            f"{self.tokens / TOKENS[-2]:.1f}",
            f"{self.seconds:.1f}",
        )


def replay(field: Field, *, sampler: str, num_trials: int, num_replays: int, changes: Mapping[str, Any] | None = None) -> Found:
    """Searches on the landscapes in turn; the same landscapes and chance whatever the setting."""
    spec: dict[str, Any] = {
        "teacher": "t",
        "corpus": {"parts": [{"name": "c"}]},
        "tasks": [{"name": "q"}],
        "budget": {"max_fraction": 0.5},  # the space is the field's
        "sampler": {"name": sampler, "max_trials": num_trials},
        "rungs": {"first_tokens": TOKENS[1]},
    }
    for section, values in (changes or {}).items():
        spec[section] = {**spec.get(section, {}), **values}
    regrets, proposed, tokens, started = [], [], [], time.process_time()
    for seed in range(num_replays):
        number = seed % len(field.landscapes)
        landscape = field.landscapes[number]
        search = Replay(landscape, space=field.space, spec=spec, chance=field.chance(number, seed=seed))
        ending = search.to_end()
        regrets.append(landscape.regret(ending.shape))
        proposed.append(min(landscape.regret(search.index[search.run.shape_of(trial).key]) for trial in search.run.trials))
        tokens.append(ending.tokens)
    seconds = (time.process_time() - started) / num_replays
    return Found(regrets=tuple(regrets), proposed=tuple(proposed), tokens=float(np.median(tokens)), seconds=seconds)


def check(measured: Measured) -> list[tuple[str, Check]]:
    """The surrogate against shapes that it was not fitted to."""
    mean, spread = leave_one_out(measured, surrogate=fit(measured))
    on, off = measured.is_on_grid, ~measured.is_on_grid
    found = [("the grids' shapes, each left out", judge(mean[on], spread[on], log_kl=measured.log_kl[on]))]
    if off.sum() >= LEAST_DRAWN:
        found.append(("shapes drawn beside them, each left out", judge(mean[off], spread[off], log_kl=measured.log_kl[off])))
        mean, spread = fit(measured.only(on)).predict(measured.only(off).shapes)
        found.append(("the same, all of them left out", judge(mean, spread, log_kl=measured.log_kl[off])))
    return found


def bench() -> bool:
    if not os.environ.get("NAS_REFERENCE"):
        console.print("NAS_REFERENCE is not set: there is no teacher whose space could be searched")
        return True
    measured = read_measured()
    _print_checks(measured)
    field = make_field(fine_space(MAX_FRACTION), num_landscapes=NUM_REPLAYS, surrogate=fit(measured))
    found = _print_replays(field, samplers=SAMPLERS, sizes=BENCH_TRIALS, num_replays=NUM_REPLAYS, changes=None)
    held = all(np.mean(found["gp", size].regrets) < np.mean(found["random", size].regrets) for size in BENCH_TRIALS)
    console.print(f"claim: GP ends with less regret than random proposals at every size: {'holds' if held else 'DOES NOT HOLD'}")
    return held


def _print_checks(measured: Measured) -> None:
    table = Table(
        "surrogate against",
        "shapes",
        "RMSE of log KL, untrained",
        *(f"{tokens:,}" for tokens in TOKENS[1:]),
        "tau of the final KL",
        "error over claimed",
        box=None,
    )
    for name, found in check(measured):
        table.add_row(name, str(found.num_shapes), *(f"{error:.3f}" for error in found.rmse), f"{found.tau[-1]:.2f}", f"{found.calibration:.2f}")
    table.add_row("another seed of the same shape", "", *(f"{spread:.3f}" for spread in measured.seed_sd))
    console.print(table)


def _print_replays(
    field: Field, *, samplers: Sequence[str], sizes: Sequence[int], num_replays: int, changes: Mapping[str, Any] | None
) -> dict[tuple[str, int], Found]:
    console.print(
        f"{len(field.shapes):,} shapes, {num_replays} replays, regret in standard errors of the best score, tokens in those of a trial at the last rung"
    )
    table = Table("trials", "sampler", "regret, median", "mean", "95 % at most", "within one", "of the best proposed", "tokens", "seconds", box=None)
    found = {}
    for size in sizes:
        for sampler in samplers:
            found[sampler, size] = replay(field, sampler=sampler, num_trials=size, num_replays=num_replays, changes=changes)
            table.add_row(str(size), sampler, *found[sampler, size].row())
    console.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replays", type=int, default=100)
    parser.add_argument("--fraction", type=float, default=MAX_FRACTION)
    parser.add_argument("--trials", type=int, nargs="+", default=NUM_TRIALS)
    parser.add_argument("--sampler", nargs="+", default=SAMPLERS)
    parser.add_argument("--change", type=json.loads, help='sections of the spec, for instance \'{"sampler": {"num_startup_trials": 4}}\'')
    arguments = parser.parse_args()
    measured = read_measured()
    _print_checks(measured)
    field = make_field(fine_space(arguments.fraction), num_landscapes=arguments.replays, surrogate=fit(measured))
    _print_replays(field, samplers=arguments.sampler, sizes=arguments.trials, num_replays=arguments.replays, changes=arguments.change)


if __name__ == "__main__":
    main()
