"""A prefix of every axis of the sorted teacher -> student: weights, config, kept indices.

Reads the sorted teacher's file memory-mapped: no more than the student and one tensor is in memory. Decides nothing:
the order and the layers per depth are sorting.py's.

Shapes: D hidden, with D' (`kept`) channels kept of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from nas.architecture import Architecture, read_architecture
from nas.compress.experts import fuse_experts
from nas.compress.sorting import Sorting
from nas.compress.teacher import WEIGHTS_FILE, checkpoint_weights, resolve_dtype
from nas.cost import count_parameters
from nas.errors import InvalidSpec, Problem
from nas.families import Axis, Side, Weight
from nas.shape import Shape


def slice_student(sorting: Sorting, shape: Shape) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict under the checkpoint's names (in the dtype of the sorted teacher's file) and Hugging Face config of the student of that shape.

    A norm averages over the width. With the share kappa of the energy at a norm's input that the kept channels carry,
    the student's mean square is kappa * D / D' times the teacher's, so gamma takes the root of that factor and eps the
    factor itself (norms over all query or key heads: likewise, over Q and K). Exact where kappa is the same for every
    token. Where the forward pass multiplies the embeddings by sqrt(D), the student's residual stream is sqrt(D' / D) times
    the teacher's: the norms behind the sublayers write that scale too, and those that read the stream take it out. The
    config holds one eps for all norms: it follows the norms by the square of the part that eps is of their divisor.

    Of the experts a prefix stays, with its rows of the router; each token goes to as many as before. Exact on a token whose experts all stay,
    where the router's weights are normalised over the chosen (Mixtral, `norm_topk_prob`). Where they are not, the softmax over fewer experts
    raises them by 1 / (1 - the probability of those removed).

    Raises:
        InvalidSpec: larger than the teacher on an axis, another head_dim, a depth without selected layers, or not legal in the family.
    """
    check_sliceable(sorting, shape)
    layers = sorting.layers[shape.num_hidden_layers]
    factors = norm_factors(sorting, shape)
    state = {}
    with safe_open(sorting.folder / WEIGHTS_FILE, framework="pt") as file:
        for name, weight, layer, expert in checkpoint_weights(sorting.architecture, num_hidden_layers=len(layers), num_experts=shape.num_experts):
            teacher_name = weight.name.format(layer=layers[layer], expert=expert) if layer is not None else name
            tensor = _read_prefix(file.get_slice(teacher_name), weight=weight, architecture=sorting.architecture, shape=shape)
            if weight.is_norm and (gain := factors[teacher_name].gain) != 1:
                stored = int(sorting.architecture.family.gain_minus_one)
                tensor = ((tensor.double() + stored) * gain - stored).to(tensor.dtype)
            state[name] = tensor
    return state, student_config(sorting, shape, factors=factors, dtype=next(iter(state.values())).dtype)


def kept_indices(sorting: Sorting, shape: Shape) -> dict[str, Any]:
    """What the student keeps, as indices into the teacher as it was before sorting; lists only, ready for JSON.

    Keys: layers, hidden_channels; and, one list per kept layer, neurons, key_value_heads, query_heads, in the student's order;
    with experts also experts, and neurons is one list per kept expert.
    """
    check_sliceable(sorting, shape)
    order, layers = sorting.order, sorting.layers[shape.num_hidden_layers]
    groups, queries = shape.num_key_value_heads, shape.query_heads_per_kv
    kept: dict[str, Any] = {
        "layers": list(layers),
        "hidden_channels": order.hidden_D[: shape.hidden_size].tolist(),
        "neurons": [order.neurons_LF[layer, : shape.intermediate_size].tolist() for layer in layers],
        "key_value_heads": [order.kv_groups_LK[layer, :groups].tolist() for layer in layers],
        "query_heads": [order.heads(layer)[:groups, :queries].flatten().tolist() for layer in layers],
    }
    if order.experts_LX is not None:
        experts = [order.experts_LX[layer, : shape.num_experts] for layer in layers]
        neurons = [order.neurons_LF[layer, chosen, : shape.intermediate_size].tolist() for layer, chosen in zip(layers, experts, strict=True)]
        kept |= {"experts": [chosen.tolist() for chosen in experts], "neurons": neurons}
    return kept


def build_student(sorting: Sorting, shape: Shape, *, dtype: str, device: str) -> PreTrainedModel:
    """The student as a plain transformers model in training mode; the global random state is not touched.

    Raises:
        InvalidSpec: as `slice_student`, or an unknown dtype.
    """
    state, config = slice_student(sorting, shape)
    return model_of(state, config=config, dtype=dtype, device=device)


def model_of(state: dict[str, Tensor], *, config: Mapping[str, Any], dtype: str, device: str) -> PreTrainedModel:
    """A plain transformers model in training mode that takes the tensors of `state` for its own; the global random state is not touched.

    Raises:
        InvalidSpec: unknown dtype.
    """
    torch_dtype, architecture = resolve_dtype(dtype), read_architecture(config)
    fuse_experts(state, architecture=architecture)
    for name in list(state):
        state[name] = state[name].to(torch_dtype)
    with no_init_weights():  # memory that is reserved and never touched: the next lines put the sliced tensors in its place
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=torch_dtype, attn_implementation=architecture.family.attention, trust_remote_code=False
        )
    loaded = model.load_state_dict(state, strict=False, assign=True)
    tied = {weight.name for weight in architecture.family.weights} - {weight.name for weight in architecture.weights}
    assert not loaded.unexpected_keys, f"the family's row names tensors that transformers does not have: {loaded.unexpected_keys}"
    assert set(loaded.missing_keys) <= tied, f"the family's row lacks tensors: {set(loaded.missing_keys) - tied}"
    model.tie_weights()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters == count_parameters(architecture, architecture.shape).total, f"{architecture.shape.key}: the model has {num_parameters} parameters"
    return model.to(device).train()


def check_sliceable(sorting: Sorting, shape: Shape) -> None:
    """Refuse a shape that is no prefix of this sorted teacher.

    Raises:
        InvalidSpec: every field that is wrong, what it expects and what came.
    """
    teacher = sorting.architecture.shape
    limits = {"hidden_size": teacher.hidden_size, "intermediate_size": teacher.intermediate_size, "num_key_value_heads": teacher.num_key_value_heads}
    limits |= {} if teacher.num_experts is None or shape.num_experts is None else {"num_experts": teacher.num_experts}
    problems = [
        Problem(field=field, expected=f"at most the teacher's {limit}", got=str(getattr(shape, field)))
        for field, limit in limits.items()
        if getattr(shape, field) > limit
    ]
    if shape.query_heads_per_kv > teacher.query_heads_per_kv:
        expected = f"at most the teacher's {teacher.query_heads_per_kv} query heads per KV head"
        problems.append(Problem(field="num_attention_heads", expected=expected, got=f"{shape.num_attention_heads} for {shape.num_key_value_heads} KV heads"))
    if shape.head_dim != teacher.head_dim:
        problems.append(Problem(field="head_dim", expected=f"the teacher's {teacher.head_dim}", got=str(shape.head_dim)))
    if shape.num_hidden_layers not in sorting.layers:
        depths = ", ".join(map(str, sorted(sorting.layers)))
        problems.append(Problem(field="num_hidden_layers", expected=f"a depth with selected layers ({depths})", got=str(shape.num_hidden_layers)))
    problems.extend(sorting.architecture.refusals(shape))
    if problems:
        raise InvalidSpec(*problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormFactor:
    """What a norm of the student needs to give the teacher's output on the kept channels."""

    gain: float
    """On gamma."""
    eps: float
    """On eps: the student's mean square over the teacher's."""


def norm_factors(sorting: Sorting, shape: Shape) -> dict[str, NormFactor]:
    """Weight of each norm, by its name in the teacher -> its factors, for the layers that stay; exactly 1 at full width."""
    architecture = sorting.architecture
    family, sizes, kept_sizes = architecture.family, architecture.sizes(architecture.shape), architecture.sizes(shape)
    stream_scale = math.sqrt(shape.hidden_size / architecture.shape.hidden_size) if family.embedding_grows_with_width else 1.0
    factors = {}
    for weight in (weight for weight in architecture.weights if weight.is_norm):
        (axis,) = weight.sides[0]
        after_writer = weight.name in family.output_norms.values()
        for layer in sorting.layers[shape.num_hidden_layers] if weight.per_layer else (0,):
            name, square = weight.name.format(layer=layer), 1.0
            if sizes[axis] != kept_sizes[axis]:
                ranges = kept_ranges(weight.sides[0], architecture=architecture, shape=shape)
                kept_share = sum(float(sorting.norm_energy[name][kept].sum()) for kept in ranges)
                square = kept_share * sizes[axis] / kept_sizes[axis]
            writes_stream = axis is Axis.HIDDEN and after_writer
            reads_stream = axis is Axis.HIDDEN and not after_writer
            factors[name] = NormFactor(
                gain=math.sqrt(square) * (stream_scale if writes_stream else 1.0), eps=square * (stream_scale**2 if reads_stream else 1.0)
            )
    return factors


def kept_ranges(side: Side, *, architecture: Architecture, shape: Shape) -> list[slice]:
    """Positions of one sorted side that the student keeps: ascending, none touching the next."""
    sizes, start, ranges = architecture.sizes(architecture.shape), 0, []
    for axis in side:
        ranges += [slice(start + kept.start, start + kept.stop) for kept in _kept_of_axis(axis, architecture=architecture, shape=shape)]
        start += sizes[axis]
    merged = ranges[:1]
    for kept in ranges[1:]:
        merged[-1:] = [slice(merged[-1].start, kept.stop)] if kept.start == merged[-1].stop else [merged[-1], kept]
    return merged


def _kept_of_axis(axis: Axis, *, architecture: Architecture, shape: Shape) -> list[slice]:
    """A prefix; several ranges only where each KV group loses queries."""
    teacher, kept = architecture.shape, architecture.sizes(shape)[axis]
    if axis is not Axis.QUERY or shape.query_heads_per_kv == teacher.query_heads_per_kv:
        return [slice(0, kept)]
    group, kept = teacher.query_heads_per_kv * shape.head_dim, shape.query_heads_per_kv * shape.head_dim
    return [slice(start, start + kept) for start in range(0, shape.num_key_value_heads * group, group)]


def _read_prefix(stored: Any, *, weight: Weight, architecture: Architecture, shape: Shape) -> Tensor:
    """The kept part of one tensor, read from the file piece by piece. `stored` is a safetensors slice."""
    ranges = [kept_ranges(side, architecture=architecture, shape=shape) for side in weight.sides]
    split = [dim for dim, parts in enumerate(ranges) if len(parts) > 1]
    assert len(split) <= 1, f"{weight.name}: at most one side of a weight is cut into pieces"
    pieces: list[Tensor] = [stored[index] for index in product(*ranges)]
    # A piece is a view of the mapped file: the student owns its weights, or training would write into the mapping's pages.
    return torch.cat(pieces, dim=split[0]) if split else pieces[0].clone(memory_format=torch.contiguous_format)


def student_config(sorting: Sorting, shape: Shape, *, factors: Mapping[str, NormFactor], dtype: torch.dtype) -> dict[str, Any]:
    """The teacher's config with the student's numbers; rope, tokens and tie flag stay, what is said layer by layer follows those that stay."""
    family, config, layers = sorting.architecture.family, dict(sorting.config), sorting.layers[shape.num_hidden_layers]
    if len(layers) < sorting.architecture.shape.num_hidden_layers:
        config |= {key: [config[key][layer] for layer in layers] for key in family.layer_lists}
        config |= {key: sum(layer < config[key] for layer in layers) for key in family.layer_thresholds}
        for key in family.layer_patterns:
            config.pop(key, None)
    weights = {name: sorting.norm_eps[name] ** 2 for name in factors}
    if not sum(weights.values()):
        weights = dict.fromkeys(factors, 1.0)
    eps = config[family.eps_key] * (sum(weights[name] * factor.eps for name, factor in factors.items()) / sum(weights.values()))
    return {**config, **sorting.architecture.config_values(shape), family.eps_key: eps, "dtype": str(dtype).removeprefix("torch.")}
