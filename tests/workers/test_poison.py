"""Steps that end badly in a process of their own: each end has its name, and the process takes nothing else along."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from workers import executor as module
from workers.executor import LocalExecutor
from workers.outcome import RESULT, Outcome
from workers.step import Step

POISONED = """
import os, resource, signal, sys
import nas.compress.distillation, nas.search.prepare
from workers import step
def run(step_, *, folder):
{body}
step._run = run
sys.exit(step.main(sys.argv[1]))
"""

POISONS = {
    "segfault": ("os.kill(os.getpid(), signal.SIGSEGV)", "worker_died", "was killed by SIGSEGV"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "worker_died", "was killed by SIGKILL"),
    "exit": ("os._exit(7)", "worker_died", "ended with code 7"),
    "memory": (
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, resource.RLIM_INFINITY))\n"
        "bytearray(2**33)",
        "out_of_memory",
        "MemoryError",
    ),
    "disk": ("with open('/dev/full', 'w') as file:\n    file.write('x' * 10)", "disk_full", "No space left on device"),
    "no room for the result": ("resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\nreturn {'x': 1}", "disk_full", "no room for its result"),
    "not a number": ("return {'score': float('nan')}", "invalid_result", "finite"),
}


@pytest.mark.parametrize(
    "poison", [name if name in ("segfault", "memory", "no room for the result") else pytest.param(name, marks=pytest.mark.slow) for name in POISONS]
)
def test_a_poisoned_step_ends_in_its_typed_failure(poison: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, reason, message = POISONS[poison]
    code = POISONED.format(body="\n".join(f"    {line}" for line in body.splitlines()))
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([sys.executable, "-c", code, command[-1]], **options)

    monkeypatch.setattr(module.subprocess, "Popen", start)
    executor = LocalExecutor()
    (tmp_path / "att").mkdir()
    executor.start(Step(key="att", stage="rung", folder=str(tmp_path / "att"), request={}, cpus=1.0, gpus=0.0))

    outcome = wait(executor)

    executor.close()
    assert (outcome.succeeded, outcome.reason) == (False, reason), outcome
    assert message in outcome.message
    assert [path.name for path in (tmp_path / "att").iterdir() if path.name.startswith(f".{RESULT}")] == [], "half a result"


def wait(executor: LocalExecutor) -> Outcome:
    deadline = time.monotonic() + 90.0
    while time.monotonic() < deadline:
        if ended := executor.wait(timeout_seconds=1.0):
            return ended[0][1]
    raise AssertionError("the step did not end")
