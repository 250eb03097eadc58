"""`nas distill` as torchrun starts it: two processes, stopped in the middle, gone on with by one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from nas.full_run import SUMMARY
from nas.pruning import prune_teacher
from nas.run_folder import CHECKPOINT, WORK
from tests.test_full_run import SHAPE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(tiny_sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    student = tmp_path_factory.mktemp("student") / "pruned"
    teacher, corpus = tiny_sources["teacher"], tiny_sources["corpus"]
    prune_teacher(teacher=teacher, shape=SHAPE, corpus=[corpus], out=student, device="cpu", sequence_length=32, calibration_tokens=512)
    sizes = ["--tokens", "65536", "--batch-size", "4", "--sequence-length", "32", "--validation-tokens", "256", "--learning-rate", "1e-3"]
    return ["distill", "--teacher", str(teacher), "--student", str(student), "--corpus", str(corpus), *sizes, "--json"]


def start(command: list[str], *, out: Path, processes: int, **options: Any) -> subprocess.Popen[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    arguments = [sys.executable, "-m", *launcher, "nas.cli", *command, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    answer, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    values = json.loads(answer)  # one document: the other processes say nothing
    assert isinstance(values, dict)
    return values


@pytest.fixture(scope="module")
def alone(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    return folder, finished(start(command, out=folder, processes=1))


@pytest.mark.parametrize("spreading", ["--replicated", "--sharded"])
def test_two_processes_end_where_one_ends_also_when_stopped_and_gone_on_with_by_one(
    command: list[str], alone: tuple[Path, dict[str, Any]], tmp_path: Path, spreading: str
) -> None:
    expected = alone[1]
    interrupted = start([*command, spreading], out=tmp_path / "two", processes=2)
    checkpoint = tmp_path / "two" / WORK / CHECKPOINT / "trunk.json"
    deadline = time.monotonic() + 200
    assert interrupted.stderr is not None
    for line in interrupted.stderr:  # until it trains
        assert time.monotonic() < deadline
        if "tokens/s" in line:
            break
    interrupted.send_signal(signal.SIGTERM)
    _, errors = interrupted.communicate(timeout=120)
    assert interrupted.returncode != 0
    assert checkpoint.exists(), errors
    assert not (tmp_path / "two" / SUMMARY).exists()

    resumed = finished(start(command, out=tmp_path / "two", processes=1))
    straight = finished(start([*command, spreading], out=tmp_path / "straight", processes=2))

    for found, name in ((resumed, "two"), (straight, "straight")):
        assert found["tokens"] == expected["tokens"]
        assert found["held_out_before"] == pytest.approx(expected["held_out_before"], rel=1e-4)
        assert found["held_out_after"] == pytest.approx(expected["held_out_after"], rel=1e-3)
        weights = load_file(tmp_path / name / "model.safetensors")
        for key, weight in load_file(alone[0] / "model.safetensors").items():
            assert (weights[key] - weight).norm() <= 1e-3 * weight.norm(), key
