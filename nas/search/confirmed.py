"""Who is confirmed, and who wins: the finalists on documents that the search never saw, and how probable it is that each is the best. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.search.results import Metric, RungResult

NUM_DRAWS = 100_000
"""Draws behind a probability: their own error is at most 0.16 percentage points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """What the confirm step found of one trial."""

    verified: bool
    """The file is the model that was measured: parameters counted, and the logits equal in a fresh process where it was reloaded."""
    reloaded: bool
    """False for a control, which never wins: its file is counted, but not loaded in a fresh process."""
    held_out: RungResult | None
    """Measured by lm-eval itself on documents that no rung saw; None where it could not be measured, or was stored without its documents."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Confirmation:
        """The stored form: `confirm`'s answer, or `verified` and `reason` alone of a finalist that could not be confirmed."""
        held_out = values.get("held_out") or {}
        has_documents = bool(held_out) and all("documents" in metric for metric in (held_out["kl"], held_out["loss"], *held_out["tasks"].values()))
        return cls(
            verified=values["verified"],
            reloaded=values.get("reloaded", "held_out" in values),
            held_out=RungResult.from_dict({"seconds": {}, "details": {}, **held_out}) if has_documents else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finals:
    """Where the confirm step stands."""

    finalists: tuple[int, ...]
    probabilities: Mapping[int, float]
    """Of each finalist to be the best; empty until all are confirmed."""
    winner: int | None
    """The finalist with the best score; None until all are confirmed."""


def decide_finals(
    groups: Sequence[Sequence[int]],
    *,
    num_finalists: int,
    confirmations: Mapping[int, Confirmation],
    slopes: Mapping[str, float],
    seed_error: float = 0.0,
) -> Finals:
    """The finalists are the first of the first tie group, the next ones in the place of those that prove not to be what was scored.

    The search cannot tell the finalists apart, so the documents that it never saw decide: the best score on them wins, of equal ones the first on the board.

    Args:
        groups: trials that may win, by tie group, in the board's order.
        num_finalists: most finalists.
        confirmations: by trial, what the confirm step has found so far.
        slopes, seed_error: see `probabilities_best`.
    """
    finalists: tuple[int, ...] = ()
    for members in groups:
        if finalists := tuple(number for number in members if number not in confirmations or confirmations[number].verified)[:num_finalists]:
            break
    if any(number not in confirmations for number in finalists):
        return Finals(finalists=finalists, probabilities={}, winner=None)
    measured = {number: held_out.tasks for number in finalists if (held_out := confirmations[number].held_out) is not None}
    scores = {number: sum(slope * metrics[task].value for task, slope in slopes.items()) for number, metrics in measured.items()}
    return Finals(
        finalists=finalists,
        probabilities=probabilities_best(measured, slopes=slopes, seed_error=seed_error),
        winner=max(scores, key=lambda number: scores[number], default=next(iter(finalists), None)),
    )


def probabilities_best(finalists: Mapping[int, Mapping[str, Metric]], *, slopes: Mapping[str, float], seed_error: float = 0.0) -> dict[int, float]:
    """The probability of each finalist that its score is the highest of all, given what was measured of them.

    Normal approximation with a flat prior: the scores are jointly normal around the measured ones, with the covariance of the means over the same
    documents (what a bootstrap over documents, the same ones for all finalists, estimates), and the spread between seeds added to each.
    Equal models share their place.

    Args:
        finalists: by trial, each task's metric; all of a task on the same documents.
        slopes: change of the score per unit of each task's metric (`TaskScale.slope`).
        seed_error: standard deviation of the score between training seeds, 0 where it is not known.
    Returns:
        by trial; they sum to 1.
    Raises:
        ValueError: two finalists have another number of documents of the same task.
    """
    if not finalists:
        return {}
    means = np.array([sum(slope * metrics[task].value for task, slope in slopes.items()) for metrics in finalists.values()])
    covariance = seed_error**2 * np.eye(len(means))
    for task, slope in slopes.items():
        columns = [metrics[task].documents for metrics in finalists.values()]
        if len({len(column) for column in columns}) > 1:
            raise ValueError(f"documents of {task}: expected the same ones for every finalist, got {sorted({len(column) for column in columns})} of them")
        documents_FN = slope * np.array(columns)
        centred_FN = documents_FN - documents_FN.mean(axis=1, keepdims=True)
        count = documents_FN.shape[1]
        covariance += centred_FN @ centred_FN.T / (max(count - 1, 1) * count)
    # An eigenvalue below the rounding of the sums is a zero: equal finalists must stay equal in every draw.
    values_F, vectors_FF = np.linalg.eigh(covariance)
    spread_F = np.sqrt(np.where(values_F > 1e-12 * max(values_F.max(), 0.0), values_F, 0.0))
    draws_SF = means + (np.random.default_rng(0).standard_normal((NUM_DRAWS, len(means))) * spread_F) @ vectors_FF.T
    is_best_SF = draws_SF >= draws_SF.max(axis=1, keepdims=True) - 1e-9 * max(1.0, float(np.abs(means).max()))
    shares_F = (is_best_SF / is_best_SF.sum(axis=1, keepdims=True)).mean(axis=0)
    return {number: float(share) for number, share in zip(finalists, shares_F, strict=True)}
