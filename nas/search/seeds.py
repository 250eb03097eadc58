"""The spread between training seeds: how much a shape's result changes when it is trained again in another data order. Pure.

A search that trains every shape once cannot see this spread, and the errors over documents do not contain it: the spec brings it
(`rungs.seed_spread`), measured on the ground truth. Where a shape is repeated (`controls.num_repeats`) the spec's number is the prior, and what the repeats
show is pooled with it. What one data order does to all shapes of a search alike cancels out of their differences, and does not cancel between
repeats of one shape: what they show is too much rather than too little (on the ground truth 1.2 to 2.8 times, LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median, variance

import numpy as np

from nas.search.results import Metric

MAX_POINTS = 200
"""Trials among which slopes are taken, evenly over the KL: the pairs grow with the square."""

MIN_RESULTS = 4
"""Trials below which no slope of the score over the KL is estimated."""

PRIOR_DEGREES_OF_FREEDOM = 2
"""Repeats that the prior is worth: about as surely as the spread after some tokens tells that after others (a factor of two to three, LOG.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedSpread:
    """The spread between seeds at one rung, and where the number comes from."""

    value: float
    """Standard deviation of KL between seeds over KL, beyond what the blocks show, as every tie test takes it: the prior and what was measured, pooled."""
    prior: float
    measured: float | None
    """Standard deviation of log KL between the runs, what their blocks show among it; None where no shape was repeated."""
    of_blocks: float | None
    """The part of `measured` that the blocks explain."""
    num_runs: int
    """Trainings of one shape that it was measured on; 0: the prior alone."""


def pooled_spread(prior: float, *, runs: Sequence[Metric]) -> SeedSpread:
    """The prior and repeats of one shape, pooled by their degrees of freedom.

    The variance between seeds has a scaled inverse chi-square prior of PRIOR_DEGREES_OF_FREEDOM and scale prior ** 2; the sample variance of log KL between the
    runs, of which the blocks explain a known part, has its chi-square likelihood. The value is the root of 1 / E[1 / variance], worked out on a grid. Without
    the blocks' part that is in closed form (d0 prior ** 2 + d s ** 2) / (d0 + d), the moderated variance of Smyth, "Linear models and empirical Bayes methods",
    Stat. Appl. Genet. Mol. Biol. 3(1), 2004, 3; with blocks that hide the spread, repeats leave the prior as it is.

    Args:
        prior: relative standard deviation; 0: no spread, whatever the runs show.
        runs: held-out KL > 0 of every training of the shape, on the same blocks; fewer than two tell nothing.
    """
    if len(runs) < 2 or any(run.value <= 0 for run in runs):
        return SeedSpread(value=prior, prior=prior, measured=None, of_blocks=None, num_runs=0)
    between = variance([math.log(run.value) for run in runs])
    blocks = fmean(_of_blocks(one, other) for one, other in combinations(runs, 2))
    value = math.sqrt(_posterior_variance(prior**2, between=between, degrees_of_freedom=len(runs) - 1, blocks=blocks)) if prior else 0.0
    return SeedSpread(value=value, prior=prior, measured=math.sqrt(between), of_blocks=math.sqrt(blocks), num_runs=len(runs))


def _of_blocks(one: Metric, other: Metric) -> float:
    """Variance that the blocks alone give to either log KL of a pair, paired over them."""
    difference = tuple(ours / one.value - theirs / other.value for ours, theirs in zip(one.documents, other.documents, strict=True))
    return Metric.from_documents(difference, higher_is_better=False).standard_error ** 2 / 2


def _posterior_variance(prior: float, *, between: float, degrees_of_freedom: int, blocks: float) -> float:
    reach = math.log(1e4)
    variance_G = np.exp(np.linspace(math.log(prior) - reach, math.log(prior + between) + reach, 2001))
    total_G = variance_G + blocks
    # Over the logarithm of the variance, which the grid is even in.
    log_G = -0.5 * (PRIOR_DEGREES_OF_FREEDOM * (np.log(variance_G) + prior / variance_G) + degrees_of_freedom * (np.log(total_G) + between / total_G))
    weight_G = np.exp(log_G - log_G.max())
    return float(weight_G.sum() / (weight_G / variance_G).sum())


def score_error(results: Sequence[tuple[float, float]], *, seed_spread: float) -> float:
    """Standard deviation of a score between seeds, by the delta method: |d score / d log KL| times the relative spread of KL.

    The slope is the median over pairs of trials (Theil and Sen), which a few odd trials do not move. Documents that a seed turns one by one are in the
    error over documents already; this adds what moves all of them together.

    Args:
        results: (KL > 0, score) of the trials at the last rung, in any order.
    Returns:
        In units of the score; 0 with fewer than MIN_RESULTS trials of different KL, which tell no slope.
    """
    points = sorted({(math.log(kl), score) for kl, score in results if kl > 0})
    if len(points) < MIN_RESULTS:
        return 0.0
    points = points[:: math.ceil(len(points) / MAX_POINTS)]
    slopes = [(second[1] - first[1]) / (second[0] - first[0]) for index, first in enumerate(points) for second in points[index + 1 :] if second[0] > first[0]]
    return abs(median(slopes)) * seed_spread if slopes else 0.0
