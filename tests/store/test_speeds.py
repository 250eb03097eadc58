from __future__ import annotations

import pytest

from nas.errors import Fenced
from nas.store.store import Store

CPU = {"cpus": 1.0, "gpus": 0.0, "dtype": "float32"}
POINTS = [{"flops_per_token": 1000, "trained_per_second": 5.5, "scored_per_second": 16.0}]


def test_a_speed_is_wished_for_once_and_kept_once_it_is_measured(store: Store) -> None:
    first = store.wish_speed(**CPU)
    assert first.points is None
    assert store.wish_speed(**CPU) == first
    assert [record.key for record in store.wished_speeds()] == [first.key]

    store.save_speed(first.key, points=POINTS, host="here", error=None, fence=None)

    measured = store.wish_speed(**CPU)
    assert (measured.points, measured.host) == (POINTS, "here")
    assert measured.measured_at is not None
    assert store.wished_speeds() == []


def test_workers_with_other_resources_are_measured_apart(store: Store) -> None:
    keys = {store.wish_speed(**(CPU | change)).key for change in ({}, {"cpus": 2.0}, {"gpus": 0.5}, {"dtype": "bfloat16"})}
    assert len(keys) == 4
    assert {record.key for record in store.wished_speeds()} == keys


def test_what_could_not_be_measured_says_why_and_is_tried_again_when_it_is_asked_for_again(store: Store) -> None:
    key = store.wish_speed(**CPU).key
    store.save_speed(key, points=None, host=None, error="no CUDA device", fence=None)
    assert store.wished_speeds() == []

    assert store.wish_speed(**CPU).error == "no CUDA device"
    assert [record.key for record in store.wished_speeds()] == [key]


def test_only_who_holds_the_lease_of_the_probes_answers(store: Store) -> None:
    key = store.wish_speed(**CPU).key
    token = store.claim("probes", owner="one", seconds=60)
    assert token is not None
    store.release(token)
    with pytest.raises(Fenced):
        store.save_speed(key, points=POINTS, host="here", error=None, fence=token)
