from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from workers.metrics import ALIVE_SECONDS, REGISTRY, STAGES, Pulse, note_running, serve_metrics


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def address(clock: Clock) -> Iterator[str]:
    server = serve_metrics("127.0.0.1", 0, pulse=Pulse(clock=clock))
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_loop_that_comes_round_is_alive_and_one_that_hangs_is_not(address: str, clock: Clock) -> None:
    assert get(f"{address}/healthz") == (200, "alive\n")

    clock.now += ALIVE_SECONDS

    assert get(f"{address}/healthz")[0] == 503


def test_the_port_shows_metrics_and_nothing_else(address: str) -> None:
    status, text = get(f"{address}/metrics")

    assert status == 200
    assert "nas_tick_seconds_bucket" in text
    assert "process_resident_memory_bytes" in text
    assert get(f"{address}/v1/searches")[0] == 404


def test_what_is_in_flight_is_counted_by_stage() -> None:
    note_running([("rung", 100.0), ("rung", 50.0), ("prepare", 0.0)], num_searches=2)

    value = REGISTRY.get_sample_value
    assert {stage: value("nas_running_steps", {"stage": stage}) for stage in STAGES} == {"prepare": 1, "rung": 2, "confirm": 0, "bundle": 0}
    assert value("nas_tokens_per_second") == 150.0
    assert value("nas_held_searches") == 2

    note_running([], num_searches=0)
    assert value("nas_running_steps", {"stage": "rung"}) == 0
