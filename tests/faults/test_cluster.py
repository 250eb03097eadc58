"""`nas serve --ray-address`: a head that dies and comes back, a cluster's token, a step that takes all the memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from nas.settings import Settings
from nas.store.records import AttemptState, SearchState
from nas.store.store import Store
from tests.faults.test_kills import serving, submit
from tests.waiting import wait_until
from tests.workers.ray_cluster import add_node, ray_cluster
from workers.outcome import Outcome
from workers.step import Step

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclasses.dataclass
class Head:
    """A cluster of one node, as an operator starts it, that asks for a token."""

    port: int
    folder: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        ray = Path(sys.executable).with_name("ray")
        options = ["--head", "--block", f"--port={self.port}", "--node-ip-address=127.0.0.1", "--num-cpus=1", "--num-gpus=0", "--include-dashboard=false"]
        memory = f"--object-store-memory={128 * 2**20}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([ray, "start", *options, memory, f"--temp-dir={self.folder}"], env=self.environment, start_new_session=True, **quiet)

    def kill(self) -> None:
        """SIGKILL to all of it at once, as when the machine is gone."""
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for process in [*root.children(recursive=True), root]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


@contextmanager
def head_node() -> Iterator[Head]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("NAS_", "RAY_"))}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1"}
        head = Head(port=port, folder=folder, environment=environment)
        head.start()
        try:
            yield head
        finally:
            head.kill()


def test_a_head_that_dies_and_comes_back_costs_no_search(tmp_path: Path, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]) -> None:
    """The controller goes with the head, and is started again until there is a head; what runs was lost, not failed."""
    url = f"sqlite:///{tmp_path / 'data' / 'nas.db'}"
    with head_node() as head, serving(tmp_path, database_url=url, register=register_tiny) as service:
        service.environment |= {name: value for name, value in head.environment.items() if name.startswith("RAY_")}
        service.environment |= {"NAS_RAY_ADDRESS": head.address, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
        service.start()
        search_id = submit(service, tiny_spec(rungs={"first_tokens": 100_000, "factor": 2, "num_trained": 1, "keep": 0.5}))
        store = Store.open(url)

        def trains() -> bool:
            return any(attempt.rung and attempt.state is AttemptState.RUNNING for attempt in store.list_attempts(search_id))

        wait_until(trains, what="a rung that trains")
        controller = service.find("-m", "workers")
        assert controller is not None
        head.kill()
        wait_until(lambda: not controller.is_running() or controller.status() == psutil.STATUS_ZOMBIE, what="the end of the controller")
        head.start()
        wait_until(lambda: store.get_search(search_id).state.is_terminal, what="the end of the search", seconds=300)

        search = store.get_search(search_id)
        assert search.state is SearchState.SUCCEEDED, search.error
        states = [attempt.state for attempt in store.list_attempts(search_id)]
        assert AttemptState.LOST in states
        assert AttemptState.FAILED not in states
        store.close()
        assert service.stop() == 0


@pytest.mark.parametrize("token", ["0" * 64, ""])
def test_without_the_clusters_token_the_controller_does_not_start(tmp_path: Path, token: str) -> None:
    refusal = "RAY_AUTH_TOKEN: expected the token of the cluster, got none, or one that it refuses"
    with head_node() as head:
        environment = {**head.environment, "NAS_DATA": str(tmp_path / "data"), "NAS_RAY_ADDRESS": head.address, "RAY_AUTH_TOKEN": token}
        environment["HOME"] = str(tmp_path)  # Ray looks for a token there, too
        wait_until(lambda: _listens(head.port), what="the head")

        refused = subprocess.run([sys.executable, "-m", "workers"], env=environment, capture_output=True, text=True, timeout=120, check=False)

        assert (refused.returncode, refusal in refused.stderr) == (2, True), refused.stderr[-2000:]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def hog(step: Step) -> Outcome:
    """Takes memory until somebody ends it."""
    taken = []
    while True:
        taken.append(b"\1" * 2**26)


def test_a_step_that_takes_all_memory_ends_as_one(tmp_path: Path) -> None:
    """Killed by Ray before the machine is out of memory, and told as what it is."""
    from workers.ray_executor import RayExecutor

    limit = psutil.virtual_memory().percent / 100 + 0.07
    with ray_cluster() as cluster:
        add_node(cluster, tmp_path / "node", RAY_memory_usage_threshold=f"{limit:.2f}", RAY_memory_monitor_refresh_ms="100")
        settings = dataclasses.replace(Settings.from_environment({"NAS_DATA": str(tmp_path / "data"), "NAS_RAY_INSECURE": "1"}), ray_address=cluster.address)
        executor = RayExecutor(settings, save_node=lambda node: None, work=f"{__name__}:hog")
        try:
            executor.start(Step(key="hog", stage="rung", folder=str(tmp_path / "hog"), request={}, cpus=1.0, gpus=0.0))
            ended: dict[str, Outcome] = {}
            wait_until(lambda: ended.update(executor.wait(timeout_seconds=0.5)) or ended, what="the end of a hog")
        finally:
            executor.close()

    assert (ended["hog"].succeeded, ended["hog"].reason) == (False, "out_of_memory")
