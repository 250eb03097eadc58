"""`nas serve` for the length of a block, and one search through it: what the benchmarks share."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nas.client import Client
from nas.settings import Settings

START_SECONDS = 60.0


def bench_settings(folder: Path, *, cores: int) -> tuple[dict[str, str], Settings]:
    """Environment and settings of a service with its own folder and port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder.absolute() / "data"
    environment = {**os.environ, "NAS_DATA": str(data), "NAS_PORT": str(port), "NAS_NUM_CPUS": str(cores), "NAS_NUM_GPUS": "0"}
    data.mkdir(parents=True, exist_ok=True)
    return environment, Settings.from_environment(environment)


@contextlib.contextmanager
def serving(environment: dict[str, str], *, log: Path) -> Iterator[Client]:
    """A running service; nothing of it is left afterwards."""
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "nas.cli", "serve"], env=environment, stdout=file, stderr=file)
        try:
            with Client(f"http://127.0.0.1:{environment['NAS_PORT']}") as client:
                deadline = time.monotonic() + START_SECONDS
                while not client.is_ready():
                    if process.poll() is not None or time.monotonic() > deadline:
                        sys.exit(f"the service did not start; see {log}")
                    time.sleep(0.2)
                yield client
        finally:
            process.terminate()
            process.wait(timeout=60)


def run_search(client: Client, spec: dict[str, Any], *, on_event: Callable[[dict[str, Any]], None] = lambda event: None) -> str:
    """Submit and follow to the end; returns the id, exits when the search did not succeed."""
    search_id = str(client.submit(json.dumps(spec).encode())["id"])
    for event in client.follow(search_id):
        on_event(event)
    if (search := client.search(search_id))["state"] != "succeeded":
        sys.exit(f"the search ended as {search['state']}: {search['error']}")
    return search_id
