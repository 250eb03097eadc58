"""The controller's container, run here: it joins a Ray cluster by address, with a token, and a search runs on the cluster's workers."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nas.settings import Settings
from nas.spec import dump_spec, parse_spec
from nas.store.store import Store
from nas.submission import check_submission

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "controller.sh"
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a machine that may join a head with one core; whatever runs out of its folder ends with the test."""
    # A socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="nas-r-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "NAS_DATA": str(tmp_path / "data"),
        "NAS_RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    start = ["ray", "start", "--head", f"--port={address.split(':')[1]}", "--num-cpus=1", f"--temp-dir={folder}", "--include-dashboard=false"]
    subprocess.run([*start, "--disable-usage-stats"], env=environment, check=True, stdout=subprocess.DEVNULL)
    yield environment
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in argument for argument in process.info["cmdline"] or ()):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_search_runs_on_a_cluster_by_address(
    cluster: dict[str, str], register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    settings = Settings.from_environment(cluster)
    settings.data_folder.mkdir()
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    submission = check_submission(parse_spec(json.dumps(tiny_spec())), store=store)
    search = store.create_search(spec=dump_spec(submission.spec), inputs=submission.inputs, plan=submission.plan, label="")
    controller = subprocess.Popen([str(SCRIPT)], env=cluster, start_new_session=True)
    try:
        deadline = time.monotonic() + 400
        while not (found := store.get_search(search.id)).state.is_terminal:
            assert controller.poll() is None, "the controller ended"
            assert time.monotonic() < deadline, found.state
            time.sleep(0.5)
        assert found.state == "succeeded", found.error
        controller.send_signal(signal.SIGTERM)
        assert controller.wait(timeout=60) == 0
    finally:
        store.close()
        if controller.poll() is None:
            os.killpg(controller.pid, signal.SIGKILL)
            controller.wait()
