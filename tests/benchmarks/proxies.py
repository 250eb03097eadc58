"""What a cheap number says of the final result: rank correlation and regret of every proxy on the ground truth.

Kendall's tau-b and the regret of taking the proxy's best shape, with bootstrap intervals over shapes and blocks; then the tau of the last rung
over the pairs that the final result tells apart, and the tau between two seeds of the final result, which no proxy can beat. Of tasks (ground_truth_tasks.py)
the intervals are over shapes alone. A minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau

from tests.benchmarks.task_rows import NAMED, TASKS, read_task_rows, shares
from tests.benchmarks.truth import Truth, read_truths

NUM_RESAMPLES = 500
FORMS = ("accuracy", "margin", "logprob_per_byte", "bits_per_byte")
"""In which the tasks are shown."""
SEPARATED = 2.0
"""Standard errors of their difference between two final results that are told apart."""
GOAL = 0.8

console = Console(width=160)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Proxy:
    """One number of every shape, known before the final result."""

    name: str
    values: NDArray[np.float64]
    """[S], or [S, blocks] where it is a mean over blocks. NaN: not known of that shape."""
    lower_is_better: bool = True

    def means(self, blocks: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """[S], lower is better; over the given blocks."""
        values = self.values if self.values.ndim == 1 else (self.values if blocks is None else self.values[:, blocks]).mean(axis=1)
        return values if self.lower_is_better else -values


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate, and the 95 % interval of its bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bench() -> bool:
    truths = read_truths()
    if not truths:
        console.print("no ground truth yet")
    held = [_print(truth) for truth in truths]
    return all(held)


def proxies_of(truth: Truth, *, tasks: Path = TASKS) -> list[Proxy]:
    """Every proxy of a grid, the cheapest first."""
    found = [Proxy(name="parameters", values=truth.parameters.astype(np.float64), lower_is_better=False)]
    found.append(Proxy(name="loss without training", values=truth.zero_shot_loss))
    for tokens in truth.tokens[:-1]:
        found.append(Proxy(name=f"KL after {tokens:,} tokens" if tokens else "KL without training", values=truth.at(tokens)))
    return found + _task_proxies(truth, file=tasks)


def _task_proxies(truth: Truth, *, file: Path) -> list[Proxy]:
    """Of every form its mean share over the tasks that have it, at every point (the last: the final students themselves), and every task at the last rung."""
    found = _task_shares(truth, file=file)
    forms = sorted({(tokens, FORMS.index(form)) for tokens, _, form in found})
    proxies = []
    for tokens, index in forms:
        several = [values for (number, _, form), values in found.items() if (number, form) == (tokens, FORMS[index])]
        when = f"{tokens:,} tokens" if tokens < truth.tokens[-1] else "final students"
        proxies.append(Proxy(name=f"{len(several)} tasks, {FORMS[index]}, {when}", values=np.mean(several, axis=0), lower_is_better=False))
    last = max((tokens for tokens, _, _ in found if tokens <= truth.last_rung_tokens), default=None)
    single = [
        Proxy(name=f"{task}, {form}, {tokens:,} tokens", values=values, lower_is_better=False)
        for (tokens, task, form), values in sorted(found.items())
        if tokens == last
    ]
    return [proxy for proxy in [*proxies, *single] if np.isfinite(proxy.values).sum() >= 3]


def _task_shares(truth: Truth, *, file: Path) -> dict[tuple[int, str, str], NDArray[np.float64]]:
    """(tokens, task, form) -> shares [S] (`task_rows.shares`), NaN where a shape was not scored."""
    rows = [row for row in read_task_rows(file) if row.teacher == truth.grid.teacher]
    ends = {row.shape: row for row in rows if row.shape in NAMED}
    keys = {shape.key: index for index, shape in enumerate(truth.shapes)}
    found: dict[tuple[int, str, str], NDArray[np.float64]] = {}
    for row in rows:
        if (row.max_fraction, row.seed) == (truth.grid.max_fraction, 0) and row.shape in keys and row.tokens in truth.tokens:
            for task, forms in shares(row, teacher=ends["teacher"], random=ends["random"]).items():
                for form, share in forms.items():
                    found.setdefault((row.tokens, task, form), np.full(len(keys), np.nan))[keys[row.shape]] = share
    return found


def tau_b(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Kendall's tau-b over the shapes that both know; 0 where one of them is constant."""
    known = np.isfinite(first) & np.isfinite(second)
    tau = float(kendalltau(first[known], second[known]).statistic)
    return tau if np.isfinite(tau) else 0.0


def regret(proxy: NDArray[np.float64], final: NDArray[np.float64]) -> float:
    """Final KL of the shape that the proxy takes for the best, minus that of the best of those that it knows."""
    return float(final[np.nanargmin(proxy)] - final[np.isfinite(proxy)].min())


def tau_of_separated(proxy: NDArray[np.float64], final: NDArray[np.float64], *, error: NDArray[np.float64]) -> tuple[float, int]:
    """(tau, pairs) over the pairs that the proxy knows and whose final results lie SEPARATED standard errors apart. error: [S, S], of the difference."""
    known = np.isfinite(proxy)
    upper = np.triu(known[:, None] & known[None, :], k=1)
    difference = final[:, None] - final[None, :]
    pairs = upper & (np.abs(difference) > SEPARATED * error)
    signs = np.sign(difference[pairs]) * np.sign((proxy[:, None] - proxy[None, :])[pairs])
    return (float(signs.mean()) if len(signs) else 0.0), len(signs)


def seed_ceiling(truth: Truth) -> tuple[float, int] | None:
    """(mean tau-b between the final results of two seeds, shapes); None where fewer than three shapes have several."""
    several = [[seed[-1][len(seed[-1]) // 2 :].mean() for seed in seeds] for seeds in truth.kl if len(seeds) > 1]
    if len(several) < 3:
        return None
    finals = np.array([seeds[: min(map(len, several))] for seeds in several])
    return float(np.mean([tau_b(finals[:, one], finals[:, other]) for one, other in combinations(range(finals.shape[1]), 2)])), len(several)


def bootstrap(truth: Truth, proxy: Proxy, *, seed: int = 0) -> Mapping[str, Interval]:
    """tau and regret of a proxy with their intervals, shapes and blocks drawn again (blocks of proxy and final result apart)."""
    generator = np.random.default_rng(seed)
    held_out = truth.held_out()
    num_shapes, num_blocks = held_out.shape
    drawn = []
    for _ in range(NUM_RESAMPLES):
        shapes = generator.integers(num_shapes, size=num_shapes)
        values = proxy.means(generator.integers(num_blocks, size=num_blocks))[shapes]
        final = held_out[:, generator.integers(num_blocks, size=num_blocks)].mean(axis=1)[shapes]
        if np.isfinite(values).any():
            drawn.append((tau_b(values, final), regret(values, final)))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    values = {"tau": tau_b(proxy.means(), truth.final), "regret": regret(proxy.means(), truth.final)}
    return {name: Interval(value=value, low=float(low[index]), high=float(high[index])) for index, (name, value) in enumerate(values.items())}


def _print(truth: Truth) -> bool:
    final, error = truth.final, truth.difference_error()
    score_error = float(truth.final_error()[final.argmin()])
    console.print(
        f"{truth.name}: {len(truth.shapes)} of {len(truth.grid.shapes())} shapes, final result after {truth.tokens[-1]:,} tokens: "
        f"KL {final.min():.4f} (standard error {score_error:.4f}) to {final.max():.4f}"
    )
    table = Table("proxy", "tau-b with the final KL", "tau, separated pairs", "regret, KL", "in standard errors", box=None)
    for proxy in proxies_of(truth):
        found, (separated, _) = bootstrap(truth, proxy), tau_of_separated(proxy.means(), final, error=error)
        num_known = int(np.isfinite(proxy.means()).sum())
        name = proxy.name if num_known == len(final) else f"{proxy.name} ({num_known} shapes)"
        table.add_row(name, str(found["tau"]), f"{separated:.3f}", str(found["regret"]), f"{found['regret'].value / score_error:.1f}")
    console.print(table)
    return _print_last_rung(truth)


def _print_last_rung(truth: Truth) -> bool:
    if truth.last_rung_tokens not in truth.tokens:
        console.print(f"no point at {truth.last_rung_tokens:,} tokens yet")
        return True
    last = truth.at(truth.last_rung_tokens).mean(axis=1)
    tau, pairs = tau_of_separated(last, truth.final, error=truth.difference_error())
    total = len(truth.shapes) * (len(truth.shapes) - 1) // 2
    console.print(
        f"last rung ({truth.last_rung_tokens:,} tokens): tau {tau:.3f} over the {pairs} of {total} pairs that the final result separates (goal {GOAL})"
    )
    if (ceiling := seed_ceiling(truth)) is not None:
        several = np.array([len(seeds) > 1 for seeds in truth.kl])
        among = tau_b(last[several], truth.final[several])
        console.print(
            f"ceiling: tau {ceiling[0]:.3f} between two seeds of the final result over its best {ceiling[1]} shapes; the last rung's among them {among:.3f}"
        )
    return tau >= GOAL
