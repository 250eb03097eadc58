from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.search.pareto import best_first, crowding, fronts

# Few distinct values, so that equal points and equal coordinates are common; infinity stands for an unknown cost.
numbers = st.sampled_from([0.0, 1.0, 2.0, 3.0, 5.0, math.inf])
populations = st.integers(1, 4).flatmap(lambda size: st.lists(st.tuples(*[numbers] * size), min_size=1, max_size=24))


def dominates(better, worse) -> bool:
    return better != worse and all(one <= other for one, other in zip(better, worse, strict=True))


def peel(points) -> list[int]:
    """The definition: take away whoever nobody left dominates, again and again."""
    front, left, number = [0] * len(points), set(range(len(points))), 0
    while left:
        first = {index for index in left if not any(dominates(points[other], points[index]) for other in left)}
        for index in first:
            front[index] = number
        left, number = left - first, number + 1
    return front


@given(populations)
def test_fronts_are_those_of_the_definition(points):
    assert fronts(points) == peel(points)


@given(populations, st.randoms(use_true_random=False))
def test_the_order_of_the_points_changes_neither_front_nor_crowding(points, random):
    order = list(range(len(points)))
    random.shuffle(order)
    front, shuffled = fronts(points), fronts([points[index] for index in order])

    assert shuffled == [front[index] for index in order]
    alone = crowding(points, front)
    assert crowding([points[index] for index in order], shuffled) == pytest.approx([alone[index] for index in order])


@given(populations)
def test_the_ends_of_a_front_are_the_loneliest(points):
    front = fronts(points)
    alone = crowding(points, front)

    for number in set(front):
        members = [index for index in range(len(points)) if front[index] == number]
        for axis in range(len(points[0])):
            low = min(points[index][axis] for index in members)
            if any(points[index][axis] != low for index in members):
                assert all(alone[index] == math.inf for index in members if points[index][axis] == low)
    assert all(distance >= 0 for distance in alone)


@given(st.lists(st.tuples(numbers), min_size=1, max_size=20))
def test_one_value_is_ordered_as_by_sorting(points):
    assert [points[index] for index in best_first(points)] == sorted(points)
    assert fronts(points) == [sorted(set(points)).index(point) for point in points]


@given(populations)
def test_nobody_comes_before_who_dominates_it(points):
    order = best_first(points)

    assert sorted(order) == list(range(len(points)))
    assert not any(dominates(points[later], points[earlier]) for place, earlier in enumerate(order) for later in order[place + 1 :])


def test_crowding_is_the_box_between_the_neighbours():
    points = [(0.0, 4.0), (1.0, 3.0), (3.0, 1.0), (4.0, 0.0)]

    assert crowding(points, fronts(points)) == [math.inf, 3 / 4 + 3 / 4, 3 / 4 + 3 / 4, math.inf]


@pytest.mark.parametrize("points", [[(1.0,), (1.0, 2.0)], [()], [(math.nan, 1.0)]])
def test_points_that_cannot_be_compared_are_refused(points):
    with pytest.raises(ValueError, match="values: expected"):
        fronts(points)


def test_no_points_have_no_fronts():
    assert fronts([]) == crowding([], []) == best_first([]) == []


def test_ten_thousand_points_are_sorted_quickly():
    generator = np.random.default_rng(0)
    points = [tuple(row) for row in generator.random((10_000, 3)).tolist()]
    start = time.process_time()

    best_first(points)

    assert time.process_time() - start < 5
