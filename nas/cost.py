"""family + Shape -> parameters, bytes and FLOPs: closed form, exact, no torch.

`tests/test_cost.py` holds the count equal to `numel` of the saved file, tied embeddings once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nas.errors import InvalidSpec, Problem
from nas.families import Architecture, Axis
from nas.shape import Shape

SignalKind = Literal["exact", "top_k"]
"""Teacher signals: final hidden states, or the largest log-probabilities (compress/signals.py)."""


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


def count_parameters(architecture: Architecture, shape: Shape) -> ParameterCount:
    """Parameters of `architecture` cut to `shape`; tied embeddings are counted once."""
    sizes = architecture.sizes(shape)
    total, embedding = sum_parameters(architecture, sizes=sizes, num_hidden_layers=shape.num_hidden_layers)
    idle = (shape.num_experts or 0) - (architecture.num_experts_per_tok or 0)
    expert = sum(weight.numel(sizes) for weight in architecture.weights if weight.per_expert)
    return ParameterCount(total=total, embedding=embedding, active=total - idle * expert * shape.num_hidden_layers)


def sum_parameters(architecture: Architecture, *, sizes: Mapping[Axis, Any], num_hidden_layers: Any) -> tuple[Any, Any]:
    """Total and embedding parameters for axis lengths that are integers or integer arrays of one shape (a whole space at once)."""
    total: Any = 0
    embedding: Any = 0
    for weight in architecture.weights:
        numel = weight.numel(sizes) * (sizes[Axis.EXPERT] if weight.per_expert else 1)
        total = total + numel * (num_hidden_layers if weight.per_layer else 1)
        embedding = embedding + (numel if weight.in_embedding else 0)
    return total, embedding


def weight_bytes(architecture: Architecture, shape: Shape, *, bytes_per_element: int) -> int:
    """Bytes of the weights in memory at one element size (2 for bf16, 4 for float32)."""
    return count_parameters(architecture, shape).total * bytes_per_element


def kv_bytes_per_token(shape: Shape, *, bytes_per_element: int) -> int:
    """Bytes that one token adds to the KV cache: keys and values of every layer."""
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * bytes_per_element


def flops_per_token(architecture: Architecture, shape: Shape, *, context_length: int) -> int:
    """Forward FLOPs for one token at the end of a context: 2 per multiplied weight (of its own experts only), plus attention over the context.

    The input table is a look-up and costs nothing; a tied head multiplies it once.
    Attention: scores and the weighted sum, 2 x 2 x context x query width per layer.
    Source: the usual 2N estimate (Kaplan et al., arXiv 2001.08361, 2.1) with the head counted and the look-up not.
    """
    count = count_parameters(architecture, shape)
    head = architecture.vocab_size * shape.hidden_size
    attention = 4 * context_length * shape.num_attention_heads * shape.head_dim * shape.num_hidden_layers
    return 2 * (count.active - count.embedding + head) + attention


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
