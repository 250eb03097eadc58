"""What is compared: shapes of the reference teachers, and methods of beginning and training a student."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.compress.hidden_states import StreamMap, TeacherStates
from nas.compress.objective import NextToken, Objective, TeacherLogits
from nas.compress.reconstruction import NormGains, reconstruct_student, split_calibration, stream_map
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Start:
    """A student before training, and what its residual stream is of the sorted teacher's."""

    student: nn.Module
    stream: StreamMap


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a student is begun and trained."""

    choices: Choices
    start: Callable[[Subject, Shape, int], Start]
    """From (subject, shape, seed)."""
    objective: Callable[[Subject, Shape, Start], Objective]
    plan: Mapping[str, Any] = field(default_factory=dict)
    """Of the TrainPlan, beside length, rate, batch and seed."""
    recipes: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Teacher -> (learning rate, blocks a step), where it is not the best of the grid's (campaign.py)."""

    @property
    def distilled(self) -> bool:
        return self.objective is not _next_token


def _sliced(subject: Subject, shape: Shape, seed: int) -> Start:
    return Start(student=build_student(subject.sorting, shape, dtype="float32", device="cpu"), stream=stream_map(subject.sorting, shape, moments=None))


def _reconstructed(gains: NormGains) -> Callable[[Subject, Shape, int], Start]:
    def start(subject: Subject, shape: Shape, seed: int) -> Start:
        held_out_NT = split_calibration(subject.calibration_NT)[1]
        student, result = reconstruct_student(
            subject.sorting, shape, moments=subject.moments, held_out_NT=held_out_NT, dtype="float32", device="cpu", batch_size=16, gains=gains
        )
        return Start(student=student, stream=stream_map(subject.sorting, shape, moments=subject.moments if result.rotated else None))

    return start


def _random(initializer_range: float) -> Callable[[Subject, Shape, int], Start]:
    def start(subject: Subject, shape: Shape, seed: int) -> Start:
        config = {**subject.sorting.config, **shape.as_dict(), "initializer_range": initializer_range}
        student = random_model(subject.sorting.architecture, config=config, seed=seed, device="cpu")
        return Start(student=student, stream=stream_map(subject.sorting, shape, moments=None))

    return start


def _logits(subject: Subject, shape: Shape, start: Start) -> Objective:
    return TeacherLogits(subject.outputs)


def _final_state(subject: Subject, shape: Shape, start: Start) -> Objective:
    return TeacherStates(subject.outputs, onto=start.stream)


def _all_states(subject: Subject, shape: Shape, start: Start) -> Objective:
    return TeacherStates(subject.teacher, onto=start.stream, layers=subject.sorting.layers[shape.num_hidden_layers])


def _next_token(subject: Subject, shape: Shape, start: Start) -> Objective:
    return NextToken()


_PLAIN = {"warmup_tokens": 2_000, "beta1": 0.9}
_MUON = {"rate_follows_loss": True, "optimizer": "muon"}
_SCRATCH = {"warmup_tokens": 50_000, "beta1": 0.9}
METHODS: dict[str, Method] = {
    "ours": Method(choices="ours", start=_reconstructed("energy"), objective=_final_state, plan={"rate_follows_loss": True}),
    "ours-all": Method(choices="ours", start=_reconstructed("energy"), objective=_all_states, plan=_MUON),
    "ours-gains": Method(choices="ours", start=_reconstructed("teacher"), objective=_all_states, plan=_MUON, recipes={"stories260K": (0.0025, 4)}),
    "ours-logits": Method(choices="ours", start=_reconstructed("energy"), objective=_logits, plan={"rate_follows_loss": True}),
    "plain": Method(choices="plain", start=_sliced, objective=_logits, plan=_PLAIN),
    "plain-slow": Method(choices="plain", start=_sliced, objective=_logits, plan=_PLAIN, recipes={"stories260K": (0.0005, 1)}),
    "plain-bridged": Method(choices="ours", start=_sliced, objective=_logits, plan=_PLAIN),
    "minitron": Method(choices="minitron", start=_sliced, objective=_logits, plan=_PLAIN),
    "scratch": Method(choices="ours", start=_random(0.02), objective=_next_token, plan=_SCRATCH),
    "scratch-wide": Method(choices="ours", start=_random(0.1), objective=_next_token, plan=_SCRATCH),
}
"""ours: the defaults: reconstructed, forward KL and the final hidden state, AdamW at a rate that follows the loss (the learning rate is that at one nat per
token). ours-all: the streams behind all layers and Muon. ours-gains: norms with the teacher's gains as well, and on stories260K the rate that a search takes
by itself, since a grid on two far cuts picks one that is too high for students near their teacher (LOG.md). ours-logits: reconstruction and rate alone.
plain: sliced, with our importance and the layers of the least damage; plain-slow: at half the grid's rate, which suits shapes near the teacher better;
plain-bridged: with the layers of our default. minitron: sliced, with the published
importance and depth. All three: forward KL, AdamW at a constant rate.
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

    shape = SHAPES[run.teacher][run.shape]
    start = method.start(subject, shape, run.seed)
    return trace(
        run,
        tokens=tokens,
        student=lambda: copy.deepcopy(start.student),
        objective=method.objective(subject, shape, start),
        plan=plan,
        train_NT=subject.train_NT,
        held_out_NT=subject.held_out_NT,
        held_out=subject.held_out_outputs,
        folder=folder,
    )
