"""family + Shape -> parameters, bytes and FLOPs: closed form, exact, no torch.

`tests/test_cost.py` holds the count equal to `numel` of the saved file, tied embeddings once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from nas.architecture import Architecture
from nas.errors import InvalidSpec, Problem
from nas.families import Axis
from nas.shape import Shape

SignalKind = Literal["exact", "top_k"]
"""Teacher signals: final hidden states, or the largest log-probabilities (compress/signals.py)."""


COSTS = ("parameters", "memory_bytes", "flops_per_token")
"""The costs of every shape that are known before anything is run, by the names of `RungResult.costs`."""

ELEMENT_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float8": 1}
"""Bytes of one element by dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Parameters of one model, as the safetensors file holds them."""

    total: int
    embedding: int
    """Input table and, where it is not tied, the output head."""
    active: int
    """Those that one token passes through: of the experts only as many as it is sent to. Without experts the total."""

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding


@lru_cache(maxsize=4096)
def count_parameters(architecture: Architecture, shape: Shape) -> ParameterCount:
    """Parameters of `architecture` cut to `shape`; tied embeddings are counted once. Remembered: pricing a search asks some forty times for a dozen shapes."""
    total, embedding, active = _sum_parameters(architecture, sizes=architecture.sizes(shape), num_hidden_layers=shape.num_hidden_layers)
    return ParameterCount(total=total, embedding=embedding, active=active)


def _sum_parameters(architecture: Architecture, *, sizes: Mapping[Axis, Any], num_hidden_layers: Any) -> tuple[Any, Any, Any]:
    """Total, embedding and active parameters for axis lengths that are integers or integer arrays of one shape (a whole space at once)."""
    total: Any = 0
    embedding: Any = 0
    idle: Any = 0
    for weight in architecture.weights:
        layers = num_hidden_layers if weight.per_layer else 1
        numel = weight.numel(sizes) * layers
        total = total + numel * (sizes[Axis.EXPERT] if weight.per_expert else 1)
        embedding = embedding + (numel if weight.in_embedding else 0)
        if weight.per_expert and architecture.num_experts_per_tok is not None:
            idle = idle + numel * (sizes[Axis.EXPERT] - architecture.num_experts_per_tok)
    return total, embedding, total - idle


def weight_bytes(architecture: Architecture, shape: Shape, *, bytes_per_element: int) -> int:
    """Bytes of the weights in memory at one element size (2 for bf16, 4 for float32)."""
    return count_parameters(architecture, shape).total * bytes_per_element


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The load under which memory and FLOPs are counted."""

    batch_size: int
    """Sequences at once."""
    context_length: int
    """Tokens of each sequence in the KV cache."""
    weight_bytes: int
    """Of one element of the weights."""
    cache_bytes: int
    """Of one element of the KV cache."""


def count_costs(architecture: Architecture, shape: Shape, *, workload: Workload) -> dict[str, int]:
    """What a model of `shape` costs, by the names of `COSTS`."""
    return sum_costs(architecture, sizes=architecture.sizes(shape), num_hidden_layers=shape.num_hidden_layers, workload=workload)


def flops_per_token(architecture: Architecture, shape: Shape, *, context_length: int) -> int:
    """Forward FLOPs for one token at the end of a context (`sum_costs`)."""
    return count_costs(architecture, shape, workload=Workload(batch_size=1, context_length=context_length, weight_bytes=1, cache_bytes=1))["flops_per_token"]


def sum_costs(architecture: Architecture, *, sizes: Mapping[Axis, Any], num_hidden_layers: Any, workload: Workload) -> dict[str, Any]:
    """The costs for axis lengths that are integers or integer arrays of one shape; each is linear in the MLP's width.

    memory_bytes: weights, and keys and values of every layer for batch x context tokens. Activations and what an engine reserves are not in it;
        layers that attend to a sliding window are counted in full, so for them it is an upper bound.
    flops_per_token: forward, for one token at the end of the context: 2 per multiplied weight (of its own experts only), plus attention over the
        context, scores and the weighted sum, 2 x 2 x context x query width per layer. The input table is a look-up and costs nothing; a tied head
        multiplies it once. Source: the usual 2N estimate (Kaplan et al., arXiv 2001.08361, 2.1) with the head counted and the look-up not.
    """
    total, embedding, active = _sum_parameters(architecture, sizes=sizes, num_hidden_layers=num_hidden_layers)
    cached_tokens = workload.batch_size * workload.context_length
    cache = 2 * num_hidden_layers * sizes[Axis.KEY_VALUE] * workload.cache_bytes * cached_tokens
    head = sizes[Axis.VOCAB] * sizes[Axis.HIDDEN]
    attention = 4 * workload.context_length * sizes[Axis.QUERY] * num_hidden_layers
    return {
        "parameters": total,
        "non_embedding_parameters": total - embedding,
        "memory_bytes": total * workload.weight_bytes + cache,
        "flops_per_token": 2 * (active - embedding + head) + attention,
    }


def signal_bytes_per_token(kind: SignalKind, *, hidden_size: int, bytes_per_element: int, top_k: int) -> int:
    """Bytes on disk of the teacher signals of one token; `exact` has the teacher's head besides, once.

    Args:
        bytes_per_element: of the teacher's arithmetic: 2 for bf16, 4 for float32.
        top_k: kept log-probabilities (float16) and their tokens (int32), and the log of the remaining mass (float32).
    """
    return hidden_size * bytes_per_element if kind == "exact" else top_k * (2 + 4) + 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalChoice:
    """Which teacher signals are kept, and the numbers behind it."""

    kind: SignalKind | None
    """None: the teacher runs beside every student."""
    bytes: int
    """On disk, of training and validation blocks; 0 without signals."""
    reason: str
    """One sentence with the numbers."""


def choose_signals(
    wanted: Literal["auto", "exact", "top_k", "off"],
    *,
    train_tokens: int,
    validation_tokens: int,
    hidden_size: int,
    vocab_size: int,
    bytes_per_element: int,
    top_k: int,
    max_bytes: int,
    free_bytes: int,
) -> SignalChoice:
    """The kind that is asked for; for `auto` the first that fits of exact (the same student as with the teacher in the loop) and top_k.

    Validation blocks are exact whatever the kind: held-out KL is no estimate.

    Args:
        train_tokens: of the blocks, not of the run: epochs read them again.
        max_bytes: the budget, free_bytes: what the disk has.
    Raises:
        InvalidSpec: the kind that is asked for does not fit the budget or the disk.
    """
    if wanted == "off":
        return SignalChoice(kind=None, bytes=0, reason="distillation.signals is off: the teacher runs beside every student")
    sizes = {}
    room, limit = min((max_bytes, "distillation.max_signal_bytes"), (free_bytes, "free on disk"))
    kinds: tuple[SignalKind, ...] = ("exact", "top_k") if wanted == "auto" else (wanted,)
    exact = signal_bytes_per_token("exact", hidden_size=hidden_size, bytes_per_element=bytes_per_element, top_k=top_k)
    for kind in kinds:
        per_token = signal_bytes_per_token(kind, hidden_size=hidden_size, bytes_per_element=bytes_per_element, top_k=min(top_k, vocab_size))
        sizes[kind] = train_tokens * per_token + validation_tokens * exact + vocab_size * exact
        if sizes[kind] <= room:
            reason = f"{kind}: {sizes[kind]:,} bytes for {train_tokens:,} training tokens at {per_token:,} bytes each; {limit} is {room:,}"
            return SignalChoice(kind=kind, bytes=sizes[kind], reason=reason)
    needs = ", ".join(f"{kind} {size:,}" for kind, size in sizes.items())
    if wanted == "auto":
        return SignalChoice(kind=None, bytes=0, reason=f"{limit} is {room:,} bytes, less than {needs}: the teacher runs beside every student")
    raise InvalidSpec(Problem(field="distillation.signals", expected=f"{needs} bytes for {train_tokens:,} training tokens", got=f"{room:,} ({limit})"))
