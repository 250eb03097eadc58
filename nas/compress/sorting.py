"""Permute a teacher so that every axis runs from most to least important, and store it with the layers that each depth keeps.

The sorted teacher computes the same function; any width is then a prefix of every axis (slicing.py). Heads stay a
rectangle of KV group x query per group. Layers are not permuted: depth is a list of kept indices per depth (depth.py).

Shapes: B batch, T tokens, D hidden, F intermediate, X experts, H query heads, K key/value heads, G query heads per KV head, L layers, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nas.architecture import Architecture, read_architecture
from nas.compress.experts import by_file_names
from nas.compress.importance import Importance
from nas.compress.manifest import load_tensors, save_tensors
from nas.compress.teacher import WEIGHTS_FILE, checkpoint_weights, write_checkpoint
from nas.compress.untrusted import CONFIG_FILE
from nas.errors import CorruptFile
from nas.families import Axis, Side
from nas.files import file_digest, withdraw
from nas.shape import Shape

SORTING = "sorting"
"""Name of the manifest (and its tensors: the order, the norms' energy) beside the sorted teacher's checkpoint."""

_NORM_ENERGY = "norm_energy."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """Original indices from most to least important, int64; ties keep the original order."""

    hidden_D: Tensor
    neurons_LF: Tensor
    """With experts neurons_LXF, by the original index of the expert."""
    kv_groups_LK: Tensor
    queries_LKG: Tensor
    """Query heads inside each *sorted* group: row k belongs to group kv_groups_LK[:, k]; values in 0..G-1."""
    experts_LX: Tensor | None = None
    """None: a dense family."""

    def heads(self, layer: int) -> Tensor:
        """heads_KG: original indices of the query heads, sorted groups down, sorted queries across."""
        return self.kv_groups_LK[layer][:, None] * self.queries_LKG.shape[2] + self.queries_LKG[layer]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sorting:
    """A sorted teacher on disk. Small: the weights stay in the file."""

    folder: Path
    architecture: Architecture
    config: dict[str, Any]
    order: Order
    norm_energy: dict[str, Tensor]
    """Norm weight -> share of each channel, in *sorted* order of the axis that the norm averages over."""
    norm_eps: dict[str, float]
    """Norm weight -> the part of its divisor that is eps."""
    layers: dict[int, tuple[int, ...]]
    """Depth -> original indices of the layers that it keeps, ascending."""


def make_order(importance: Importance, shape: Shape) -> Order:
    """Most important first on every axis; a KV group is as important as its query heads together."""
    num_groups = shape.num_key_value_heads
    heads_LKG = torch.unflatten(importance.heads_LH, 1, (num_groups, -1))
    kv_groups_LK = _descending(heads_LKG.sum(-1))
    by_group_LKG = heads_LKG.gather(1, kv_groups_LK[:, :, None].expand_as(heads_LKG))
    return Order(
        hidden_D=_descending(importance.hidden_D),
        neurons_LF=_descending(importance.neurons_LF),
        kv_groups_LK=kv_groups_LK,
        queries_LKG=_descending(by_group_LKG),
        experts_LX=None if importance.experts_LX is None else _descending(importance.experts_LX),
    )


def sort_teacher(model: PreTrainedModel, *, order: Order, architecture: Architecture) -> dict[str, Tensor]:
    """The model's checkpoint with every side of every weight in the new order: the same function up to float error."""
    state, teacher = {}, by_file_names(model.state_dict(), architecture=architecture)
    for name, weight, layer, place in checkpoint_weights(architecture, num_hidden_layers=architecture.shape.num_hidden_layers):
        expert = original_expert(place, order=order, layer=layer)
        tensor = teacher[weight.name.format(layer=layer, expert=expert)].cpu()
        for dim, side in enumerate(weight.sides):
            if (index := side_order(side, order=order, layer=layer, expert=expert, architecture=architecture)) is not None:
                tensor = tensor.index_select(dim, index)
        state[name] = tensor.contiguous()
    return state


def save_sorted(
    folder: Path,
    *,
    state: Mapping[str, Tensor],
    order: Order,
    importance: Importance,
    config: Mapping[str, Any],
    layers: Mapping[int, tuple[int, ...]],
    tokenizer_from: Path,
) -> None:
    """Write the sorted teacher: a checkpoint that loads by itself, and last `sorting.json` with the order, which makes it whole."""
    withdraw(folder / f"{SORTING}.json")
    write_checkpoint(state, config=config, tokenizer_from=tokenizer_from, folder=folder)
    tensors = {name: getattr(order, name) for name in ("hidden_D", "neurons_LF", "kv_groups_LK", "queries_LKG")}
    tensors |= {} if order.experts_LX is None else {"experts_LX": order.experts_LX}
    tensors |= {f"{_NORM_ENERGY}{name}": share_X for name, share_X in _sorted_energy(importance, order=order, architecture=read_architecture(config)).items()}
    facts = {
        "layers": {str(depth): list(kept) for depth, kept in sorted(layers.items())},
        "norm_eps": dict(importance.norm_eps),
        "sha256": {name: file_digest(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)},
    }
    save_tensors(folder, name=SORTING, tensors=tensors, facts=facts)


def load_sorting(folder: Path) -> Sorting:
    """The sorted teacher of a folder, its files compared with the digests they were written with (a flipped bit loads silently).

    Raises:
        NotFound: no manifest: the folder was never finished.
        CorruptFile: a file is not the one that was written, or an older version wrote it.
    """
    tensors, facts = load_tensors(folder, name=SORTING)
    energy = {name.removeprefix(_NORM_ENERGY): tensors.pop(name) for name in list(tensors) if name.startswith(_NORM_ENERGY)}
    try:
        order, digests, norm_eps = Order(**tensors), dict(facts["sha256"]), dict(facts["norm_eps"])
        layers = {int(depth): tuple(kept) for depth, kept in facts["layers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFile(f"{folder / SORTING}.json: expected the facts of a sorting as this version writes them, got {error!r}") from error
    for name, expected in digests.items():
        found = file_digest(folder / name) if (folder / name).is_file() else "no file"
        if found != expected:
            raise CorruptFile(f"{folder / name}: expected sha256 {expected}, got {found}")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return Sorting(
        folder=folder,
        architecture=read_architecture(config),
        config=config,
        order=order,
        norm_energy=energy,
        norm_eps=norm_eps,
        layers=layers,
    )


def _descending(scores: Tensor) -> Tensor:
    return scores.argsort(dim=-1, descending=True, stable=True)


def original_expert(place: int | None, *, order: Order, layer: int | None) -> int | None:
    """The teacher's expert at a place of a sorted layer."""
    if place is None or order.experts_LX is None:
        return None
    assert layer is not None
    return int(order.experts_LX[layer, place])


def side_order(side: Side, *, order: Order, layer: int | None, architecture: Architecture, expert: int | None = None) -> Tensor | None:
    """Original index of every position of one sorted side; None: the side stays as it is.

    Args:
        expert: whose weight it is, by its original index.
    """
    if side in ((Axis.VOCAB,), (Axis.HEAD_DIM,)):
        return None
    sizes, start, indices = architecture.sizes(architecture.shape), 0, []
    for axis in side:
        indices.append(start + _axis_order(axis, order=order, layer=layer, expert=expert, head_dim=architecture.shape.head_dim))
        start += sizes[axis]
    return torch.cat(indices)


def _axis_order(axis: Axis, *, order: Order, layer: int | None, expert: int | None, head_dim: int) -> Tensor:
    if axis is Axis.HIDDEN:
        return order.hidden_D
    assert layer is not None, f"axis {axis} exists only inside a layer"
    if axis is Axis.INTERMEDIATE:
        return order.neurons_LF[layer] if expert is None else order.neurons_LF[layer, expert]
    if axis is Axis.EXPERT:
        assert order.experts_LX is not None
        return order.experts_LX[layer]
    assert axis in (Axis.QUERY, Axis.KEY_VALUE), f"axis {axis} is not sorted"
    heads = order.heads(layer).flatten() if axis is Axis.QUERY else order.kv_groups_LK[layer]
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _sorted_energy(importance: Importance, *, order: Order, architecture: Architecture) -> dict[str, Tensor]:
    energy = {}
    for name, weight, layer, _ in checkpoint_weights(architecture, num_hidden_layers=architecture.shape.num_hidden_layers):
        if name in importance.norm_energy:
            index = side_order(weight.sides[0], order=order, layer=layer, architecture=architecture)
            assert index is not None, f"{name}: no order of {weight.sides[0]}"
            energy[name] = importance.norm_energy[name][index]
    return energy
