from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.waiting import wait_until
from workers.liveness import BEAT, STOP, beating, is_superseded, read_beat, supersede
from workers.outcome import RESULT
from workers.step import Step, execute

BEATS = """
import sys, time
from pathlib import Path
from workers.liveness import beating
with beating(Path(sys.argv[1]), seconds=0.02):
    time.sleep(60)
"""


def beats(folder: Path) -> int:
    beat = read_beat(folder)
    assert beat is not None
    return int(beat)


def test_a_step_beats_from_before_it_begins_to_its_end(tmp_path: Path) -> None:
    assert read_beat(tmp_path) is None
    with beating(tmp_path, seconds=0.01):
        assert read_beat(tmp_path) is not None
        wait_until(lambda: beats(tmp_path) >= 3, what="three beats")
        size = (tmp_path / BEAT).stat().st_size
    last = beats(tmp_path)
    time.sleep(0.05)

    assert beats(tmp_path) == last
    assert (tmp_path / BEAT).stat().st_size == size, "rewritten in place: a full disk must not silence it"


def long_decomposition() -> None:
    matrix = torch.rand(1200, 1200, dtype=torch.float64)
    torch.linalg.eigh(matrix + matrix.T)


def busy_python() -> None:
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        sum(range(1000))


@pytest.mark.parametrize("work", [long_decomposition, busy_python])
def test_neither_one_long_native_call_nor_busy_python_silences_it(tmp_path: Path, work: Callable[[], None]) -> None:
    with beating(tmp_path, seconds=0.02):
        started, first = time.monotonic(), beats(tmp_path)
        work()
        seconds, last = time.monotonic() - started, beats(tmp_path)

    assert seconds > 0.2, "too short to tell"
    assert last - first > seconds / 0.02 / 10


def test_a_stopped_process_falls_silent_and_goes_on_when_it_wakes(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", BEATS, str(tmp_path)])
    try:
        wait_until(lambda: read_beat(tmp_path) is not None and beats(tmp_path) > 2, what="three beats")
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.1)
        before = beats(tmp_path)
        time.sleep(0.3)
        assert beats(tmp_path) == before
        os.kill(process.pid, signal.SIGCONT)
        wait_until(lambda: beats(tmp_path) > before, what="another beat")
    finally:
        process.kill()
        process.wait()


def test_a_step_loses_its_place_to_another_or_with_its_search(tmp_path: Path) -> None:
    superseded, ended = tmp_path / "superseded", tmp_path / "ended"
    superseded.mkdir()
    ended.mkdir()
    assert not is_superseded(superseded)
    assert not is_superseded(ended)

    supersede(superseded)
    shutil.rmtree(ended)

    assert is_superseded(superseded)
    assert (superseded / STOP).exists()
    assert is_superseded(ended)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_step_that_was_superseded_before_it_began_does_nothing(tmp_path: Path, is_there: bool) -> None:
    """It waited in a queue of a node that hung, for instance."""
    mailbox = tmp_path / "mailbox"
    if is_there:
        supersede(mailbox)
    before = sorted(path.name for path in tmp_path.rglob("*"))

    outcome = execute(Step(key="k", stage="nonsense", folder=str(mailbox), request={}, cpus=1.0, gpus=0.0))

    assert (outcome.succeeded, outcome.reason) == (False, "superseded")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert not (mailbox / RESULT).exists()
