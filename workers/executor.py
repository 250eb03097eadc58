"""Where steps run: a protocol, and the local executor, which runs each step in a child process. Ray's is in `ray_executor.py`."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from workers.logs import LOG
from workers.outcome import Outcome, read_outcome
from workers.step import DISK_FULL, REQUEST, Step

logger = logging.getLogger(__name__)


NOT_FOR_STEPS = ("NAS_DATABASE_URL", "NAS_DATABASE_URL_FILE", "NAS_API_KEY", "NAS_API_KEY_FILE")
"""Variables of the controller that no step needs: its database is nobody else's."""


class Executor(Protocol):
    """Runs steps somewhere. Every started step ends in exactly one outcome, also when its process dies."""

    def start(self, step: Step) -> None:
        """Begin a step; it may wait for resources first. One that cannot begin raises, or ends in an outcome that says why."""

    def wait(self, *, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        """Steps that ended since the last call, by key; blocks until there is one, or the time is over: also when nothing runs."""

    def kill(self, key: str) -> None:
        """End a step by force; its outcome is `worker_died`, unless it had already ended."""

    def close(self) -> None:
        """End all steps by force and let go of everything."""


class LocalExecutor:
    """Each step in a child process of this one; they die with it. No scheduling: the controller's parallelism is the limit."""

    def __init__(self) -> None:
        self._processes: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}

    def start(self, step: Step) -> None:
        folder = Path(step.folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REQUEST).write_text(json.dumps(asdict(step)), encoding="utf-8")
        threads = str(max(1, round(step.cpus)))
        inherited = {name: value for name, value in os.environ.items() if name not in NOT_FOR_STEPS}
        environment = {**inherited, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "NAS_PARENT_PID": str(os.getpid())}
        if not step.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # a step that asked for no GPU must not see one
        with (folder / LOG).open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", "workers.step", str(folder)], stdout=log, stderr=log, env=environment, start_new_session=True)
        self._processes[step.key] = process, folder

    def wait(self, *, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        deadline = time.monotonic() + timeout_seconds
        while not (ended := [key for key, (process, _) in self._processes.items() if process.poll() is not None]):
            if time.monotonic() >= deadline:
                return []
            time.sleep(0.02)
        return [(key, self._outcome(*self._processes.pop(key))) for key in ended]

    def _outcome(self, process: subprocess.Popen[bytes], folder: Path) -> Outcome:
        if (outcome := read_outcome(folder)) is not None:
            return outcome
        if process.returncode == DISK_FULL:
            return Outcome(succeeded=False, reason="disk_full", message=f"no room for its result; {_last_lines(folder)}")
        return Outcome(succeeded=False, reason="worker_died", message=f"process {_ended(process.returncode)}; {_last_lines(folder)}")

    def kill(self, key: str) -> None:
        if key in self._processes:
            os.killpg(self._processes[key][0].pid, signal.SIGKILL)

    def close(self) -> None:
        for key in self._processes:
            self.kill(key)
        for process, _ in self._processes.values():
            process.wait()
        self._processes.clear()


def _ended(code: int) -> str:
    """How a process ended, with the name of the signal that killed it."""
    if code >= 0:
        return f"ended with code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was killed by {names.get(-code, f'signal {-code}')}"


def _last_lines(folder: Path, *, count: int = 5) -> str:
    log = folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:] if log.exists() else []
    return "last lines: " + " | ".join(lines) if lines else "it printed nothing"
