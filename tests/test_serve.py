"""`nas serve`: one process tree that starts again what dies, ends whole, and says at once when it cannot start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nas.client import Client
from nas.errors import InvalidSpec
from nas.serve import check_port
from nas.settings import Settings
from tests.waiting import wait_until


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Client]]:
    port = free_port()
    environment = {**os.environ, "NAS_DATA": str(tmp_path), "NAS_PORT": str(port), "NAS_EXECUTOR": "local"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "nas.cli", "serve"], env=environment, stdout=log, stderr=log)
    with Client(f"http://127.0.0.1:{port}") as client:
        wait_until(lambda: client.is_ready() and len(children(process)) == 2, what="API and controller")
        yield process, client
    if process.poll() is None:
        process.kill()
        process.wait()


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


def test_ctrl_c_stops_all_of_it_cleanly(service: tuple[subprocess.Popen[bytes], Client]) -> None:
    process, client = service
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    assert not any(child.is_running() for child in tree)
    assert not client.is_ready()


def test_a_killed_service_leaves_nothing_running(service: tuple[subprocess.Popen[bytes], Client]) -> None:
    process, _ = service
    tree = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    wait_until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in tree), what="the end of all")


def test_a_child_that_dies_is_started_again(service: tuple[subprocess.Popen[bytes], Client]) -> None:
    process, client = service
    before = {child.pid for child in children(process)}
    for child in children(process):
        child.kill()
    wait_until(lambda: len({child.pid for child in children(process)} - before) == 2 and client.is_ready(), what="both once more")
    process.terminate()
    assert process.wait(timeout=30) == 0


def test_a_port_that_is_taken_is_told_at_once(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        settings = Settings.from_environment({"NAS_DATA": str(tmp_path), "NAS_PORT": str(listener.getsockname()[1])})
        with pytest.raises(InvalidSpec, match=r"NAS_HOST, NAS_PORT: expected an address that nobody else listens on, got .*Address already in use"):
            check_port(settings)
    check_port(settings)


def test_settings_that_a_child_refuses_end_the_service_with_its_code(tmp_path: Path) -> None:
    environment = {**os.environ, "NAS_DATA": str(tmp_path), "NAS_PORT": str(free_port()), "NAS_EXECUTOR": "local", "NAS_HOST": "0.0.0.0"}
    process = subprocess.run([sys.executable, "-m", "nas.cli", "serve"], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 2
    assert "NAS_HOST: expected a service that only this machine reaches" in process.stderr
