"""Speeds that were asked for are measured by a worker under the real controller."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nas.compress import speed
from nas.settings import Settings
from nas.store.store import Store
from workers.controller import Controller
from workers.outcome import Outcome
from workers.step import Step, execute


class OneStep:
    """Runs what was started when it is waited for, or answers as it is told."""

    def __init__(self, answer: Outcome | None = None) -> None:
        self.answer, self.started, self._waiting = answer, [], []

    def start(self, step: Step) -> None:
        self.started.append(step)
        self._waiting.append(step)

    def wait(self, *, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        ended, self._waiting = self._waiting, []
        return [(step.key, self.answer or execute(step)) for step in ended]

    def kill(self, key: str) -> None:
        raise AssertionError("nothing is killed here")

    def close(self) -> None:
        self._waiting.clear()


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(speed, "HIDDEN_SIZES", {"cpu": (32,)})
    monkeypatch.setattr(speed, "_BATCH", {"cpu": (1, 16)})
    monkeypatch.setattr(speed, "_SECONDS", 0.01)
    return Settings.from_environment({"NAS_DATA": str(tmp_path)})


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    opened = Store.open(settings.database_url, migrate=True)
    yield opened
    opened.close()


def run(executor: OneStep, *, store: Store, settings: Settings, ticks: int = 3) -> None:
    controller = Controller(store=store, executor=executor, settings=settings)
    for _ in range(ticks):
        controller.tick(timeout_seconds=0.0)
    store.leave(controller._membership.owner)


def test_what_was_wished_for_is_measured_once_and_leaves_no_files(store: Store, settings: Settings) -> None:
    store.wish_speed(cpus=1.0, gpus=0.0, dtype="float32")
    executor = OneStep()

    run(executor, store=store, settings=settings)
    run(executor, store=store, settings=settings)

    assert [step.stage for step in executor.started] == ["probe"]
    found = store.wish_speed(cpus=1.0, gpus=0.0, dtype="float32")
    assert found.points is not None
    assert found.host
    assert found.points[0]["trained_per_second"] > 0
    assert not Path(executor.started[0].folder).exists()


def test_a_worker_that_is_not_there_is_said_to_be_missing(store: Store, settings: Settings) -> None:
    store.wish_speed(cpus=1.0, gpus=1.0, dtype="bfloat16")

    run(OneStep(Outcome(succeeded=False, reason="error", message="RuntimeError: expected a CUDA device")), store=store, settings=settings)

    error = store.wish_speed(cpus=1.0, gpus=1.0, dtype="bfloat16").error
    assert error is not None
    assert "expected a CUDA device" in error


def test_a_probe_lost_with_its_controller_is_started_by_the_next(store: Store, settings: Settings) -> None:
    store.wish_speed(cpus=1.0, gpus=0.0, dtype="float32")

    class NeverEnds(OneStep):
        def wait(self, *, timeout_seconds: float) -> list[tuple[str, Outcome]]:
            return []

    run(NeverEnds(), store=store, settings=settings)
    run(second := OneStep(), store=store, settings=settings)

    assert len(second.started) == 1
    assert store.wish_speed(cpus=1.0, gpus=0.0, dtype="float32").points is not None
