"""A teacher made by planting redundancy in a smaller model comes back to that model's function when it is pruned to its shape.

Dead parts are planted on both sides: loud and unread, silent and read; in shuffled positions, on each axis and on all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from nas.compress.slicing import build_student
from nas.compress.sorting import Sorting
from nas.families import Axis, read_architecture

ADDED = {"hidden_size": 36, "intermediate_size": 8, "num_hidden_layers": 2, "num_key_value_heads": 1, "query_heads_per_kv": 1}
IDENTITY_LAYERS = (0, 3)
"""Scattered: no contiguous cut takes them both."""
SMALL = {
    "grouped": {"hidden_size": 36, "num_attention_heads": 4, "num_key_value_heads": 2},
    "grouped, tied": {"hidden_size": 36, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "grouped, biased": {"hidden_size": 36, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "one query per group": {"hidden_size": 36, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the small model's parts lie in the big one; everything else is planted."""

    hidden_D: Tensor
    layers: list[int]
    neurons_LF: list[Tensor]
    groups_LK: list[Tensor]
    queries_LKG: list[list[Tensor]]

    def index(self, axis: Axis, *, layer: int | None, head_dim: int, queries_per_group: int, vocab_size: int) -> Tensor:
        if axis is Axis.VOCAB:
            return torch.arange(vocab_size)
        if axis is Axis.HIDDEN:
            return self.hidden_D
        assert layer is not None
        if axis is Axis.INTERMEDIATE:
            return self.neurons_LF[layer]
        heads = self.groups_LK[layer]
        if axis is Axis.QUERY:
            heads = torch.cat([group * queries_per_group + queries for group, queries in zip(heads, self.queries_LKG[layer], strict=True)])
        return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def plant(small: LlamaForCausalLM, *, axes: set[str], random_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """A bigger model that computes the small one's function; what is added on `axes` does nothing, loudly."""
    architecture = read_architecture(small.config.to_dict())
    shape = architecture.shape
    extra = {axis: count if axis in axes else 0 for axis, count in ADDED.items()}
    groups, queries = shape.num_key_value_heads + extra["num_key_value_heads"], shape.query_heads_per_kv + extra["query_heads_per_kv"]
    sizes = {axis: getattr(shape, axis) + extra[axis] for axis in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    share = shape.hidden_size / sizes["hidden_size"]  # the big norms average over more channels
    config = {**small.config.to_dict(), **sizes, "num_attention_heads": groups * queries, "num_key_value_heads": groups}
    big = random_llama(seed=1, **config | {"rms_norm_eps": small.config.rms_norm_eps * share})

    generator = torch.Generator().manual_seed(2)

    def pick(count: int, size: int) -> Tensor:
        return torch.randperm(size, generator=generator)[:count]

    count = shape.num_hidden_layers
    places = Places(
        hidden_D=pick(shape.hidden_size, sizes["hidden_size"]),
        layers=[layer for layer in range(sizes["num_hidden_layers"]) if layer not in IDENTITY_LAYERS] if extra["num_hidden_layers"] else list(range(count)),
        neurons_LF=[pick(shape.intermediate_size, sizes["intermediate_size"]) for _ in range(count)],
        groups_LK=[pick(shape.num_key_value_heads, groups) for _ in range(count)],
        queries_LKG=[[pick(shape.query_heads_per_kv, queries) for _ in range(shape.num_key_value_heads)] for _ in range(count)],
    )
    with torch.no_grad():
        silence(big, places=places, head_dim=shape.head_dim)
        for weight in architecture.weights:
            for layer in range(count) if weight.per_layer else [None]:
                source = small.get_parameter(weight.name.format(layer=layer))
                target = big.get_parameter(weight.name.format(layer=None if layer is None else places.layers[layer]))
                index = [
                    places.index(axis, layer=layer, head_dim=shape.head_dim, queries_per_group=queries, vocab_size=architecture.vocab_size)
                    for (axis,) in weight.sides
                ]
                target[torch.meshgrid(*index, indexing="ij")] = source * share**0.5 if weight.is_norm else source
    return big


def silence(big: LlamaForCausalLM, *, places: Places, head_dim: int) -> None:
    """Make what is not the small model's do nothing; the other side of each dead part stays loud."""
    unused_D = outside(places.hidden_D, size=big.config.hidden_size)
    big.model.embed_tokens.weight[:, unused_D] = 0
    for number, layer in enumerate(big.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        written = [attention.o_proj, mlp.down_proj]
        rows = unused_D
        if number not in places.layers:  # an identity layer writes nothing at all
            rows = torch.arange(big.config.hidden_size)
        for module in written:
            module.weight[rows] = 0
            if module.bias is not None:
                module.bias[rows] = 0
        if number in places.layers:
            index = places.layers.index(number)
            silence_neurons(layer, dead_F=outside(places.neurons_LF[index], size=big.config.intermediate_size))
            silence_heads(layer, groups_K=places.groups_LK[index], queries_KG=places.queries_LKG[index], head_dim=head_dim)


def silence_neurons(layer: torch.nn.Module, *, dead_F: Tensor) -> None:
    unread_F, silent_F = dead_F[::2], dead_F[1::2]
    layer.mlp.down_proj.weight[:, unread_F] = 0
    for module in (layer.mlp.gate_proj, layer.mlp.up_proj):
        module.weight[silent_F] = 0
        if module.bias is not None:
            module.bias[silent_F] = 0
    layer.mlp.down_proj.weight[:, silent_F] *= 100
    layer.mlp.up_proj.weight[unread_F] *= 100


def silence_heads(layer: torch.nn.Module, *, groups_K: Tensor, queries_KG: list[Tensor], head_dim: int) -> None:
    attention = layer.self_attn
    queries_per_group = attention.num_key_value_groups
    num_groups = attention.k_proj.out_features // head_dim
    for number, group in enumerate(outside(groups_K, size=num_groups).tolist()):
        values, outputs = (
            slice(group * head_dim, (group + 1) * head_dim),
            slice(group * queries_per_group * head_dim, (group + 1) * queries_per_group * head_dim),
        )
        if (number + layer.self_attn.layer_idx) % 2:  # silent and read
            attention.v_proj.weight[values] = 0
            if attention.v_proj.bias is not None:
                attention.v_proj.bias[values] = 0
            attention.o_proj.weight[:, outputs] *= 100
        else:  # loud and unread
            attention.v_proj.weight[values] *= 100
            attention.o_proj.weight[:, outputs] = 0
    for group, queries in zip(groups_K.tolist(), queries_KG, strict=True):
        for query in outside(queries, size=queries_per_group).tolist():
            head = group * queries_per_group + query
            attention.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = 0


def outside(kept: Tensor, *, size: int) -> Tensor:
    return torch.tensor([index for index in range(size) if index not in set(kept.tolist())], dtype=torch.int64)


@pytest.mark.parametrize("axes", [{axis} for axis in ADDED] + [set(ADDED)], ids=[*ADDED, "all together"])
@pytest.mark.parametrize("kind", SMALL)
def test_pruning_finds_the_planted_model(
    kind: str,
    axes: set[str],
    random_llama: Callable[..., LlamaForCausalLM],
    sort_on_disk: Callable[..., Sorting],
    max_difference: Callable[..., float],
    tmp_path: Path,
) -> None:
    small = random_llama(**SMALL[kind])
    big = plant(small, axes=axes, random_llama=random_llama)
    assert max_difference(big, small) <= 1e-3, "the planted teacher itself is wrong"
    shape = read_architecture(small.config.to_dict()).shape
    sorting = sort_on_disk(big, folder=tmp_path, depths=(shape.num_hidden_layers, big.config.num_hidden_layers))

    student = build_student(sorting, shape, dtype="float32", device="cpu").eval()

    assert max_difference(student, small) <= 1e-3
    assert student.config.rms_norm_eps == pytest.approx(small.config.rms_norm_eps)


def test_a_score_that_ignores_the_readers_loses_the_planted_model(
    random_llama: Callable[..., LlamaForCausalLM], sort_on_disk: Callable[..., Sorting], max_difference: Callable[..., float], tmp_path: Path
) -> None:
    """A control: the claim above is not true of any pruning, and neurons that are loud and unread deceive Minitron's own score."""
    small = random_llama(**SMALL["grouped"])
    big = plant(small, axes={"intermediate_size"}, random_llama=random_llama)
    sorting = sort_on_disk(big, folder=tmp_path, depths=(3,), method="l2_mean")
    student = build_student(sorting, read_architecture(small.config.to_dict()).shape, dtype="float32", device="cpu").eval()
    assert max_difference(student, small) > 0.1
