from __future__ import annotations

from dataclasses import replace

from api.auth import needed_scope
from nas.cli import cluster
from nas.store.machines import NodeRecord
from nas.store.records import utc_now
from tests.api.conftest import Service

NODE = NodeRecord(
    id="a1b2c3d4e5f6a7b8",
    host="gpu-1",
    address="10.0.0.1",
    state="unfit",
    problems=["torch: expected 2.13.0 as on the controller's machine, got 2.12.0"],
    warnings=[],
    facts={"cpus": 8.0, "gpus": 1.0, "devices": ["H100"]},
    checked_at=utc_now(),
    seen_at=utc_now(),
)


def test_nodes_are_listed_in_pages_with_what_is_wrong_there(service: Service) -> None:
    for index in range(3):
        service.store.save_node(replace(NODE, id=f"node{index}", host=f"gpu-{index // 2}", seen_at=utc_now()))

    first = service.client.get("/v1/nodes", params={"limit": 2}).json()
    second = service.client.get("/v1/nodes", params={"limit": 2, "after": first["next_cursor"]}).json()

    assert [node["id"] for node in [*first["data"], *second["data"]]] == ["node0", "node1", "node2"]
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert first["data"][0]["problems"] == NODE.problems
    assert first["data"][0]["state"] == "unfit"


def test_the_machines_are_the_operators_alone() -> None:
    assert needed_scope("GET", "/v1/nodes") == needed_scope("HEAD", "/v1/nodes") == "admin"


def test_the_command_shows_one_line_for_each() -> None:
    row = cluster._row({"host": NODE.host, "id": NODE.id, "state": NODE.state, "problems": NODE.problems, "warnings": ["clock: late"], "facts": NODE.facts})

    assert row["node"] == "a1b2c3d4e5f6"
    assert row["problems and warnings"] == f"{NODE.problems[0]}; clock: late"
