"""In every family, a teacher made by planting redundancy in a smaller model comes back to that model's function when it is pruned to its shape.

Dead parts are planted on both sides: loud and unread, silent and read; in shuffled positions, on each axis and on all.
Dead experts are as loud as the others, and the router sends no token to them: only such experts can go without a trace, since
one that is chosen and does nothing takes the place of one that does.
What is planted follows the family's table, and so does a family that someone adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nas.architecture import Architecture, read_architecture
from nas.compress.slicing import build_student
from nas.compress.sorting import Sorting
from nas.compress.teacher import checkpoint_weights
from nas.families import FAMILIES, Axis, Side, Weight
from nas.shape import Shape
from tests.compress.family_models import KINDS, PLAIN, file_weights, random_model

ADDED = {"hidden_size": 6, "intermediate_size": 8, "num_hidden_layers": 2, "num_key_value_heads": 1, "query_heads_per_kv": 1, "num_experts": 2}
IDENTITY_LAYERS = (0, 3)
"""Scattered: no contiguous cut takes them both."""
CONSTANT = 7
"""The channel of the small models with experts that is positive on every token, by which the router knows nothing but to avoid dead experts."""
EXPERTS = {kind for kind, values in KINDS.items() if FAMILIES[values["model_type"]].expert_keys}
ALONE = [(kind, frozenset({axis})) for kind in PLAIN for axis in ADDED if axis != "num_experts" or kind in EXPERTS]
TOGETHER = [(kind, frozenset(ADDED)) for kind in KINDS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the small model's parts lie in the big one; everything else is planted."""

    hidden_D: Tensor
    layers: list[int]
    neurons_LF: list[Tensor]
    heads_LH: list[Tensor]
    groups_LK: list[Tensor]
    experts_LX: list[Tensor]

    def name(self, weight: Weight, *, layer: int | None, expert: int | None) -> str:
        """The big model's weight that the small one's lies in."""
        if layer is None:
            return weight.name
        return weight.name.format(layer=self.layers[layer], expert=None if expert is None else int(self.experts_LX[layer][expert]))

    def index(self, side: Side, *, layer: int | None, big: Architecture) -> Tensor:
        """Positions in the big model of one side of one of the small model's weights."""
        sizes, start, indices = big.sizes(big.shape), 0, []
        for axis in side:
            indices.append(start + self.of_axis(axis, layer=layer, size=sizes[axis], head_dim=big.shape.head_dim))
            start += sizes[axis]
        return torch.cat(indices)

    def of_axis(self, axis: Axis, *, layer: int | None, size: int, head_dim: int) -> Tensor:
        if axis in (Axis.VOCAB, Axis.HEAD_DIM):
            return torch.arange(size)
        if axis is Axis.HIDDEN:
            return self.hidden_D
        assert layer is not None
        if axis is Axis.INTERMEDIATE:
            return self.neurons_LF[layer]
        if axis is Axis.EXPERT:
            return self.experts_LX[layer]
        heads = (self.heads_LH if axis is Axis.QUERY else self.groups_LK)[layer]
        return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def plant(small: PreTrainedModel, *, kind: str, axes: frozenset[str]) -> PreTrainedModel:
    """A bigger model that computes the small one's function; what is added on `axes` does nothing, loudly."""
    architecture = read_architecture(small.config.to_dict())
    shape = bigger(architecture, axes=axes)
    places = choose_places(architecture.shape, shape)
    lists = layer_lists(small, places=places, num_hidden_layers=shape.num_hidden_layers)
    key, share = architecture.family.eps_key, architecture.shape.hidden_size / shape.hidden_size  # the big norms average over more channels
    eps = getattr(small.config, key) * (share if one_eps(architecture) else 1)
    big = random_model(kind, seed=1, **architecture.config_values(shape), **lists, **{key: eps})
    planted = read_architecture(big.config.to_dict())
    with torch.no_grad():
        silence(big, planted=planted, places=places)
        sources, targets = file_weights(small), file_weights(big)
        for name, weight, layer, expert in checkpoint_weights(architecture, num_hidden_layers=architecture.shape.num_hidden_layers):
            target = targets[places.name(weight, layer=layer, expert=expert)]
            index = [places.index(side, layer=layer, big=planted) for side in weight.sides]
            target[torch.meshgrid(*index, indexing="ij")] = rescaled(sources[name], weight=weight, small=architecture, big=planted)
    return big


def bigger(architecture: Architecture, *, axes: frozenset[str]) -> Shape:
    shape = architecture.shape
    extra = {axis: count if axis in axes else 0 for axis, count in ADDED.items()}
    groups, queries = shape.num_key_value_heads + extra["num_key_value_heads"], shape.query_heads_per_kv + extra["query_heads_per_kv"]
    widths = range(shape.hidden_size + extra["hidden_size"], 200)
    return Shape(
        num_hidden_layers=shape.num_hidden_layers + extra["num_hidden_layers"],
        hidden_size=next(width for width in widths if architecture.allows(hidden_size=width, num_attention_heads=groups * queries)),
        intermediate_size=shape.intermediate_size + extra["intermediate_size"],
        num_experts=shape.num_experts and shape.num_experts + extra["num_experts"],
        num_attention_heads=groups * queries,
        num_key_value_heads=groups,
        head_dim=shape.head_dim,
    )


def choose_places(small: Shape, big: Shape) -> Places:
    generator = torch.Generator().manual_seed(2)
    layers = range(big.num_hidden_layers)
    groups_LK = [torch.randperm(big.num_key_value_heads, generator=generator)[: small.num_key_value_heads] for _ in range(small.num_hidden_layers)]

    def heads(groups_K: Tensor) -> Tensor:
        queries = [torch.randperm(big.query_heads_per_kv, generator=generator)[: small.query_heads_per_kv] for _ in groups_K]
        return torch.cat([group * big.query_heads_per_kv + chosen for group, chosen in zip(groups_K, queries, strict=True)])

    return Places(
        hidden_D=torch.randperm(big.hidden_size, generator=generator)[: small.hidden_size],
        layers=[layer for layer in layers if big.num_hidden_layers == small.num_hidden_layers or layer not in IDENTITY_LAYERS],
        neurons_LF=[torch.randperm(big.intermediate_size, generator=generator)[: small.intermediate_size] for _ in range(small.num_hidden_layers)],
        heads_LH=[heads(groups_K) for groups_K in groups_LK],
        groups_LK=groups_LK,
        experts_LX=[torch.randperm(big.num_experts or 0, generator=generator)[: small.num_experts] for _ in range(small.num_hidden_layers)],
    )


def layer_lists(small: PreTrainedModel, *, places: Places, num_hidden_layers: int) -> dict[str, Any]:
    """What the small config says of a layer holds for its place; the planted layers are of the first layer's kind."""
    family = read_architecture(small.config.to_dict()).family
    changes = {}
    for key in family.layer_lists:
        values = [getattr(small.config, key)[0]] * num_hidden_layers
        for layer, place in enumerate(places.layers):
            values[place] = getattr(small.config, key)[layer]
        changes[key] = values
    return changes


def rescaled(source: Tensor, *, weight: Weight, small: Architecture, big: Architecture) -> Tensor:
    """A gain that makes up for the silent channels in the average, and for embeddings that are scaled by the bigger width."""
    if not weight.is_norm:
        return source
    family, (axis,) = small.family, weight.sides[0]
    gain = math.sqrt(small.sizes(small.shape)[axis] / big.sizes(big.shape)[axis])
    if family.embedding_grows_with_width and weight.name in family.output_norms.values() and axis is Axis.HIDDEN:
        gain *= math.sqrt(big.shape.hidden_size / small.shape.hidden_size)
    stored = int(family.gain_minus_one)
    return (source + stored) * gain - stored


def one_eps(architecture: Architecture) -> bool:
    """Whether every norm reads the residual stream, so that one eps is right for all of them."""
    return not architecture.family.output_norms and not any(weight.is_norm and weight.sides[0] == (Axis.HEAD_DIM,) for weight in architecture.weights)


def silence(big: PreTrainedModel, *, planted: Architecture, places: Places) -> None:
    """Make what is not the small model's do nothing; the other side of each dead part stays loud."""
    unused_D = outside(places.hidden_D, size=planted.shape.hidden_size)
    weights = file_weights(big)
    for name, weight, number, _ in checkpoint_weights(planted, num_hidden_layers=planted.shape.num_hidden_layers):
        parameter = weights[name]
        if weight.name == "model.embed_tokens.weight":
            parameter[:, unused_D] = 0
        elif writes_stream(weight, architecture=planted):
            parameter[unused_D if number in places.layers else slice(None)] = 0  # an identity layer writes nothing at all
        elif weight.sides[0] == (Axis.HIDDEN,) and not weight.is_norm:  # a norm's bias
            parameter[unused_D] = 0
        if number in places.layers:
            layer = places.layers.index(number)
            silence_neurons(parameter, weight=weight, planted=planted, dead_F=outside(places.neurons_LF[layer], size=planted.shape.intermediate_size))
            silence_heads(parameter, weight=weight, planted=planted, heads_H=places.heads_LH[layer], groups_K=places.groups_LK[layer])
            if weight.sides[0] == (Axis.EXPERT,):
                dead_X = outside(places.experts_LX[layer], size=planted.shape.num_experts or 0)
                parameter[dead_X] = 0
                parameter[dead_X, places.hidden_D[CONSTANT]] = -1e3


def silence_neurons(parameter: Tensor, *, weight: Weight, planted: Architecture, dead_F: Tensor) -> None:
    unread_F, silent_F = dead_F[::2], dead_F[1::2]
    for start in starts(weight.sides[0], axis=Axis.INTERMEDIATE, planted=planted):
        parameter[start + unread_F] *= 100
        parameter[start + silent_F] = 0
    if weight.sides[1:] == ((Axis.INTERMEDIATE,),):
        parameter[:, unread_F] = 0
        parameter[:, silent_F] *= 100


def silence_heads(parameter: Tensor, *, weight: Weight, planted: Architecture, heads_H: Tensor, groups_K: Tensor) -> None:
    """Dead groups are silent and read, or loud and unread in turn; dead queries of living groups are unread.

    Queries and keys that share a norm with others are silent: a norm's average cannot be corrected for what changes from token to token.
    """
    shape = planted.shape
    spanned = {weight.sides[0] for weight in planted.weights if weight.is_norm}
    dead_groups = outside(groups_K, size=shape.num_key_value_heads)
    silent = dead_groups if (Axis.KEY_VALUE,) in spanned else dead_groups[::2]
    dead_heads = outside(heads_H, size=shape.num_attention_heads)
    read = torch.isin(dead_heads // shape.query_heads_per_kv, silent)
    for start in starts(weight.sides[0], axis=Axis.KEY_VALUE, planted=planted):
        parameter[start + channels(outside(torch.cat([groups_K, silent]), size=shape.num_key_value_heads), head_dim=shape.head_dim)] *= 100
        parameter[start + channels(silent, head_dim=shape.head_dim)] = 0
    if (Axis.QUERY,) in spanned and not weight.is_norm:
        for start in starts(weight.sides[0], axis=Axis.QUERY, planted=planted):
            parameter[start + channels(dead_heads, head_dim=shape.head_dim)] = 0
    if weight.sides[1:] == ((Axis.QUERY,),):
        parameter[:, channels(dead_heads[read], head_dim=shape.head_dim)] *= 100
        parameter[:, channels(dead_heads[~read], head_dim=shape.head_dim)] = 0


def starts(side: Side, *, axis: Axis, planted: Architecture) -> list[int]:
    """Where the segments of one axis begin on a side."""
    sizes = planted.sizes(planted.shape)
    return [sum(sizes[before] for before in side[:number]) for number, segment in enumerate(side) if segment is axis]


def channels(heads_H: Tensor, *, head_dim: int) -> Tensor:
    return (heads_H[:, None] * head_dim + torch.arange(head_dim)).flatten()


def outside(kept: Tensor, *, size: int) -> Tensor:
    return torch.tensor([index for index in range(size) if index not in set(kept.tolist())], dtype=torch.int64)


def writes_stream(weight: Weight, *, architecture: Architecture) -> bool:
    """A projection into the residual stream, or its bias."""
    norms = {norm.name.removesuffix(".weight") for norm in architecture.weights if norm.is_norm}
    return weight.sides[0] == (Axis.HIDDEN,) and weight.name.rpartition(".")[0] not in norms


def small_model(kind: str) -> PreTrainedModel:
    """Where norms centre, what is written into the residual stream has no mean, so that silent channels do not move it. Where there are experts, one channel
    is positive on every token."""
    architecture = read_architecture(random_model(kind).config.to_dict())
    small = random_model(kind, **{architecture.family.eps_key: 1e-3 if one_eps(architecture) else 1e-9})
    weights = file_weights(small)
    writers = [
        weights[name]
        for name, weight, _, _ in checkpoint_weights(architecture, num_hidden_layers=architecture.shape.num_hidden_layers)
        if writes_stream(weight, architecture=architecture)
    ]
    with torch.no_grad():
        if architecture.family.norms_centre:
            small.model.embed_tokens.weight -= small.model.embed_tokens.weight.mean(1, keepdim=True)
            for parameter in writers:
                parameter -= parameter.mean(0, keepdim=True)
        if kind in EXPERTS:
            small.model.embed_tokens.weight[:, CONSTANT] = 0.5
            for parameter in writers:
                parameter[CONSTANT] = 0
            for layer in small.model.layers:
                layer.post_attention_layernorm.weight[CONSTANT] = 1
    return small


@pytest.mark.parametrize(
    ("kind", "axes"), ALONE + TOGETHER, ids=[f"{kind}-{'+'.join(sorted(axes)) if len(axes) == 1 else 'all'}" for kind, axes in ALONE + TOGETHER]
)
def test_pruning_finds_the_planted_model(
    kind: str, axes: frozenset[str], sort_on_disk: Callable[..., Sorting], max_difference: Callable[..., float], tmp_path: Path
) -> None:
    small = small_model(kind)
    big = plant(small, kind=kind, axes=axes)
    assert max_difference(big, small) <= 1e-3, "the planted teacher itself is wrong"
    architecture = read_architecture(small.config.to_dict())
    sorting = sort_on_disk(big, folder=tmp_path, depths=(architecture.shape.num_hidden_layers, big.config.num_hidden_layers))

    student = build_student(sorting, architecture.shape, dtype="float32", device="cpu").eval()

    assert max_difference(student, small) <= 1e-3
    if one_eps(architecture):
        key = architecture.family.eps_key
        assert getattr(student.config, key) == pytest.approx(getattr(small.config, key))


@pytest.mark.parametrize("kind", PLAIN)
def test_a_score_that_ignores_the_readers_loses_the_planted_model(
    kind: str, sort_on_disk: Callable[..., Sorting], max_difference: Callable[..., float], tmp_path: Path
) -> None:
    """A control: the claim above is not true of any pruning, and neurons that are loud and unread deceive Minitron's own score."""
    small = small_model(kind)
    big = plant(small, kind=kind, axes=frozenset({"intermediate_size"}))
    sorting = sort_on_disk(big, folder=tmp_path, depths=(3,), method="l2_mean")
    student = build_student(sorting, read_architecture(small.config.to_dict()).shape, dtype="float32", device="cpu").eval()
    assert max_difference(student, small) > 0.1
