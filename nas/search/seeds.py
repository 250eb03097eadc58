"""The spread between training seeds: how much a shape's result changes when it is trained again in another data order. Pure.

A search trains every shape once, so it cannot see this spread, and the errors over documents do not contain it: the spec brings it
(`rungs.seed_spread`), measured on the ground truth. What one data order does to all shapes of a search alike cancels out of their differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

MAX_POINTS = 200
"""Trials among which slopes are taken, evenly over the KL: the pairs grow with the square."""

MIN_RESULTS = 4
"""Trials below which no slope of the score over the KL is estimated."""


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
