"""How many times more tokens training from scratch needs for the loss of a pruned and distilled student of the same shape, from the committed curves."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from tests.benchmarks.campaign import DATA, HEADLINE_SHAPE
from tests.benchmarks.learning import Curve, read_curves, tokens_to_reach
from tests.benchmarks.recipes import METHODS

console = Console(width=160)


def bench() -> bool:
    curves = read_curves(DATA / "headline.jsonl")
    for teacher in HEADLINE_SHAPE:
        scratch = [curve for curve in curves if curve.run.teacher == teacher and not METHODS[curve.run.method].distilled]
        students = [curve for curve in curves if curve.run.teacher == teacher and METHODS[curve.run.method].distilled]
        if scratch and students:
            _print(teacher, min(scratch, key=lambda curve: (-curve.tokens[-1], curve.loss[-1])), students=students)
        else:
            console.print(f"{teacher}: no curves yet")
    return True


def times_more(student_tokens: int, student_loss: float, *, scratch: Curve) -> tuple[float, str]:
    """(ratio, as text): tokens that scratch needs for that loss over the student's; where it never gets there, or is there from the start, a bound."""
    needed = tokens_to_reach(student_loss, tokens=scratch.tokens, values=scratch.loss)
    if math.isinf(needed):
        return math.inf, f"> {scratch.tokens[-1] / student_tokens:,.0f} x"
    if needed == 0:
        return 0.0, f"< {scratch.tokens[0] / student_tokens:,.1f} x"
    return needed / student_tokens, f"{needed / student_tokens:,.1f} x"


def _print(teacher: str, scratch: Curve, *, students: list[Curve]) -> None:
    run = scratch.run
    console.print(
        f"{teacher}, shape {run.shape}: from scratch on the same text in the same order (cross-entropy, rate {run.learning_rate:g}, batch {run.batch_size}, "
        f"{scratch.epoch_tokens:,} distinct tokens)"
    )
    table = Table("scratch, tokens", "epochs", "held-out loss", box=None)
    for tokens, loss, error in zip(scratch.tokens, scratch.loss, scratch.loss_se, strict=True):
        table.add_row(f"{tokens:,}", f"{tokens / scratch.epoch_tokens:.2f}", f"{loss:.3f} ± {error:.3f}")
    console.print(table)
    table = Table("pruned and distilled", "tokens", "epochs", "held-out loss", "scratch needs", box=None)
    for student in students:
        for tokens, loss, error in zip(student.tokens, student.loss, student.loss_se, strict=True):
            ratio = times_more(tokens, loss, scratch=scratch)[1]
            table.add_row(student.run.method, f"{tokens:,}", f"{tokens / student.epoch_tokens:.3f}", f"{loss:.3f} ± {error:.3f}", ratio)
    console.print(table)
