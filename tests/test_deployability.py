"""Where a shape can be served, by rule."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nas.deployability import deployability
from nas.shape import Shape


def a_shape(*, hidden: int = 4096, mlp: int = 14336, heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> Shape:
    return Shape(num_hidden_layers=32, hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)


def test_llama_8b_divides_as_it_is_served_today() -> None:
    found = deployability(a_shape())

    assert found.tensor_parallel_sizes == (1, 2, 4, 8, 16, 32)
    assert found.quantization_block_sizes == (32, 64, 128)
    assert found.quantized_tensor_parallel[128] == (1, 2, 4, 8, 16)  # 14336 / 32 = 448 is no multiple of 128
    assert found.quantized_tensor_parallel[64] == (1, 2, 4, 8, 16, 32)


def test_an_mlp_of_1856_is_not_served_quantized_on_eight_devices() -> None:
    """https://github.com/vllm-project/vllm/issues/49949: 1856 / 8 = 232 cuts through a group."""
    found = deployability(a_shape(mlp=1856))

    assert 8 in found.tensor_parallel_sizes
    assert 8 not in found.quantized_tensor_parallel[32]
    assert found.quantization_block_sizes == (32, 64)


@given(hidden=st.integers(8, 512), mlp=st.integers(8, 2048), kv_heads=st.integers(1, 12), group=st.integers(1, 6), head_dim=st.integers(8, 128))
def test_one_device_always_serves_it_and_each_size_leaves_whole_heads_and_neurons(hidden: int, mlp: int, kv_heads: int, group: int, head_dim: int) -> None:
    shape = a_shape(hidden=hidden, mlp=mlp, heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim)
    found = deployability(shape)

    assert found.tensor_parallel_sizes[0] == 1
    for size in found.tensor_parallel_sizes:
        assert shape.num_attention_heads % size == mlp % size == 0
        assert kv_heads % size == 0 or size % kv_heads == 0
    for block, sizes in found.quantized_tensor_parallel.items():
        assert sizes[0] == 1
        assert set(sizes) <= set(found.tensor_parallel_sizes)
        assert all(mlp // size % block == 0 and hidden % block == 0 for size in sizes)
