"""Whoever follows a search does not notice that the service was killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx2
import pytest

from nas.store.records import SearchState
from tests.waiting import BUSY_SECONDS

if TYPE_CHECKING:
    from tests.api.conftest import Service


@contextmanager
def serving(service: Service, port: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "NAS_DATA": str(service.settings.data_folder), "NAS_PORT": str(port)}
    process = subprocess.Popen([sys.executable, "-m", "api"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                break
        except httpx2.TransportError:
            pass
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.faults
@pytest.mark.parametrize(("end", "code"), [(SearchState.FAILED, 1), pytest.param(SearchState.SUCCEEDED, 0, marks=pytest.mark.slow)])
def test_watch_goes_on_after_the_service_was_killed_and_wait_tells_how_it_ended(service: Service, free_port: int, end: SearchState, code: int) -> None:
    search = service.submit()
    command = [sys.executable, "-m", "nas.cli", "watch", search.id, "--json", "--url", f"http://127.0.0.1:{free_port}"]
    with serving(service, free_port) as first:
        watch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert watch.stdout is not None
        seen = [json.loads(watch.stdout.readline())]
        first.send_signal(signal.SIGKILL)
        first.wait()
        for _ in range(5):
            service.store.add_event(search.id, "test.event", {})
    with serving(service, free_port):
        seen += [json.loads(watch.stdout.readline()) for _ in range(5)]
        service.move(search, end)
        out, err = watch.communicate(timeout=30)
        seen += [json.loads(line) for line in out.splitlines()]
        waited = subprocess.run([*command[:3], "wait", search.id, *command[-2:]], capture_output=True, text=True, check=False)

    assert [event["sequence"] for event in seen] == list(range(1, service.store.get_search(search.id).version + 1))
    assert (watch.returncode, waited.returncode) == (code, code), err
    assert end.value in waited.stdout
    assert "Traceback" not in err
