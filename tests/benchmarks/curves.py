"""How many tokens our students need for the loss of plain slicing, from the committed curves (campaign.py computes them)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from statistics import mean, median

from rich.console import Console
from rich.table import Table

from tests.benchmarks.campaign import CURVE_SHAPES, CURVE_TOKENS, DATA
from tests.benchmarks.learning import Curve, Run, read_curves, tokens_to_reach

OURS = ("ours-gains", "ours-all", "ours")
"""With everything that makes a token teach more, at the search's own rate and at the grid's, and the defaults, which need no teacher beside the student
(recipes.py)."""
BASELINES = {
    "plain": ("plain", "plain-slow", "plain-bridged"),
    "minitron": ("minitron",),
}
"""What ours is compared with: for each shape the method that ends lowest, since which layers suit a plain slice depends on how much else is cut."""
WORDS = {
    "plain": "plain slicing with our importance, and for each shape the best of two depth rules and two rates",
    "minitron": "the published recipe: plain slicing, (L2, mean) and block influence",
}
GOAL = 0.5
AT_TOKENS = {"stories260K": (50_000, 100_000, 200_000, 400_000), "tales4M": (50_000, 100_000, 200_000)}
"""Of the baseline: the loss that it has then is what ours has to reach."""

console = Console(width=160)


def bench() -> bool:
    curves = read_curves(DATA / "curves.jsonl")
    for teacher, ours, baseline in product(CURVE_SHAPES, OURS, BASELINES):
        if pairs := paired(curves, teacher=teacher, ours=ours, baseline=baseline):
            _print(teacher, pairs, ours=ours, baseline=baseline)
        else:
            console.print(f"{teacher}: no curves of {ours} and {baseline} with the same shape and seed")
    return True


def paired(curves: Sequence[Curve], *, teacher: str, ours: str, baseline: str) -> dict[str, list[tuple[Curve, Curve]]]:
    """Shape -> (ours, baseline) of every seed that both have; the baseline's method is the one of BASELINES that ends lowest for the shape."""
    candidates = [_pairs(curves, teacher=teacher, ours=ours, baseline=method) for method in BASELINES[baseline]]
    best = {}
    for shape in CURVE_SHAPES[teacher]:
        if there := [found[shape] for found in candidates if shape in found]:
            end = min(other.tokens[-1] for pairs in there for _, other in pairs)
            best[shape] = min(there, key=lambda pairs: mean(other.at(end, quantity="loss") for _, other in pairs))
    return best


def _pairs(curves: Sequence[Curve], *, teacher: str, ours: str, baseline: str) -> dict[str, list[tuple[Curve, Curve]]]:
    by_run = {(curve.run.method, curve.run.shape, curve.run.seed): curve for curve in curves if curve.run.teacher == teacher}
    found: dict[str, list[tuple[Curve, Curve]]] = {}
    for (method, shape, seed), curve in sorted(by_run.items(), key=lambda item: item[0]):
        if method == ours and (other := by_run.get((baseline, shape, seed))) is not None:
            found.setdefault(shape, []).append((curve, other))
    return found


def share_of_tokens(ours: Curve, baseline: Curve, *, tokens: int, quantity: str) -> float:
    """Tokens that ours needs for what the baseline has after `tokens`, over `tokens`; infinity: more than its last point.

    Where its first point is there already the answer is that point's share: at most so much.
    """
    needed = tokens_to_reach(baseline.at(tokens, quantity=quantity), tokens=ours.tokens, values=getattr(ours, quantity))
    return max(needed, ours.tokens[0]) / tokens


def _print(teacher: str, pairs: dict[str, list[tuple[Curve, Curve]]], *, ours: str, baseline: str) -> None:
    first, at = CURVE_TOKENS[teacher][0], AT_TOKENS[teacher]
    shown = at[0]
    table = Table("shape", "seeds", f"loss {baseline}, {shown:,}", f"loss {ours}, {shown:,}", *(f"share of {tokens:,}" for tokens in at), box=None)
    shares: dict[tuple[int, str], list[float]] = {}
    for shape, seeds in pairs.items():
        cells = []
        for tokens in at:
            known = [(mine, other) for mine, other in seeds if tokens in other.tokens]
            for quantity in ("loss", "kl"):
                if known:
                    share = median(share_of_tokens(mine, other, tokens=tokens, quantity=quantity) for mine, other in known)
                    shares.setdefault((tokens, quantity), []).append(share)
            cells.append(_share_text(shares[tokens, "loss"][-1], least=first / tokens) if known else "")
        table.add_row(shape, str(len(seeds)), *(_loss_text([pair[side] for pair in seeds], tokens=shown) for side in (1, 0)), *cells)
    for quantity in ("loss", "kl"):
        middle = (_share_text(median(found), least=first / tokens) if (found := shares.get((tokens, quantity))) else "" for tokens in at)
        table.add_row(f"median shape, by {quantity}", "", "", "", *middle, style="bold")
    recipes = "; ".join(f"{name}: rate {run.learning_rate:g}, batch {run.batch_size}" for name, run in zip((ours, baseline), _recipes(pairs), strict=True))
    goal = f"goal: the median shape at most {GOAL:.2f}"
    console.print(f"{teacher}: tokens that {ours} needs for the loss of {WORDS[baseline]}, as a share ({goal}); {recipes}")
    console.print(table)


def _recipes(pairs: dict[str, list[tuple[Curve, Curve]]]) -> tuple[Run, Run]:
    ours, other = next(iter(pairs.values()))[0]
    return ours.run, other.run


def _loss_text(curves: list[Curve], *, tokens: int) -> str:
    """Mean over the seeds; the standard error is that over the held-out blocks, which all runs share."""
    return f"{mean(curve.at(tokens, quantity='loss') for curve in curves):.3f} ± {curves[0].at(tokens, quantity='loss_se'):.3f}"


def _share_text(share: float, *, least: float) -> str:
    return "> all" if math.isinf(share) else f"{'at most ' if share <= least else ''}{share:.2f}"
