"""Where a shape can be served, by rule: tensor-parallel sizes and quantization blocks. Nothing here was run; what was is in the confirm step.

Source: vLLM divides query heads, the MLP's neurons and, where there are at least as many as devices, KV heads evenly over the devices, and copies KV heads
where there are fewer; group-quantized weights need every divided input side to be whole groups (https://github.com/vllm-project/vllm/pull/57792,
https://github.com/vllm-project/vllm/issues/9913).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nas.shape import Shape

QUANTIZATION_BLOCKS = (32, 64, 128)
"""Group sizes of the usual four- and eight-bit formats."""
MAX_TENSOR_PARALLEL = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployability:
    """What the rules allow for one shape."""

    tensor_parallel_sizes: tuple[int, ...]
    """Devices over which its layers divide evenly, ascending; 1 always."""
    quantization_block_sizes: tuple[int, ...]
    """Block sizes that divide the input side of every linear layer on one device: hidden size, MLP, heads times head size."""
    quantized_tensor_parallel: dict[int, tuple[int, ...]]
    """Per such block, the tensor-parallel sizes whose shares are whole blocks still."""

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {
            **{name: list(values[name]) for name in ("tensor_parallel_sizes", "quantization_block_sizes")},
            "quantized_tensor_parallel": {str(block): list(sizes) for block, sizes in values["quantized_tensor_parallel"].items()},
        }


def deployability(shape: Shape) -> Deployability:
    """The rules applied to one shape; experts are divided like an MLP each."""
    sizes = tuple(size for size in range(1, MAX_TENSOR_PARALLEL + 1) if _divides(shape, size))
    blocks = tuple(block for block in QUANTIZATION_BLOCKS if _whole_blocks(shape, block=block, size=1))
    return Deployability(
        tensor_parallel_sizes=sizes,
        quantization_block_sizes=blocks,
        quantized_tensor_parallel={block: tuple(size for size in sizes if _whole_blocks(shape, block=block, size=size)) for block in blocks},
    )


def heads_divide(*, num_attention_heads: Any, num_key_value_heads: Any, devices: int) -> Any:
    """Whether heads divide evenly over devices; integers, or integer arrays of one shape."""
    return (num_attention_heads % devices == 0) & ((num_key_value_heads % devices == 0) | (devices % num_key_value_heads == 0))


def _divides(shape: Shape, size: int) -> bool:
    heads: bool = heads_divide(num_attention_heads=shape.num_attention_heads, num_key_value_heads=shape.num_key_value_heads, devices=size)
    return heads and shape.intermediate_size % size == 0


def _whole_blocks(shape: Shape, *, block: int, size: int) -> bool:
    """Hidden is the input of undivided sides; MLP and heads are divided."""
    divided = (shape.intermediate_size, shape.num_attention_heads * shape.head_dim)
    return shape.hidden_size % block == 0 and all(side // size % block == 0 for side in divided)
