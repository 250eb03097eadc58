"""Non-dominated fronts and crowding of points with several values, all minimised. Pure: what the values mean is the caller's.

A point dominates another when it is nowhere larger and somewhere smaller. Equal points never dominate each other: they
share their front and their crowding, so that nothing here depends on the order in which points came.

Source: Deb, Pratap, Agarwal and Meyarivan, "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE TEC 6(2),
2002, III.A and III.B; the sort is the efficient one of Zhang, Tian, Cheng and Jin, IEEE TEC 19(2), 2015 (ENS-BS).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, ...]
"""Values of one candidate, all minimised; infinite where one is unknown, never NaN."""


def fronts(values: Sequence[Point]) -> list[int]:
    """The front of each point: 0 is dominated by nobody, k + 1 by someone of front k and by no one of a later front.

    Raises:
        ValueError: points of different lengths, of no value, or with a NaN.
    """
    if not values:
        return []
    # Unique rows come in lexicographic order, so a point is dominated only by earlier ones, and by each that is nowhere larger.
    points_NM, inverse_N = np.unique(_array(values), axis=0, return_inverse=True)
    members: list[list[int]] = []
    front_N = np.empty(len(points_NM), dtype=np.int64)
    for index, point_M in enumerate(points_NM):
        low, high = 0, len(members)
        while low < high:  # who is dominated in a front is dominated in every front before it
            middle = (low + high) // 2
            if (points_NM[members[middle]] <= point_M).all(axis=1).any():
                low = middle + 1
            else:
                high = middle
        if low == len(members):
            members.append([])
        members[low].append(index)
        front_N[index] = low
    return [int(front) for front in front_N[inverse_N.ravel()]]


def crowding(values: Sequence[Point], front: Sequence[int]) -> list[float]:
    """How alone each point stands among those of its front: the sides of the box between its neighbours, each over the front's span.

    Args:
        front: of each point, as `fronts` gives it.
    Returns:
        >= 0, larger is lonelier; infinite at an end of the front in any value, which should be kept first.
    """
    if not values:
        return []
    points_NM, front_N = _array(values), np.asarray(front)
    if len(front_N) != len(points_NM):
        raise ValueError(f"front: expected one number for each of {len(points_NM)} points, got {len(front_N)}")
    distance_N = np.zeros(len(points_NM))
    for number in np.unique(front_N):
        chosen = np.flatnonzero(front_N == number)
        unique_UM, inverse_U = np.unique(points_NM[chosen], axis=0, return_inverse=True)
        distance_N[chosen] = _crowding_of_front(unique_UM)[inverse_U.ravel()]
    return [float(distance) for distance in distance_N]


def best_first(values: Sequence[Point]) -> list[int]:
    """Positions of the points by front, then loneliest first, then by value and position: who is taken first where places are few."""
    front = fronts(values)
    alone = crowding(values, front)
    return sorted(range(len(values)), key=lambda index: (front[index], -alone[index], tuple(values[index]), index))


def _crowding_of_front(points_UM: NDArray[np.float64]) -> NDArray[np.float64]:
    distance_U = np.zeros(len(points_UM))
    for value_U in points_UM.T:
        order_U = np.argsort(value_U, kind="stable")
        sorted_U = value_U[order_U]
        ends = (value_U == sorted_U[0]) | (value_U == sorted_U[-1])
        span = sorted_U[-1] - sorted_U[0] if sorted_U[-1] > sorted_U[0] else 0.0
        if len(points_UM) > 2 and span > 0 and math.isfinite(span):
            distance_U[order_U[1:-1]] += (sorted_U[2:] - sorted_U[:-2]) / span
        distance_U[ends & (span > 0)] = math.inf
    return distance_U if len(points_UM) > 1 else np.full(1, math.inf)


def _array(values: Sequence[Point]) -> NDArray[np.float64]:
    lengths = {len(point) for point in values}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"values: expected points of one length of at least 1, got lengths {sorted(lengths)}")
    array_NM = np.asarray(values, dtype=np.float64)
    if np.isnan(array_NM).any():
        raise ValueError("values: expected numbers, got NaN")
    return array_NM
