"""How fast a model answers, measured: prefill, decode per token, peak memory. Greedy decoding with the key/value cache.

It measures plain transformers on the device that the model is on; a serving engine's batching is not in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nas.errors import InvalidSpec, Problem

# Shape suffixes: B batch, T tokens.


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Medians over the repeats, with the fastest and the slowest; and what was measured where."""

    prefill_seconds: float
    prefill_seconds_range: tuple[float, float]
    decode_seconds_per_token: float
    """Of one step for the whole batch: a token of every sequence."""
    decode_seconds_per_token_range: tuple[float, float]
    peak_memory_bytes: int | None
    """Highest allocation of the device during the repeats, weights included; None on a CPU."""
    device: str
    """Name of the accelerator, or `cpu`."""
    num_threads: int
    """Of the CPU, within one operation."""
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Latency:
        ranges = {name: tuple(values[name]) for name in ("prefill_seconds_range", "decode_seconds_per_token_range")}
        return cls(**{**values, **ranges})


def measure_latency(model: nn.Module, *, prompt_tokens: int, new_tokens: int, batch_size: int, repeats: int) -> Latency:
    """Times prompts of random tokens after one warm-up run; model and random state are left as they were.

    Args:
        model: a transformers causal language model with its weights, on its device.
        prompt_tokens: length of every prompt.
        new_tokens: tokens to generate, at least 2: the prefill gives the first.
        batch_size: sequences at once.
        repeats: measured runs, at least 1.
    Raises:
        InvalidSpec: a number is too small, or prompt and new tokens exceed the model's context.
    """
    config: Any = model.config
    least = {"prompt_tokens": (prompt_tokens, 1), "new_tokens": (new_tokens, 2), "batch_size": (batch_size, 1), "repeats": (repeats, 1)}
    problems = [
        Problem(field=name, expected=f"an integer of at least {minimum}", got=str(value)) for name, (value, minimum) in least.items() if value < minimum
    ]
    if prompt_tokens + new_tokens > config.max_position_embeddings:
        expected = f"together at most the model's context of {config.max_position_embeddings}"
        problems.append(Problem(field="prompt_tokens, new_tokens", expected=expected, got=str(prompt_tokens + new_tokens)))
    if problems:
        raise InvalidSpec(*problems)
    device = next(model.parameters()).device
    on_cuda = device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    prompt_BT = torch.randint(config.vocab_size, (batch_size, prompt_tokens), generator=generator).to(device)
    was_training = model.training
    model.eval()
    try:
        _run_once(model, prompt_BT=prompt_BT, new_tokens=new_tokens)
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        runs = [_run_once(model, prompt_BT=prompt_BT, new_tokens=new_tokens) for _ in range(repeats)]
    finally:
        model.train(was_training)
    prefills, decodes = [prefill for prefill, _ in runs], [decode for _, decode in runs]
    return Latency(
        prefill_seconds=statistics.median(prefills),
        prefill_seconds_range=(min(prefills), max(prefills)),
        decode_seconds_per_token=statistics.median(decodes),
        decode_seconds_per_token_range=(min(decodes), max(decodes)),
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if on_cuda else None,
        device=torch.cuda.get_device_name(device) if on_cuda else device.type,
        num_threads=torch.get_num_threads(),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        repeats=repeats,
    )


@torch.inference_mode()
def _run_once(model: nn.Module, *, prompt_BT: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill, and of one decoding step."""
    started = _now(prompt_BT.device)
    output = model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
    token_B1 = output.logits[:, -1:].argmax(dim=-1)
    prefilled = _now(prompt_BT.device)
    for _ in range(new_tokens - 1):
        output = model(input_ids=token_B1, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        token_B1 = output.logits[:, -1:].argmax(dim=-1)
    return prefilled - started, (_now(prompt_BT.device) - prefilled) / (new_tokens - 1)


def _now(device: torch.device) -> float:
    """Seconds, once everything given to the device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
