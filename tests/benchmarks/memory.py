"""Is the memory estimate right? Measured peaks of real training steps, each in a process of its own, beside `training_memory`.

    python -m tests.benchmarks.memory

The measured peak is the process's largest resident set less what it held before the models were built (libraries, thread pools and
the allocator's start, warmed up by a tiny step).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nas.architecture import read_architecture
from nas.compress.distillation import distil
from nas.compress.objective import NextToken, TeacherLogits
from nas.compress.train_plan import TrainPlan
from nas.memory import Moments, TeacherMemory, Training, training_memory
from nas.search.prepare import random_model

BASE = {
    "model_type": "llama",
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training step to be measured."""

    name: str
    student: dict[str, Any]
    teacher: dict[str, Any] | None
    sequence_length: int = 256
    batch_size: int = 8
    micro_batch_size: int = 8
    checkpoint_activations: bool = False
    moments: Moments = "float32"


HALF = {**BASE, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "head_dim": 32}
CASES = (
    Case(
        name="weights dominate", student={**BASE, "hidden_size": 768, "intermediate_size": 2304, "head_dim": 96}, teacher=None, batch_size=2, micro_batch_size=2
    ),
    Case(name="activations dominate", student=HALF, teacher=None, batch_size=32, micro_batch_size=32),
    Case(name="with a teacher", student=HALF, teacher=BASE),
    Case(name="accumulation", student=BASE, teacher=BASE, batch_size=8, micro_batch_size=2),
    Case(
        name="large vocabulary",
        student={**HALF, "vocab_size": 65536, "num_hidden_layers": 4},
        teacher={**HALF, "vocab_size": 65536, "num_hidden_layers": 2},
        batch_size=4,
        micro_batch_size=4,
    ),
    Case(name="checkpointing", student=HALF, teacher=None, batch_size=32, micro_batch_size=32, checkpoint_activations=True),
    Case(name="bfloat16 moments", student=BASE, teacher=None, batch_size=2, micro_batch_size=2, moments="bfloat16"),
)


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
    else:
        bench()


def bench() -> bool:
    table = Table(title="Peak memory of a training step, float32, CPU, one thread")
    for column in ("case", "phase", "estimate MB", "measured MB", "estimate / measured"):
        table.add_column(column)
    for case in CASES:
        done = subprocess.run([sys.executable, "-m", "tests.benchmarks.memory", json.dumps(asdict(case))], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["estimate"] / found["measured"]
        table.add_row(case.name, found["phase"], f"{found['estimate'] / 1e6:,.0f}", f"{found['measured'] / 1e6:,.0f}", f"{ratio:.2f}")
    Console(width=120).print(table)
    return True


def measure(case: Case) -> dict[str, Any]:
    """Estimate and measured peak, bytes."""
    torch.set_num_threads(1)
    _train(Case(name="warm-up", student={**HALF, "num_hidden_layers": 1, "vocab_size": 64}, teacher=None, batch_size=1, micro_batch_size=1))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    _train(case)
    architecture = read_architecture(case.student)
    training = Training(
        sequence_length=case.sequence_length,
        batch_size=case.batch_size,
        micro_batch_size=case.micro_batch_size,
        checkpoint_activations=case.checkpoint_activations,
        moments=case.moments,
    )
    teacher = None if case.teacher is None else TeacherMemory(architecture=read_architecture(case.teacher), dtype="float32")
    estimate = training_memory(architecture, architecture.shape, training=training, teacher=teacher)
    return {"estimate": estimate.device_bytes, "measured": _resident("VmHWM") - before, **estimate.as_dict()}


def _train(case: Case) -> None:
    student = random_model(read_architecture(case.student), config=case.student, seed=0, device="cpu")
    teacher = None
    if case.teacher is not None:
        teacher = random_model(read_architecture(case.teacher), config=case.teacher, seed=1, device="cpu").requires_grad_(False)
    blocks_NT = torch.randint(0, case.student["vocab_size"], (2 * case.batch_size, case.sequence_length))
    plan = TrainPlan(
        checkpoint_activations=case.checkpoint_activations,
        moments=case.moments,
        tokens=2 * blocks_NT[: case.batch_size].numel(),
        learning_rate=1e-3,
        batch_size=case.batch_size,
        micro_batch_size=case.micro_batch_size,
    )
    with tempfile.TemporaryDirectory() as folder:
        distil(student, objective=NextToken() if teacher is None else TeacherLogits(teacher), blocks_NT=blocks_NT, plan=plan, checkpoint=Path(folder) / "run")


def _resident(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(status[field].split()[0]) * 1024


if __name__ == "__main__":
    main()
