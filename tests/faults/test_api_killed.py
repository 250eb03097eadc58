"""The API is killed in the middle of submits: a search is there whole or not at all, what was acknowledged stays, and the same key again gives the same one."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from tests.faults.fleet import Fleet
from tests.faults.summary import COUNTS, KILLS, RecordProperty
from tests.waiting import wait_until

pytestmark = pytest.mark.faults


class Api:
    """`python -m api` on a fleet's database, started again as often as it is killed."""

    def __init__(self, fleet: Fleet, *, port: int) -> None:
        self._fleet, self.address = fleet, f"http://127.0.0.1:{port}"
        self._environment = fleet.environment | {"NAS_PORT": str(port)}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._fleet.settings.data_folder / "api.log").open("ab") as log:
            self._process = subprocess.Popen([sys.executable, "-m", "api"], env=self._environment, stdout=log, stderr=log)
        wait_until(self._is_alive, what="the API is there")

    def _is_alive(self) -> bool:
        with contextlib.suppress(httpx2.TransportError):
            return httpx2.get(f"{self.address}/healthz").status_code == 200
        return False

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Client:
    """Submits one search after the other, each until it is answered, and each with a key of its own; now and then one twice at once."""

    def __init__(self, address: str, *, spec: dict[str, Any]) -> None:
        self.answers: list[tuple[str, str]] = []
        """Key and search, of every answer."""
        self.broken = 0
        self._address, self._spec, self._is_over = address, spec, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._is_over.is_set():
            number += 1
            self.submit(f"key-{number}", seed=number)

    def submit(self, key: str, *, seed: int) -> None:
        while True:
            try:
                answer = httpx2.post(f"{self._address}/v1/searches", json=self._spec | {"seed": seed}, headers={"Idempotency-Key": key}, timeout=30)
            except httpx2.TransportError:
                self.broken += 1
                time.sleep(0.05)
                continue
            assert answer.status_code == 201, answer.text
            self.answers.append((key, answer.json()["id"]))
            return

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()


@pytest.fixture
def api(fleet: Fleet, free_tcp_port: int) -> Iterator[Api]:
    api = Api(fleet, port=free_tcp_port)
    yield api
    api.kill()


@pytest.mark.parametrize("num_kills", [3, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_the_api_is_killed_while_searches_are_submitted(
    fleet: Fleet,
    api: Api,
    num_kills: int,
    register_tiny: Callable[..., None],
    tiny_spec: Callable[..., dict[str, Any]],
    record_property: RecordProperty,
) -> None:
    register_tiny(store=fleet.store, settings=fleet.settings)
    generator = random.Random(0)
    api.start()
    client = Client(api.address, spec=tiny_spec())
    for _ in range(num_kills):
        told = len(client.answers)
        wait_until(lambda told=told: len(client.answers) >= told + 3, what="submits are answered")
        time.sleep(generator.uniform(0.0, 0.1))
        api.kill()
        fleet.note("api killed")
        api.start()
    client.close()
    acknowledged = list(client.answers)

    for number in range(1, len(acknowledged) + 1):
        client.submit(f"key-{number}", seed=number)

    by_key = Counter(dict.fromkeys(client.answers))
    there = {search.id for search in fleet.store.list_searches(limit=100_000)}
    lost = {search_id for _, search_id in acknowledged} - there
    doubled = there - {search_id for _, search_id in acknowledged}
    record_property(KILLS, dict(fleet.happened) | {"submits answered": len(acknowledged)})
    record_property(COUNTS, {"lost": len(lost), "doubled": len(doubled), "searches": len(there)})
    assert client.broken > 0, "no submit met a kill"
    assert len(by_key) == len(acknowledged), "a key was answered with two searches"
    assert lost == set()
    assert doubled == set()
