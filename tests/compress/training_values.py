"""A tiny student, a plan for it, and ways of interrupting a run: what the tests of training share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nas.compress.distillation import Distilled, distil
from nas.compress.objective import Objective
from nas.compress.train_plan import TrainPlan

SEQUENCE_LENGTH = 16
STEP_TOKENS = 4 * SEQUENCE_LENGTH


def tiny_model(*, seed: int, hidden_size: int = 16, tied: bool = True) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=hidden_size,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():  # larger than the default of 0.02, so that the teacher has opinions
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.3)
    return model


def tiny_blocks() -> Tensor:
    """blocks_NT, random."""
    return torch.randint(40, (22, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def plan(*, steps: int = 12, decay_steps: int = 4, **changes: Any) -> TrainPlan:
    values = {"learning_rate": 3e-3, "batch_size": 4, "warmup_tokens": 2 * STEP_TOKENS, "weight_decay": 0.01}
    return TrainPlan(**{**values, "tokens": steps * STEP_TOKENS, "decay_tokens": decay_steps * STEP_TOKENS, **changes})


class Killed(BaseException):
    """The process is gone: nothing may be saved on its way out."""


def stop_at(call: int, *, by: Callable[[], bool] = lambda: True) -> Callable[[], bool]:
    """A `should_stop` that answers True, or raises, at its nth call, that is before the nth step."""
    calls = iter(range(10**9))
    return lambda: by() if next(calls) == call else False


def kill() -> bool:
    raise Killed


def weights(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_bits(found: LlamaForCausalLM, expected: LlamaForCausalLM) -> None:
    for (name, one), two in zip(weights(found).items(), weights(expected).values(), strict=True):
        assert torch.equal(one, two), name


def run(objective: Objective, blocks_NT: Tensor, train: TrainPlan, **options: Any) -> tuple[LlamaForCausalLM, Distilled]:
    student = tiny_model(seed=1)
    return student, distil(student, objective=objective, blocks_NT=blocks_NT, plan=train, **options)
