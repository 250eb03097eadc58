"""How long, how fast and in which batches a student is trained: plain numbers, and the learning rate of every step.

A run of N tokens is a *trunk* at a constant learning rate (after a short warm-up), or at one that follows the loss, and then a *decay branch*: the
last `decay_tokens`, over which the rate falls to zero. All counts are whole steps of `batch_size` blocks: steps = ceil(tokens / (batch_size * T)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from nas.memory import Moments

_AUTOMATIC_RATE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """How one student is trained."""

    tokens: int
    """Seen by the student at the end, trunk and decay branch together; rounded up to whole steps."""
    learning_rate: float
    """Of the trunk; with `rate_follows_loss`, where the loss is one nat per token."""
    rate_follows_loss: bool = False
    """The trunk's rate is `learning_rate` times the fourth root of the running loss. For forward KL alone, which is zero where nothing is left to learn."""
    batch_size: int
    """Blocks per step."""
    warmup_tokens: int = 0
    """Linear from zero; counted from the trunk's start, so it is the same for every rung."""
    decay_tokens: int = 0
    """The last tokens of `tokens`, over which the rate falls linearly to zero."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices of the layers (muon.py), at three times the rate; AdamW for all else."""
    weight_decay: float = 0.0
    """Of matrices only, not of norms and biases."""
    beta1: float = 0.6
    """Also Muon's momentum. Below AdamW's usual 0.9: in short runs the gradients of ten steps ago belong to other weights (LOG.md)."""
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    seed: int = 0
    """Of the data order, and of nothing else."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic, where the device has instructions for it; weights and optimizer stay float32. On a CPU 1.6 times as fast at a hidden size of
    192, with the same result, and slower at 64 (LOG.md)."""
    micro_batch_size: int | None = None
    """Blocks per forward pass; None: batch_size. Halved when CUDA runs out of memory."""
    checkpoint_activations: bool = False
    """Keep each layer's input only and run the layer again on the way back: the same bits, a third more arithmetic."""
    moments: Moments = "float32"
    """Where the optimizer's state lies (moments.py)."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if not 0 <= self.decay_tokens <= self.tokens:
            raise ValueError(f"decay_tokens: expected 0 to tokens={self.tokens}, got {self.decay_tokens}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size: expected at least 1, got {self.micro_batch_size}")

    def steps(self, sequence_length: int) -> int:
        return math.ceil(self.tokens / (self.batch_size * sequence_length))

    def trunk_steps(self, sequence_length: int) -> int:
        """Steps before the decay branch."""
        return self.steps(sequence_length) - math.ceil(self.decay_tokens / (self.batch_size * sequence_length))

    def warmup_steps(self, sequence_length: int) -> int:
        return math.ceil(self.warmup_tokens / (self.batch_size * sequence_length))

    def rate(self, step: int, *, sequence_length: int) -> float:
        """Learning rate of the step with this index (from 0), where it does not follow the loss."""
        total, trunk = self.steps(sequence_length), self.trunk_steps(sequence_length)
        rising = min(1.0, (step + 1) / (self.warmup_steps(sequence_length) + 1))
        falling = 1.0 if step < trunk else (total - step) / (total - trunk + 1)
        return self.learning_rate * rising * falling


def trunk_rate(learning_rate: float | None, *, teacher_hidden_size: int) -> tuple[float, bool]:
    """A plan's (`learning_rate`, `rate_follows_loss`) from what a user said: a constant rate, or None for the automatic one.

    The automatic rate is 0.02 / sqrt(hidden size) times the fourth root of the running KL in nats. The further a student is from its teacher, the
    higher its best rate; the root would follow the distance of the weights (KL is quadratic in it), but falls too low near the teacher, where
    batches agree less. Trained matrices have entries of about 1 / sqrt(hidden size), so a step is the same share of them at every width.
    Measured on deep and shallow cuts of teachers 64, 96 and 192 wide, 12,500 to 200,000 tokens (LOG.md). At 0.3 nats and 4096 to 6144 channels it
    gives 2.3e-4 to 1.9e-4, where Minitron has 1e-4 to 2e-4 with far larger batches (arXiv 2407.14679, 2408.11796).
    """
    if learning_rate is not None:
        return learning_rate, False
    return _AUTOMATIC_RATE / math.sqrt(teacher_hidden_size), True


class TrainSettings(Protocol):
    """What a user says of the training: a search's `distillation`, and the recipe of a full run."""

    @property
    def learning_rate(self) -> float | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def warmup_tokens(self) -> int: ...
    @property
    def decay_share(self) -> float: ...
    @property
    def optimizer(self) -> Literal["adamw", "muon"]: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def dtype(self) -> Literal["float32", "bfloat16"]: ...
    @property
    def micro_batch_size(self) -> int | None: ...


def make_plan(settings: TrainSettings, *, tokens: int, seed: int, teacher_hidden_size: int) -> TrainPlan:
    """The plan of a run of that many tokens, before it is fitted to a device: a trunk, and a decay branch over the last share of its tokens."""
    learning_rate, rate_follows_loss = trunk_rate(settings.learning_rate, teacher_hidden_size=teacher_hidden_size)
    return TrainPlan(
        tokens=tokens,
        learning_rate=learning_rate,
        rate_follows_loss=rate_follows_loss,
        batch_size=settings.batch_size,
        warmup_tokens=settings.warmup_tokens,
        decay_tokens=int(tokens * settings.decay_share),
        optimizer=settings.optimizer,
        weight_decay=settings.weight_decay,
        seed=seed,
        dtype=settings.dtype,
        micro_batch_size=settings.micro_batch_size,
    )
