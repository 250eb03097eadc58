"""Tokens per second of our training loop against the loop that a user writes with the transformers Trainer.

Both distil the same student from the same teacher on the same packed batches with the same mathematics: forward KL on whole logits, AdamW (fused, as
is the Trainer's default), gradients clipped at 1, a constant rate. That they agree is checked first: the weights after a few steps are the same.
Ours runs as a search runs it, from exact signals that were stored once (they are not in the time: every trial of a search reads them), and with the
teacher in the loop as the Trainer has it. All take turns; the number is the median of the ratios of their median steps. Each has the number of threads
that suits it best.
Random weights, since speed does not depend on them; needs no reference material.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from nas.architecture import read_architecture
from nas.compress.data_order import DataOrder
from nas.compress.distillation import distil
from nas.compress.objective import Objective, TeacherLogits
from nas.compress.signals import StoredSignals, StoredTeacher, build_signals
from nas.compress.train_plan import TrainPlan
from nas.search.prepare import random_model

GOAL = 1.3
SEQUENCE_LENGTH = 128
LEARNING_RATE, BETA1 = 1e-3, 0.9
REPEATS = 5
_COMMON = {
    "model_type": "llama",
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
TEACHERS: dict[str, dict[str, Any]] = {
    "stories260K": {
        **_COMMON,
        "num_hidden_layers": 5,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": 512,
    },
    "tales4M": {
        **_COMMON,
        "num_hidden_layers": 8,
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "vocab_size": 4096,
    },
}
"""Configs of the reference teachers."""
HALF: dict[str, dict[str, int]] = {
    "stories260K": {"num_attention_heads": 4, "intermediate_size": 80},
    "tales4M": {"num_hidden_layers": 6, "hidden_size": 168, "intermediate_size": 320},
}
"""What a student of about half the size has of its own."""
STEPS = 12
"""Of one timed run; the first WARMUP_STEPS are not counted. A run's speed is that of its median step, so that start-up and disturbances stay out of it."""
WARMUP_STEPS = 2
MAX_APART = 1e-3
"""Distance of the two results over the distance from the start: rounding, not another recipe."""

Train = Callable[[nn.Module, nn.Module, Tensor, int], list[float]]
"""(student, teacher, blocks, batch size) -> the clock at the start of every step and at the end."""
console = Console(width=200)


def bench() -> bool:
    names = "from signals", "teacher in the loop", "Trainer"
    speeds, ratios = (f"{name}, tokens/s (threads)" for name in names), (f"{name}: ratio (min, max)" for name in names[:-1])
    table = Table("student, batch x tokens", *speeds, *ratios, "goal", box=None)
    threads, agree = torch.get_num_threads(), True
    for name in TEACHERS:
        teacher, student = _models(name)
        agree = _check_same_mathematics(name, teacher, student) and agree
        for batch_size in (4, 16):
            blocks_NT = _blocks(name, num_blocks=STEPS * batch_size)
            table.add_row(f"half of {name}, {batch_size} x {SEQUENCE_LENGTH}", *_compare(student, teacher, blocks_NT, batch_size), f">= {GOAL}")
    torch.set_num_threads(threads)
    console.print(table)
    return agree


def _compare(student: nn.Module, teacher: nn.Module, blocks_NT: Tensor, batch_size: int) -> list[str]:
    """Cells of the table: tokens per second of the three, and the ratios of ours to the Trainer's."""

    def speed(train: Train, threads: int) -> float:
        torch.set_num_threads(threads)
        clock = train(copy.deepcopy(student), teacher, blocks_NT, batch_size)
        return batch_size * SEQUENCE_LENGTH / median(end - start for start, end in pairwise(clock[WARMUP_STEPS:]))

    choices = (1, 2) if len(os.sched_getaffinity(0)) > 1 else (1,)
    best = {train: max(choices, key=lambda threads: speed(train, threads)) for train in (train_from_signals, train_ours, train_with_trainer)}
    rounds = [[speed(train, threads) for train, threads in best.items()] for _ in range(REPEATS)]
    speeds = [f"{median(found[index] for found in rounds):,.0f} ({threads})" for index, threads in enumerate(best.values())]
    ratios = [sorted(found[index] / found[-1] for found in rounds) for index in range(len(best) - 1)]
    return speeds + [f"{median(found):.2f} ({found[0]:.2f}, {found[-1]:.2f})" for found in ratios]


def _check_same_mathematics(name: str, teacher: nn.Module, student: nn.Module) -> bool:
    """Both loops leave the same weights after three steps."""
    blocks_NT = _blocks(name, num_blocks=12)
    ours, trainer = copy.deepcopy(student), copy.deepcopy(student)
    train_ours(ours, teacher, blocks_NT, 4)
    train_with_trainer(trainer, teacher, blocks_NT, 4)
    start, end, other = (nn.utils.parameters_to_vector(model.parameters()).detach() for model in (student, ours, trainer))
    apart, moved = float((end - other).norm() / (end - start).norm()), float((end - start).abs().max())
    same = apart < MAX_APART and moved > LEARNING_RATE
    console.print(
        f"{name}: after three steps the weights of the two loops are {apart:.1e} of their way apart: {'same' if same else 'NOT the same'} mathematics"
    )
    return same


def train_ours(student: nn.Module, teacher: nn.Module, blocks_NT: Tensor, batch_size: int) -> list[float]:
    return _distil(student, TeacherLogits(teacher), blocks_NT, batch_size)


def train_from_signals(student: nn.Module, teacher: nn.Module, blocks_NT: Tensor, batch_size: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        build_signals(teacher, blocks_NT=blocks_NT, part="train", kind="exact", top_k=512, folder=Path(folder), teacher_digest="", batch_size=batch_size)
        return _distil(student, TeacherLogits(StoredTeacher(StoredSignals(Path(folder), part="train"))), blocks_NT, batch_size)


def _distil(student: nn.Module, objective: Objective, blocks_NT: Tensor, batch_size: int) -> list[float]:
    clock: list[float] = []

    def tick() -> bool:
        clock.append(time.perf_counter())
        return False

    plan = TrainPlan(tokens=blocks_NT.numel(), learning_rate=LEARNING_RATE, batch_size=batch_size, beta1=BETA1)
    distil(student, objective=objective, blocks_NT=blocks_NT, plan=plan, should_stop=tick)
    return clock


def train_with_trainer(student: nn.Module, teacher: nn.Module, blocks_NT: Tensor, batch_size: int) -> list[float]:
    """The same batches in the same order, without padding; nothing is saved, evaluated or reported."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            adam_beta1=BETA1,
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        rows = [{"input_ids": row} for row in data_order(blocks_NT)]
        trainer = _DistillationTrainer(model=student, teacher=teacher, args=arguments, train_dataset=rows)
        clock = _Clock()
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.times


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **arguments: Any) -> None:
        self.times.append(time.perf_counter())


class _DistillationTrainer(Trainer):
    """What one writes: the teacher's logits, F.kl_div; the rest is the Trainer's."""

    def __init__(self, *, teacher: nn.Module, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = teacher.eval()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        with torch.no_grad():
            teacher_BTV = self.teacher(**inputs, use_cache=False).logits
        outputs = model(**inputs, use_cache=False)
        student_NV = torch.log_softmax(outputs.logits.flatten(0, 1), dim=-1)
        teacher_NV = torch.log_softmax(teacher_BTV.flatten(0, 1), dim=-1)
        loss = nn.functional.kl_div(student_NV, teacher_NV, log_target=True, reduction="batchmean")
        return (loss, outputs) if return_outputs else loss


def data_order(blocks_NT: Tensor) -> Tensor:
    """The blocks as `distil` takes them in its first epoch."""
    return blocks_NT[DataOrder(len(blocks_NT), batch_size=len(blocks_NT), seed=0).rows(0)].long()


def _models(name: str) -> tuple[nn.Module, nn.Module]:
    """Teacher and student."""
    config = TEACHERS[name]
    architecture = read_architecture(config)
    teacher = random_model(architecture, config=config, seed=0, device="cpu").requires_grad_(False)
    return teacher, random_model(architecture, config={**config, **HALF[name]}, seed=1, device="cpu")


def _blocks(name: str, *, num_blocks: int) -> Tensor:
    return torch.randint(0, TEACHERS[name]["vocab_size"], (num_blocks, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
