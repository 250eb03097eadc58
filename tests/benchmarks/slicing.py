"""What a student costs before its first step: the time of slicing beside the shortest rung, the memory beside the student, and a teacher that workers share.

Random weights of the larger reference teacher's shape, and for memory of a teacher large enough to be seen beside an interpreter. The workers are fresh
processes, as a search has them. Needs no reference material; memory is read from /proc, so on Linux only.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nas.architecture import read_architecture
from nas.compress.distillation import distil
from nas.compress.importance import measure_importance
from nas.compress.objective import TeacherLogits
from nas.compress.slicing import build_student
from nas.compress.sorting import Sorting, load_sorting, make_order, save_sorted, sort_teacher
from nas.compress.teacher import WEIGHTS_FILE, load_model
from nas.compress.train_plan import TrainPlan
from nas.search.prepare import random_model
from tests.benchmarks.training_speed import SEQUENCE_LENGTH, TEACHERS

RUNG_TOKENS = 50_000
"""Of the shortest trained rung on the reference teachers."""
GOAL_SHARE = 0.02
WORKERS = 8
LARGE = {
    **TEACHERS["tales4M"],
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
}
"""112 MiB in float32."""
SHAPES: dict[str, dict[str, int]] = {
    "75 %": {"intermediate_size": 448, "hidden_size": 168, "num_hidden_layers": 8},
    "50 %": {"intermediate_size": 320, "hidden_size": 168, "num_hidden_layers": 6},
    "30 %": {"intermediate_size": 256, "hidden_size": 144, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
}
"""What a student of tales4M's shape has of its own."""
STEPS = 6
REPEATS = 5

console = Console(width=140)


def bench() -> bool:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cheap = _bench_time(Path(folder))
        shared = _bench_memory(Path(folder) / "large")
    torch.set_num_threads(threads)
    return cheap and shared


def sort_random(config: dict[str, Any], *, folder: Path) -> Sorting:
    """A random teacher of that config, sorted, on disk, the first layers kept at every depth."""
    architecture = read_architecture(config)
    model = random_model(architecture, config=config, seed=0, device="cpu")
    blocks_BT = torch.randint(0, config["vocab_size"], (4, 64), generator=torch.Generator().manual_seed(0))
    importance = measure_importance(model, blocks_BT=blocks_BT, method="energy", batch_size=4)
    order = make_order(importance, architecture.shape)
    layers = {depth: tuple(range(depth)) for depth in range(1, config["num_hidden_layers"] + 1)}
    state = sort_teacher(model, order=order, architecture=architecture)
    save_sorted(folder, state=state, order=order, importance=importance, config=config, layers=layers, tokenizer_from=folder)
    return load_sorting(folder)


def _bench_time(folder: Path) -> bool:
    """Slicing against a rung of 50k tokens of the same student, in turn."""
    config = TEACHERS["tales4M"]
    sorting = sort_random(config, folder=folder)
    teacher = load_model(folder, dtype="float32", device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    blocks_NT = torch.randint(0, config["vocab_size"], (4 * STEPS, SEQUENCE_LENGTH), generator=generator, dtype=torch.int32)  # type: ignore[call-overload]
    plan = TrainPlan(tokens=blocks_NT.numel(), learning_rate=1e-3, batch_size=4)
    table = Table("slicing, tales4M's shape, 1 thread", "slice, ms", f"rung of {RUNG_TOKENS:,} tokens, s", "share (median, max)", "goal", box=None)
    cheap = True
    for name, changes in SHAPES.items():
        shape = dataclasses.replace(sorting.architecture.shape, **changes)
        pairs = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            student = build_student(sorting, shape, dtype="float32", device="cpu")
            sliced = time.perf_counter()
            distil(copy.deepcopy(student), objective=TeacherLogits(teacher), blocks_NT=blocks_NT, plan=plan)
            pairs.append((sliced - started, (time.perf_counter() - sliced) * RUNG_TOKENS / blocks_NT.numel()))
        shares = [slicing / rung for slicing, rung in pairs]
        cheap = cheap and median(shares) <= GOAL_SHARE
        seconds = f"{1000 * median(slicing for slicing, _ in pairs):.1f}", f"{median(rung for _, rung in pairs):.1f}"
        table.add_row(name, *seconds, f"{median(shares):.3%}  ({max(shares):.3%})", f"<= {GOAL_SHARE:.0%}")
    console.print(table)
    return cheap


def _bench_memory(folder: Path) -> bool:
    """Eight workers that each hold the teacher and half of it as a student; how often the teacher's file is in memory, and what slicing needs at its peak."""
    if not Path("/proc/self/smaps").exists():
        console.print("memory: skipped, no /proc/self/smaps here")
        return True
    sorting = sort_random(LARGE, folder=folder)
    file_bytes = (folder / WEIGHTS_FILE).stat().st_size
    reports = _run_workers(folder)
    in_memory = sum(report["file_bytes"] for report in reports) / file_bytes
    student = reports[0]["student_bytes"]
    layer = sum(p.numel() * 4 for p in load_model(folder, dtype="float32", device="cpu").base_model.layers[0].parameters())
    peak = max(report["peak_bytes"] for report in reports)
    table = Table(f"memory, {WORKERS} workers, teacher of {file_bytes / 2**20:.0f} MiB", "measured", "goal", box=None)
    table.add_row("times the teacher's file is in memory (sum of PSS)", f"{in_memory:.2f}", "<= 1")
    for name in ("base", "loaded"):
        pss = [report[f"{name}_pss_bytes"] / 2**20 for report in reports]
        table.add_row(f"PSS of a worker, {name}, MiB (median, max)", f"{median(pss):.0f}  ({max(pss):.0f})", "")
    table.add_row("peak of slicing, MiB", f"{peak / 2**20:.0f}", f"student + one layer = {(student + layer) / 2**20:.0f}")
    console.print(table)
    assert sorting.folder == folder
    return in_memory <= 1.01 and peak <= 1.05 * (student + layer)


def _run_workers(folder: Path) -> list[dict[str, Any]]:
    """The workers go on together, step by step: all are loaded when the first one is measured."""
    command = [sys.executable, "-m", "tests.benchmarks.slicing", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        workers = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment))
            for _ in range(WORKERS)
        ]
        lines: list[str] = []
        for _ in range(3):
            lines = [worker.stdout.readline() for worker in workers if worker.stdout]
            if not all(lines):
                raise RuntimeError("slicing: a worker ended before it had reported")
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
        return [json.loads(line) for line in lines]


def _work(folder: Path) -> None:
    """One worker: what it holds before and after it has loaded the teacher and sliced a student."""
    torch.set_num_threads(1)
    sorting = load_sorting(folder)
    shape = sorting.architecture.shape
    half = dataclasses.replace(shape, hidden_size=384, intermediate_size=1024)
    build_student(sorting, dataclasses.replace(half, num_hidden_layers=1, hidden_size=64, intermediate_size=64), dtype="float32", device="cpu")  # imports
    base = _pss_bytes()
    _wait_for_the_others({})
    with _Peak() as peak:
        student = build_student(sorting, half, dtype="float32", device="cpu")
    teacher = load_model(folder, dtype="float32", device="cpu")
    with torch.inference_mode():
        for model in (teacher, student):
            model(torch.zeros(1, 8, dtype=torch.int64))
    _wait_for_the_others({})
    report = {
        "base_pss_bytes": base,
        "loaded_pss_bytes": _pss_bytes(),
        "file_bytes": _pss_bytes(file=folder / WEIGHTS_FILE),
        "peak_bytes": peak.bytes,
        "student_bytes": sum(parameter.numel() * parameter.element_size() for parameter in student.parameters()),
    }
    _wait_for_the_others(report)


def _wait_for_the_others(report: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()


def _pss_bytes(file: Path | None = None) -> int:
    """Proportional set size of this process, or of its mappings of one file."""
    if file is None:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if not line.split()[0].endswith(":"):  # the header of a mapping
            inside = line.endswith(str(file))
        elif inside and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total


class _Peak:
    """Most memory of its own (not of files) that the process gained while the context lasted, sampled."""

    def __enter__(self) -> _Peak:
        self.bytes = 0
        self._start, self._done = self._own(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.is_set():
            self.bytes = max(self.bytes, self._own() - self._start)
            time.sleep(0.0002)
        self.bytes = max(self.bytes, self._own() - self._start)

    @staticmethod
    def _own() -> int:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="utf-8").split()
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
