"""Nodes that differ from the controller's machine get no steps, and it is said why. Real nodes of a real cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.errors import InvalidSpec
from nas.settings import Settings
from nas.store.machines import NodeRecord
from tests.waiting import wait_until
from tests.workers.ray_cluster import NAP, add_node, ray_cluster
from workers import on_node
from workers.outcome import Outcome
from workers.step import Step

pytestmark = pytest.mark.ray

OTHER_TORCH = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda package: "9.9.9" if package == "torch" else version(package)
"""


@dataclasses.dataclass
class Deployment:
    executor: Any
    cluster: Any
    folder: Path
    told: dict[str, NodeRecord]
    """By node id, as it was told last."""

    def states(self) -> dict[str, NodeRecord]:
        self.executor._nodes.look()
        return self.told

    def run(self, *steps: Step) -> dict[str, Outcome]:
        outcomes: dict[str, Outcome] = {}
        for step in steps:
            self.executor.start(step)
        wait_until(lambda: outcomes.update(self.executor.wait(timeout_seconds=0.5)) or len(outcomes) == len(steps), what="outcomes")
        return outcomes


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, s3_server: str) -> Iterator[Deployment]:
    """One node that is fit, and two that are not; their files are on S3."""
    import s3fs

    from workers.ray_executor import RayExecutor

    folder = tmp_path_factory.mktemp("nodes")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(OTHER_TORCH)
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("nas-nodes")
    told: dict[str, NodeRecord] = {}
    settings = Settings.from_environment({"NAS_DATA": str(folder / "data"), "NAS_SHARED": "s3://nas-nodes/team", "NAS_RAY_INSECURE": "1"})
    with ray_cluster() as cluster:
        add_node(cluster, folder / "fit", num_cpus=2)
        add_node(cluster, folder / "version", PYTHONPATH=str(folder / "site"))
        add_node(cluster, folder / "unreachable", AWS_ENDPOINT_URL="http://127.0.0.1:9")
        executor = RayExecutor(dataclasses.replace(settings, ray_address=cluster.address), save_node=lambda node: told.update({node.id: node}), work=NAP)
        yield Deployment(executor=executor, cluster=cluster, folder=folder, told=told)
        executor.close()


def naps(count: int, *, folder: Path, seconds: float = 0.2) -> list[Step]:
    return [Step(key=f"nap_{index}", stage="rung", folder=str(folder), request={"seconds": seconds}, cpus=1.0, gpus=0.0) for index in range(count)]


def test_every_node_is_told_of_with_what_is_wrong_there(deployment: Deployment) -> None:
    wait_until(lambda: len(nodes := deployment.states()) == 3 and all(node.state != "joining" for node in nodes.values()), what="checks of three nodes")

    problems = sorted("; ".join(node.problems) for node in deployment.told.values())
    assert problems[0] == ""
    assert problems[1].startswith(
        "shared files and copies: FilesUnavailable: s3://nas-nodes/team/nodes/token.json: expected an answer, got EndpointConnectionError"
    )
    assert problems[2] == f"torch: expected {on_node.versions()['torch']} as on the controller's machine, got 9.9.9"
    (fit,) = (node for node in deployment.told.values() if node.state == "fit")
    assert fit.facts["cpus"] == 2.0
    assert fit.facts["versions"] == on_node.versions()
    assert fit.facts["cache"] == str(deployment.folder / "fit" / "cache")
    assert fit.facts["cache_free_bytes"] > 0
    assert abs(fit.facts["clock_offset_seconds"]) < 0.5, "one machine, one clock"


def test_steps_run_on_fit_nodes_alone(deployment: Deployment) -> None:
    wait_until(lambda: sum(node.state == "unfit" for node in deployment.states().values()) == 2, what="checks")

    outcomes = deployment.run(*naps(6, folder=deployment.folder))

    assert {deployment.told[(outcome.result or {})["node"]].state for outcome in outcomes.values()} == {"fit"}


def test_a_step_on_a_node_that_was_not_checked_yet_checks_it_and_is_not_counted(deployment: Deployment) -> None:
    wait_until(lambda: sum(node.state == "unfit" for node in deployment.states().values()) == 2, what="checks")
    nodes = deployment.executor._nodes
    known, nodes.nodes, nodes._looked = nodes.nodes, {}, float("inf")  # as if all of them had just joined
    try:
        outcomes = deployment.run(*naps(5, folder=deployment.folder, seconds=1.0))
        found_unfit = {node_id for node_id, node in nodes.nodes.items() if node.record.state == "unfit"}
        again = deployment.run(*naps(4, folder=deployment.folder)) if len(found_unfit) == 2 else {}
    finally:
        nodes.nodes, nodes._looked = known, None

    refused = [outcome for outcome in outcomes.values() if not outcome.succeeded]
    assert {outcome.reason for outcome in refused} == {"node_unfit"}
    assert all(outcome.message.startswith("node ") and "expected" in outcome.message for outcome in refused)
    assert found_unfit <= {node_id for node_id, node in deployment.told.items() if node.state == "unfit"}
    assert all(outcome.succeeded for outcome in again.values())


def _places(folder: Path) -> set[str]:
    """Nodes on which naps have begun."""
    return {path.read_text() for path in folder.glob("nap_*")}


def test_a_node_that_leaves_takes_its_step_with_it_uncounted_and_one_that_joins_gets_work(deployment: Deployment) -> None:
    wait_until(lambda: sum(node.state == "unfit" for node in deployment.states().values()) == 2, what="checks")
    added = add_node(deployment.cluster, deployment.folder / "added", num_cpus=1)
    long = naps(3, folder=deployment.folder / "long", seconds=60.0)
    for step in long:
        deployment.executor.start(step)
    wait_until(lambda: added.node_id in _places(deployment.folder / "long"), what="work on the node that joined")

    deployment.cluster.remove_node(added, allow_graceful=False)
    ended: dict[str, Outcome] = {}
    wait_until(lambda: ended.update(deployment.executor.wait(timeout_seconds=0.5)) or ended, what="the end of a step")
    for step in long:
        deployment.executor.kill(step.key)
    wait_until(lambda: deployment.states()[added.node_id].state == "gone", what="the node is gone")

    (lost,) = ended.values()
    assert (lost.succeeded, lost.reason, lost.retryable) == (False, "preempted", True)


def test_a_cluster_that_asks_nobody_for_a_token_is_refused(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers import ray_executor

    with pytest.raises(InvalidSpec, match=r"RAY_AUTH_MODE: expected token \(or NAS_RAY_INSECURE=1\), got 'disabled'"):
        ray_executor._connect(deployment.cluster.address, insecure=False, environment={})
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # too late for this process's Ray, which is the point: the head is asked by another one
    monkeypatch.setattr(ray_executor.ray, "init", lambda **_: None)
    monkeypatch.setattr(ray_executor.ray, "shutdown", lambda: None)
    with pytest.raises(InvalidSpec, match=r"NAS_RAY_ADDRESS: expected a cluster that asks for a token .*, got one that answers without"):
        ray_executor._connect(deployment.cluster.address, insecure=False, environment={})
