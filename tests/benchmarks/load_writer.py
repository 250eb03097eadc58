"""One search's controller with pretended workers, in a process of its own: the writing half of `load.py`.

`python -m tests.benchmarks.load_writer DATABASE_URL DATA_FOLDER SEARCH_ID STEP_SECONDS SECONDS` runs the real controller on the real store for
so long, then cancels the search and ends with it. Only what a step computes is made up; its progress lines and results lie in files, as real ones do.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import logging
import random
import sys
import time
from pathlib import Path

from nas.settings import Settings
from nas.store.store import Store
from tests.simulation.cluster import pretended_result
from workers.controller import Controller
from workers.outcome import RESULT, Outcome
from workers.step import PROGRESS, STOP, Step

POINTS_PER_STEP = 50


class PretendedWorkers:
    """An executor whose steps take about so long, each its own time, and report a learning curve at their end."""

    def __init__(self, *, step_seconds: float) -> None:
        self._step_seconds, self._draw = step_seconds, random.Random(0)
        self._ends: list[tuple[float, str]] = []
        self._running: dict[str, Step] = {}

    def start(self, step: Step) -> None:
        folder = Path(step.folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [{"host": "here", "pid": 1}]
        if step.request.get("rung"):
            speeds = {"learning_rate": 1e-3, "tokens_per_second": 1e4}
            lines += [{"tokens": 20 * (point + 1), "loss": 3.0 / (1 + point), **speeds} for point in range(POINTS_PER_STEP)]
        (folder / PROGRESS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self._running[step.key] = step
        heapq.heappush(self._ends, (time.monotonic() + self._step_seconds * self._draw.uniform(0.5, 1.5), step.key))

    def wait(self, *, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        deadline = time.monotonic() + timeout_seconds
        while not (ended := self._collect()) and time.monotonic() < deadline:
            time.sleep(0.005)
        return ended

    def kill(self, key: str) -> None:
        heapq.heappush(self._ends, (0.0, key))

    def close(self) -> None:
        self._running.clear()

    def _collect(self) -> list[tuple[str, Outcome]]:
        ended = []
        while self._ends and self._ends[0][0] <= time.monotonic():
            _, key = heapq.heappop(self._ends)
            step = self._running.pop(key, None)
            if step is not None:
                ended.append((key, self._end(step)))
        return ended

    def _end(self, step: Step) -> Outcome:
        folder = Path(step.folder)
        if (folder / STOP).exists():
            return Outcome(succeeded=False, reason="stopped", message="asked to")
        outcome = Outcome(succeeded=True, result=pretended_result(step))
        (folder / RESULT).write_text(json.dumps(outcome.as_dict()), encoding="utf-8")
        return outcome


def main() -> None:
    logging.disable(logging.WARNING)  # every step that is asked to stop says so
    url, folder, search_id, step_seconds, seconds = sys.argv[1:]
    settings = dataclasses.replace(Settings.from_environment({"NAS_DATA": folder}), database_url=url)
    store = Store.open(url)
    controller = Controller(store=store, executor=PretendedWorkers(step_seconds=float(step_seconds)), settings=settings)
    deadline = time.monotonic() + float(seconds)
    is_cancelled = False
    while not store.get_search(search_id).state.is_terminal:
        if not is_cancelled and time.monotonic() > deadline:
            store.request_cancel(search_id)
            is_cancelled = True
        controller.tick(timeout_seconds=0.05)
    store.close()


if __name__ == "__main__":
    main()
