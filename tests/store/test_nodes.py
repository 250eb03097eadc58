from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from nas.store.machines import NodeRecord
from nas.store.records import utc_now
from nas.store.store import Store


@pytest.fixture
def node() -> NodeRecord:
    """A node that was seen a moment ago."""
    return NodeRecord(
        id="a1",
        host="gpu-1",
        address="10.0.0.1",
        state="joining",
        problems=[],
        warnings=[],
        facts={"cpus": 8.0},
        checked_at=None,
        seen_at=utc_now(),
    )


def test_a_node_is_one_row_as_it_was_written_last(store: Store, node: NodeRecord) -> None:
    store.save_node(node)
    unfit = replace(node, state="unfit", problems=["torch: expected 2.13.0, got 2.12.0"], checked_at=utc_now())
    store.save_node(unfit)
    store.save_node(replace(node, id="b2", host="gpu-0"))

    assert [one.host for one in store.list_nodes()] == ["gpu-0", "gpu-1"]
    assert store.list_nodes()[1] == unfit


def test_a_node_that_nobody_watches_is_gone_and_forgotten_after_a_day(store: Store, node: NodeRecord) -> None:
    store.save_node(replace(node, state="fit", seen_at=utc_now() - timedelta(minutes=3)))
    store.save_node(replace(node, id="old", seen_at=utc_now() - timedelta(days=2)))
    assert {one.id: one.state for one in store.list_nodes()}["a1"] == "gone"

    store.save_node(replace(node, id="b2"))

    assert {one.id: one.state for one in store.list_nodes()} == {"a1": "gone", "b2": "joining"}
