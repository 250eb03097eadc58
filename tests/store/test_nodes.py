from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from nas.store.records import NodeRecord, utc_now
from nas.store.store import Store

NODE = NodeRecord(
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


def test_a_node_is_one_row_as_it_was_written_last(store: Store) -> None:
    store.save_node(NODE)
    unfit = replace(NODE, state="unfit", problems=["torch: expected 2.13.0, got 2.12.0"], checked_at=utc_now())
    store.save_node(unfit)
    store.save_node(replace(NODE, id="b2", host="gpu-0"))

    assert [node.host for node in store.list_nodes()] == ["gpu-0", "gpu-1"]
    assert store.list_nodes()[1] == unfit


def test_a_node_that_nobody_watches_is_gone_and_forgotten_after_a_day(store: Store) -> None:
    store.save_node(replace(NODE, state="fit", seen_at=utc_now() - timedelta(minutes=3)))
    store.save_node(replace(NODE, id="old", seen_at=utc_now() - timedelta(days=2)))
    assert {node.id: node.state for node in store.list_nodes()}["a1"] == "gone"

    store.save_node(replace(NODE, id="b2"))

    assert {node.id: node.state for node in store.list_nodes()} == {"a1": "gone", "b2": "joining"}
