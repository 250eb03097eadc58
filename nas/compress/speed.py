"""How fast this worker trains and scores: a probe of some seconds on random models of a few sizes, so that a search can be priced before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nas.architecture import read_architecture
from nas.compress.distillation import distil
from nas.compress.held_out import evaluate_kl
from nas.compress.objective import NextToken
from nas.compress.train_plan import TrainPlan
from nas.cost import flops_per_token

HIDDEN_SIZES = {"cpu": (64, 192, 512), "cuda": (256, 1024, 2048)}
"""Small models are slow for their arithmetic; an estimate interpolates between these."""
_LAYERS, _VOCAB, _HEAD_DIM = 4, 4096, 32
_BATCH = {"cpu": (4, 128), "cuda": (16, 512)}
"""(Sequences of a step, tokens of each.)"""
_SECONDS = 0.6
"""At least so long, and at least two steps, is measured of each kind and size, after one that warms up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedPoint:
    """One size of model on one worker."""

    flops_per_token: int
    """Of a forward pass (nas.cost)."""
    trained_per_second: float
    """Tokens through forward pass, backward pass and optimiser."""
    scored_per_second: float
    """Tokens through a forward pass with its loss."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def probe_speed(*, device: str, dtype: Literal["float32", "bfloat16"]) -> list[SpeedPoint]:
    """This process's speed, smallest model first. It trains with the loop that trains students.

    Args:
        device: cpu or cuda. dtype: of the arithmetic, as `distillation.dtype` says it.
    """
    return [_probe(hidden_size, device=device, dtype=dtype) for hidden_size in HIDDEN_SIZES[device]]


def _probe(hidden_size: int, *, device: str, dtype: Literal["float32", "bfloat16"]) -> SpeedPoint:
    batch_size, sequence_length = _BATCH[device]
    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=_LAYERS,
        num_attention_heads=hidden_size // _HEAD_DIM,
        num_key_value_heads=max(1, hidden_size // _HEAD_DIM // 2),
        head_dim=_HEAD_DIM,
        max_position_embeddings=sequence_length,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(device)
        blocks_NT = torch.randint(_VOCAB, (batch_size, sequence_length), dtype=torch.int32)
    step = batch_size * sequence_length

    def train(steps: int) -> None:
        plan = TrainPlan(tokens=steps * step, learning_rate=1e-4, batch_size=batch_size, seed=0, dtype=dtype)
        distil(model, objective=NextToken(), blocks_NT=blocks_NT, plan=plan)

    def score(steps: int) -> None:
        for _ in range(steps):
            evaluate_kl(model, teacher=None, blocks_NT=blocks_NT, batch_size=batch_size)

    architecture = read_architecture(config.to_dict())
    return SpeedPoint(
        flops_per_token=flops_per_token(architecture, architecture.shape, context_length=sequence_length // 2),
        trained_per_second=step * _per_second(train),
        scored_per_second=step * _per_second(score),
    )


def _per_second(run: Callable[[int], None]) -> float:
    """Steps per second, once it runs for long enough to tell."""
    run(1)
    steps, seconds = 1, 0.0
    while seconds < _SECONDS:
        steps *= 2
        started = time.perf_counter()
        run(steps)
        seconds = time.perf_counter() - started
    return steps / seconds
