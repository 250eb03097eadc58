"""family + Shape -> parameters, bytes and FLOPs: closed form, exact, no torch.

`tests/test_cost.py` holds the count equal to `numel` of the saved file, tied embeddings once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nas.families import Architecture, Axis
from nas.shape import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Parameters of one model, as the safetensors file holds them."""

    total: int
    embedding: int
    """Input table and, where it is not tied, the output head."""

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding


def count_parameters(architecture: Architecture, shape: Shape) -> ParameterCount:
    """Parameters of `architecture` cut to `shape`; tied embeddings are counted once."""
    sizes = {axis: architecture.size(axis, shape) for axis in Axis}
    total, embedding = sum_parameters(architecture, sizes=sizes, num_hidden_layers=shape.num_hidden_layers)
    return ParameterCount(total=total, embedding=embedding)


def sum_parameters(architecture: Architecture, *, sizes: Mapping[Axis, Any], num_hidden_layers: Any) -> tuple[Any, Any]:
    """Total and embedding parameters for axis lengths that are integers or integer arrays of one shape (a whole space at once)."""
    total: Any = 0
    embedding: Any = 0
    for weight in architecture.weights:
        numel: Any = 1
        for axis in weight.axes:
            numel = numel * sizes[axis]
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
    """Forward FLOPs for one token at the end of a context: 2 per multiplied weight, plus attention over the context.

    The input table is a look-up and costs nothing; a tied head multiplies it once.
    Attention: scores and the weighted sum, 2 x 2 x context x query width per layer.
    Source: the usual 2N estimate (Kaplan et al., arXiv 2001.08361, 2.1) with the head counted and the look-up not.
    """
    count = count_parameters(architecture, shape)
    head = architecture.vocab_size * shape.hidden_size
    attention = 4 * context_length * shape.num_attention_heads * shape.head_dim * shape.num_hidden_layers
    return 2 * (count.non_embedding + head) + attention
