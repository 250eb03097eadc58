"""What is compared: shapes of the reference teachers, and methods of beginning and training a student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.compress.objective import NextToken, TeacherLogits
from nas.compress.reconstruction import reconstruct_student, split_calibration
from nas.compress.slicing import build_student
from nas.compress.train_plan import TrainPlan
from nas.search.prepare import random_model
from nas.shape import Shape
from tests.benchmarks.learning import Curve, Run, trace
from tests.benchmarks.subjects import Choices, Subject, load_subject

DECAY_SHARE = 0.3
"""Of every run's tokens; LOG.md, learning rate, batch and decay of a short run."""


def _shape(layers: int, hidden: int, mlp: int, heads: int, groups: int, head_dim: int) -> Shape:
    return Shape(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=groups, head_dim=head_dim)


SHAPES: dict[str, dict[str, Shape]] = {
    "stories260K": {
        "mlp75": _shape(5, 64, 104, 8, 4, 8),
        "mlp50": _shape(5, 64, 36, 8, 4, 8),
        "heads84": _shape(5, 64, 172, 2, 2, 8),
        "hidden75": _shape(5, 48, 172, 8, 4, 8),
        "hidden50": _shape(5, 32, 172, 8, 4, 8),
        "depth65": _shape(3, 64, 172, 8, 4, 8),
        "depth48": _shape(2, 64, 172, 8, 4, 8),
        "mixed75": _shape(5, 56, 136, 8, 4, 8),
        "mixed51": _shape(4, 56, 112, 4, 4, 8),
        "mixed30": _shape(3, 48, 80, 4, 4, 8),
        "winner58": _shape(5, 64, 80, 4, 4, 8),
    },
    "tales4M": {
        "mlp75": _shape(8, 192, 336, 6, 3, 32),
        "hidden50": _shape(8, 96, 576, 6, 3, 32),
        "depth59": _shape(4, 192, 576, 6, 3, 32),
        "mixed52": _shape(6, 168, 320, 6, 3, 32),
        "mixed29": _shape(5, 120, 240, 6, 3, 32),
    },
}
"""Teacher -> name -> shape: what was cut, and the share of the teacher's parameters in percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a student is begun and trained."""

    choices: Choices
    build: Callable[[Subject, Shape, int], nn.Module]
    """The student before training, from (subject, shape, seed)."""
    distilled: bool = True
    """Else it learns the next token, without a teacher."""
    plan: Mapping[str, Any] = field(default_factory=lambda: {"warmup_tokens": 2_000, "beta1": 0.9})
    """Of the TrainPlan, beside length, rate, batch and seed."""


def _sliced(subject: Subject, shape: Shape, seed: int) -> nn.Module:
    return build_student(subject.sorting, shape, dtype="float32", device="cpu")


def _random(initializer_range: float) -> Callable[[Subject, Shape, int], nn.Module]:
    def build(subject: Subject, shape: Shape, seed: int) -> nn.Module:
        config = {**subject.sorting.config, **shape.as_dict(), "initializer_range": initializer_range}
        return random_model(subject.sorting.architecture, config=config, seed=seed, device="cpu")

    return build


def _reconstructed(subject: Subject, shape: Shape, seed: int) -> nn.Module:
    held_out_NT = split_calibration(subject.calibration_NT)[1]
    student, _ = reconstruct_student(subject.sorting, shape, moments=subject.moments, held_out_NT=held_out_NT, dtype="float32", device="cpu", batch_size=16)
    return student


_PLAIN = {"warmup_tokens": 2_000, "beta1": 0.9}
METHODS: dict[str, Method] = {
    "ours": Method(choices="ours", build=_reconstructed, plan={"rate_follows_loss": True}),
    "plain": Method(choices="plain", build=_sliced, plan=_PLAIN),
    "minitron": Method(choices="minitron", build=_sliced, plan=_PLAIN),
    "scratch": Method(choices="ours", build=_random(0.02), distilled=False, plan={"warmup_tokens": 50_000, "beta1": 0.9}),
    "scratch-wide": Method(choices="ours", build=_random(0.1), distilled=False, plan={"warmup_tokens": 50_000, "beta1": 0.9}),
}
"""ours: reconstructed, and trained at a rate that follows the loss (the learning rate is that at one nat per token). plain: sliced, with our importance and
depth. minitron: sliced, with the published importance and depth. Both: forward KL, AdamW.
scratch: the shape with random weights of the family's usual spread, and of a wider one, on the text alone."""


def compute(run: Run, *, tokens: list[int], folder: Path, cache: Path) -> Curve:
    """The curve of one run, in this process on one thread; `folder` keeps it."""
    torch.set_num_threads(1)
    method = METHODS[run.method]
    subject = load_subject(run.teacher, choices=method.choices, train_tokens=run.train_tokens, cache=cache)

    def plan(number: int) -> TrainPlan:
        return TrainPlan(
            tokens=number,
            decay_tokens=int(DECAY_SHARE * number),
            learning_rate=run.learning_rate,
            batch_size=run.batch_size,
            seed=run.seed,
            **method.plan,
        )

    return trace(
        run,
        tokens=tokens,
        student=lambda: method.build(subject, SHAPES[run.teacher][run.shape], run.seed),
        objective=TeacherLogits(subject.outputs) if method.distilled else NextToken(),
        plan=plan,
        train_NT=subject.train_NT,
        held_out_NT=subject.held_out_NT,
        held_out=subject.held_out_outputs,
        folder=folder,
    )
