"""A whole search on a cluster whose nodes share nothing with the controller, nor with each other, but S3: real nodes, real steps."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from api.files import find_file
from nas.distillations import check_distillation, parse_distillation
from nas.settings import Settings
from nas.spec import dump_spec, parse_spec
from nas.store.records import AttemptRecord, AttemptState, SearchRecord, SearchState
from nas.store.store import Store
from nas.submission import check_submission
from tests.waiting import wait_until
from tests.workers.ray_cluster import add_node, ray_cluster
from workers.controller import Controller
from workers.folders import SearchFolder
from workers.step import PROGRESS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclasses.dataclass
class Deployment:
    settings: Settings
    store: Store
    cluster: Any
    controller: Controller
    folder: Path
    nodes: dict[str, Any]

    def submit(self, spec: dict[str, Any]) -> str:
        parsed = parse_spec(json.dumps(spec))
        submission = check_submission(parsed, store=self.store)
        return self.store.create_search(spec=dump_spec(parsed), inputs=submission.inputs, plan=submission.plan, label="").id

    def distil(self, search: SearchRecord) -> str:
        """A full distillation of the winner, queued."""
        body = {"search_id": search.id, "recipe": {"tokens": 4096, "validation_tokens": 256}}
        plan = check_distillation(parse_distillation(json.dumps(body)), store=self.store, settings=self.settings)
        queued = self.store.create_distillation(
            search_id=search.id, trial=plan.trial, spec=plan.spec, inputs=plan.inputs, tokens=plan.tokens, label="", project="default"
        )
        return queued.id

    def tick_until(self, condition: Callable[[], Any], *, what: str) -> Any:
        def tick() -> Any:
            self.controller.tick()
            return condition()

        return wait_until(tick, what=what, seconds=240)

    def attempts(self, search_id: str, state: AttemptState) -> list[AttemptRecord]:
        return [attempt for attempt in self.store.list_attempts(search_id) if attempt.state is state]

    def training(self, search_id: str) -> tuple[str, int] | None:
        """The attempt and the process of a rung that trains now, as the controller heard of it."""
        for attempt in self.attempts(search_id, AttemptState.RUNNING):
            lines = self.progress(attempt)
            if attempt.rung and len(lines) > 1:
                return attempt.id, int(lines[0]["pid"])
        return None

    def progress(self, attempt: AttemptRecord) -> list[dict[str, Any]]:
        """What a step has reported, as the controller heard of it."""
        path = SearchFolder.of(attempt.search_id, settings=self.settings).attempt(attempt.id) / PROGRESS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def deployment(tmp_path: Path, s3_url: str, register_tiny: Callable[..., None]) -> Iterator[Deployment]:
    from workers.ray_executor import RayExecutor

    environment = {"NAS_DATA": str(tmp_path / "data"), "NAS_SHARED": s3_url, "NAS_RAY_INSECURE": "1", "NAS_ATTEMPT_LEASE_SECONDS": "10"}
    with ray_cluster() as cluster:
        nodes = {name: add_node(cluster, tmp_path / name) for name in ("a", "b")}
        settings = dataclasses.replace(Settings.from_environment(environment), ray_address=cluster.address)
        settings.data_folder.mkdir()
        store = Store.open(settings.database_url, migrate=True)
        register_tiny(store=store, settings=settings)
        controller = Controller(store=store, executor=RayExecutor(settings, save_node=store.save_node), settings=settings)
        yield Deployment(settings=settings, store=store, cluster=cluster, controller=controller, folder=tmp_path, nodes=nodes)
        controller.stop()
        controller.run()
        store.close()


def test_a_search_ends_with_its_bundle_on_s3_and_no_node_needs_another(deployment: Deployment, tiny_spec: Callable[..., dict[str, Any]], s3_url: str) -> None:
    search_id = deployment.submit(tiny_spec(resources={"max_parallel_trials": 2}))

    deployment.tick_until(lambda: deployment.store.get_search(search_id).state.is_terminal, what="the end of the search")

    search = deployment.store.get_search(search_id)
    assert search.state is SearchState.SUCCEEDED, search.error
    assert all(attempt.state is AttemptState.SUCCEEDED for attempt in deployment.store.list_attempts(search_id))
    assert deployment.store.list_points(search_id, trial=(search.winner or {})["trial"]), "no learning curve: nothing was carried"
    assert {node.state for node in deployment.store.list_nodes()} == {"fit"}
    for name in ("a", "b"):
        assert list((deployment.folder / name / "cache").glob("*/sorted/*.safetensors")), "a node that fetched no prepared folder"
    assert list(deployment.settings.data_folder.rglob("*.safetensors")) == []
    distillation_id = deployment.distil(search)

    deployment.tick_until(lambda: deployment.store.get_search(distillation_id).state.is_terminal, what="the end of the distillation")

    done = deployment.store.get_search(distillation_id)
    assert done.state is SearchState.SUCCEEDED, done.error
    assert done.winner is not None
    file = find_file(done.winner["file"], sha256=done.winner["sha256"], settings=deployment.settings)
    with tarfile.open(file) as archive:
        assert "model/model.safetensors" in archive.getnames()


def test_what_was_trained_on_a_node_that_is_gone_is_gone_on_with_on_another(deployment: Deployment, tiny_spec: Callable[..., dict[str, Any]]) -> None:
    search_id = deployment.submit(tiny_spec(rungs={"first_tokens": 400_000, "factor": 2, "num_trained": 1, "keep": 0.5}))
    first, pid = deployment.tick_until(lambda: deployment.training(search_id), what="a rung that trains")
    attempt = next(one for one in deployment.store.list_attempts(search_id) if one.id == first)
    deployment.tick_until(lambda: len(deployment.progress(attempt)) > 4, what="some steps of it")
    node = next(name for name in deployment.nodes if psutil.Process(pid).environ()["NAS_CACHE"] == str(deployment.folder / name / "cache"))
    deployment.store.request_pause(search_id)
    deployment.tick_until(lambda: deployment.store.get_search(search_id).state is SearchState.PAUSED, what="the pause")
    trained = deployment.progress(attempt)
    deployment.cluster.remove_node(deployment.nodes[node], allow_graceful=False)

    deployment.store.request_resume(search_id)
    second, _ = deployment.tick_until(lambda: (found := deployment.training(search_id)) and found[0] != first and found, what="its next attempt")

    gone_on = deployment.progress(next(one for one in deployment.store.list_attempts(search_id) if one.id == second))
    assert trained[-1]["step"] < gone_on[1]["step"], "trained again"
    assert gone_on[1]["step"] - trained[-1]["step"] < trained[-1]["step"]
    deployment.store.request_cancel(search_id)
    deployment.tick_until(lambda: deployment.store.get_search(search_id).state.is_terminal, what="the end of the cancelled search")


def test_a_step_elsewhere_is_cancelled_preempted_and_outlives_a_killed_worker(deployment: Deployment, tiny_spec: Callable[..., dict[str, Any]]) -> None:
    """One search, whose rungs take long: a node is stopped (SIGSTOP), a worker is killed, then the search is cancelled."""
    search_id = deployment.submit(tiny_spec(rungs={"first_tokens": 400_000, "factor": 2, "num_trained": 1, "keep": 0.5}))
    first, pid = deployment.tick_until(lambda: deployment.training(search_id), what="a rung that trains")
    worker = psutil.Process(pid)
    raylet = next(parent for parent in worker.parents() if "raylet" in parent.name())
    stopped = [raylet, *raylet.children(recursive=True)]
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        second, second_pid = deployment.tick_until(
            lambda: (found := deployment.training(search_id)) is not None and found[0] != first and found, what="the trial on another node"
        )
    finally:
        for process in stopped:
            process.send_signal(signal.SIGCONT)
    seconds = time.monotonic() - began

    os.kill(second_pid, signal.SIGKILL)
    deployment.tick_until(lambda: second not in [one.id for one in deployment.attempts(search_id, AttemptState.RUNNING)], what="the end of the killed attempt")
    third, _ = deployment.tick_until(lambda: (found := deployment.training(search_id)) is not None and found[0] != second and found, what="a third attempt")
    deployment.store.request_cancel(search_id)
    asked = time.monotonic()
    deployment.tick_until(lambda: deployment.store.get_search(search_id).state.is_terminal, what="the end of the cancelled search")

    assert deployment.store.get_search(search_id).state is SearchState.CANCELLED
    assert time.monotonic() - asked < 15
    states = {attempt.id: attempt for attempt in deployment.store.list_attempts(search_id)}
    assert states[first].state is AttemptState.LOST
    assert (states[first].reason or "").startswith("preempted")
    assert seconds < 60, "the step of a node that hangs waited for Ray to notice"
    assert states[second].state is AttemptState.FAILED
    assert (states[second].reason or "").startswith("worker_died")
    assert states[third].state is AttemptState.CANCELLED
