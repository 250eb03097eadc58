"""A controller in a process of its own, on the database and the folder of its environment, whose steps only pretend."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from nas.files import whole_file
from nas.settings import Settings
from nas.store.store import Store
from tests.simulation.cluster import pretended_result
from workers.controller import Controller
from workers.liveness import STOP, beating, is_superseded
from workers.outcome import RESULT, Outcome
from workers.step import Step, failure


class PretendingExecutor:
    """Every step is a thread. They are stopped, and end, with their process."""

    def __init__(self) -> None:
        self._ended: dict[str, Outcome] = {}
        self._killed: set[str] = set()

    def start(self, step: Step) -> None:
        threading.Thread(target=self._run, args=(step,), daemon=True).start()

    def wait(self, *, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        deadline = time.monotonic() + min(timeout_seconds, 0.05)
        while not self._ended and time.monotonic() < deadline:
            time.sleep(0.01)
        return [(key, self._ended.pop(key)) for key in list(self._ended)]

    def kill(self, key: str) -> None:
        self._killed.add(key)

    def close(self) -> None:
        pass

    def _run(self, step: Step) -> None:
        try:
            outcome = self._pretend(step)
        except OSError as error:  # a full disk
            outcome = failure(error)
        self._ended[step.key] = outcome

    def _pretend(self, step: Step) -> Outcome:
        folder, deadline = Path(step.folder), time.monotonic() + random.uniform(0.2, 0.6)
        outcome = Outcome(succeeded=True, result=pretended_result(step))
        with beating(folder, seconds=0.1):
            while time.monotonic() < deadline:
                if step.key in self._killed or (folder / STOP).exists():
                    outcome = Outcome(succeeded=False, reason="stopped", message="asked to")
                    break
                time.sleep(0.01)
        if not is_superseded(folder):
            with whole_file(folder / RESULT) as temporary:
                temporary.write_text(json.dumps(outcome.as_dict()), encoding="utf-8")
        return outcome


def main() -> int:
    settings = Settings.from_environment(os.environ)
    store = Store.open(settings.database_url)
    controller = Controller(store=store, executor=PretendingExecutor(), settings=settings)
    signal.signal(signal.SIGTERM, lambda *_: controller.stop())
    controller.run()
    store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
