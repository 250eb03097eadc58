"""A prefix of every axis of the sorted teacher -> student: weights, config, kept indices.

Reads the sorted teacher's file memory-mapped: no more than the student and one tensor is in memory. Decides nothing:
the order and the layers per depth are sorting.py's.

Shapes: D hidden, with D' (`kept`) channels kept of it.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from nas.compress.sorting import Sorting
from nas.compress.teacher import WEIGHTS_FILE, checkpoint_weights, resolve_dtype
from nas.cost import count_parameters
from nas.errors import InvalidSpec, Problem
from nas.families import Axis, Weight, read_architecture
from nas.shape import Shape

_PER_LAYER_LISTS = ("layer_types",)
"""Config keys that hold one entry per layer."""


def slice_student(sorting: Sorting, shape: Shape) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict (in the dtype of the sorted teacher's file) and Hugging Face config of the student of that shape.

    RMSNorm averages over the width. With the share kappa of the energy at a norm's input that the kept channels carry,
    the student's mean square is kappa * D / D' times the teacher's, so gamma takes the root of that factor and eps the
    factor itself, averaged over the norms, as the config holds one eps. Exact where kappa is the same for every token.

    Raises:
        InvalidSpec: larger than the teacher on an axis, another head_dim, a depth without selected layers, or not legal in the family.
    """
    check_sliceable(sorting, shape)
    layers = sorting.layers[shape.num_hidden_layers]
    factors = _norm_factors(sorting, shape)
    state = {}
    with safe_open(sorting.folder / WEIGHTS_FILE, framework="pt") as file:
        for name, weight, layer in checkpoint_weights(sorting.architecture, num_hidden_layers=len(layers)):
            teacher_name = weight.name.format(layer=layers[layer]) if layer is not None else name
            tensor = _read_prefix(file.get_slice(teacher_name), weight=weight, teacher=sorting.architecture.shape, shape=shape)
            if weight.is_norm and (factor := factors[teacher_name]) != 1:
                tensor = (tensor.double() * math.sqrt(factor)).to(tensor.dtype)
            state[name] = tensor
    return state, _student_config(sorting, shape, factors=factors, dtype=next(iter(state.values())).dtype)


def kept_indices(sorting: Sorting, shape: Shape) -> dict[str, Any]:
    """What the student keeps, as indices into the teacher as it was before sorting; lists only, ready for JSON.

    Keys: layers, hidden_channels; and, one list per kept layer, neurons, key_value_heads, query_heads, in the student's order.
    """
    check_sliceable(sorting, shape)
    order, layers = sorting.order, sorting.layers[shape.num_hidden_layers]
    groups, queries = shape.num_key_value_heads, shape.query_heads_per_kv
    return {
        "layers": list(layers),
        "hidden_channels": order.hidden_D[: shape.hidden_size].tolist(),
        "neurons": [order.neurons_LF[layer, : shape.intermediate_size].tolist() for layer in layers],
        "key_value_heads": [order.kv_groups_LK[layer, :groups].tolist() for layer in layers],
        "query_heads": [order.heads(layer)[:groups, :queries].flatten().tolist() for layer in layers],
    }


def build_student(sorting: Sorting, shape: Shape, *, dtype: str, device: str) -> PreTrainedModel:
    """The student as a plain transformers model in training mode; the global random state is not touched.

    Raises:
        InvalidSpec: as `slice_student`, or an unknown dtype.
    """
    torch_dtype = resolve_dtype(dtype)
    state, values = slice_student(sorting, shape)
    architecture = read_architecture(values)
    config = AutoConfig.for_model(**values)
    with no_init_weights():  # every weight is loaded in the next line
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype, attn_implementation="sdpa", trust_remote_code=False)
    loaded = model.load_state_dict(state, strict=False)
    tied = {weight.name for weight in architecture.family.weights} - {weight.name for weight in architecture.weights}
    assert not loaded.unexpected_keys, f"the family's row names tensors that transformers does not have: {loaded.unexpected_keys}"
    assert set(loaded.missing_keys) <= tied, f"the family's row lacks tensors: {set(loaded.missing_keys) - tied}"
    model.tie_weights()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters == count_parameters(architecture, shape).total, f"{shape.key}: the model has {num_parameters} parameters"
    return model.to(device).train()


def check_sliceable(sorting: Sorting, shape: Shape) -> None:
    """Refuse a shape that is no prefix of this sorted teacher.

    Raises:
        InvalidSpec: every field that is wrong, what it expects and what came.
    """
    teacher = sorting.architecture.shape
    limits = {"hidden_size": teacher.hidden_size, "intermediate_size": teacher.intermediate_size, "num_key_value_heads": teacher.num_key_value_heads}
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
    if sorting.architecture.family.hidden_divisible_by_heads and shape.hidden_size % shape.num_attention_heads:
        expected = f"a multiple of num_attention_heads={shape.num_attention_heads}"
        problems.append(Problem(field="hidden_size", expected=expected, got=str(shape.hidden_size)))
    if problems:
        raise InvalidSpec(*problems)


def _norm_factors(sorting: Sorting, shape: Shape) -> dict[str, float]:
    """Teacher's norm weight -> kappa * D / D', for the norms that the student has; exactly 1 at full width."""
    width, kept = sorting.architecture.shape.hidden_size, shape.hidden_size
    if kept == width:
        return dict.fromkeys(sorting.norm_energy, 1.0)
    layers = sorting.layers[shape.num_hidden_layers]
    names = [weight.name.format(layer=layer) for weight in sorting.architecture.weights if weight.is_norm for layer in (layers if weight.per_layer else (0,))]
    return {name: float(sorting.norm_energy[name][:kept].sum()) * width / kept for name in names}


def _ranges(axis: Axis, *, teacher: Shape, shape: Shape) -> list[slice]:
    """Positions of one sorted side that the student keeps; several ranges only where each KV group loses queries."""
    if axis is Axis.VOCAB:
        return [slice(None)]
    if axis is Axis.HIDDEN:
        return [slice(0, shape.hidden_size)]
    if axis is Axis.INTERMEDIATE:
        return [slice(0, shape.intermediate_size)]
    if axis is Axis.KEY_VALUE:
        return [slice(0, shape.num_key_value_heads * shape.head_dim)]
    if shape.query_heads_per_kv == teacher.query_heads_per_kv:
        return [slice(0, shape.num_attention_heads * shape.head_dim)]
    group, kept = teacher.query_heads_per_kv * shape.head_dim, shape.query_heads_per_kv * shape.head_dim
    return [slice(start, start + kept) for start in range(0, shape.num_key_value_heads * group, group)]


def _read_prefix(stored: Any, *, weight: Weight, teacher: Shape, shape: Shape) -> Tensor:
    """The kept part of one tensor, read from the file piece by piece. `stored` is a safetensors slice."""
    ranges = [_ranges(axis, teacher=teacher, shape=shape) for axis in weight.axes]
    split = [dim for dim, parts in enumerate(ranges) if len(parts) > 1]
    assert len(split) <= 1, f"{weight.name}: at most one side of a weight is cut into pieces"
    pieces: list[Tensor] = [stored[index] for index in product(*ranges)]
    return torch.cat(pieces, dim=split[0]) if split else pieces[0].contiguous()


def _student_config(sorting: Sorting, shape: Shape, *, factors: dict[str, float], dtype: torch.dtype) -> dict[str, Any]:
    """The teacher's config with the student's numbers; rope, tokens and tie flag stay."""
    layers = sorting.layers[shape.num_hidden_layers]
    per_layer = {key: [values[layer] for layer in layers] for key in _PER_LAYER_LISTS if (values := sorting.config.get(key))}
    eps = sorting.config["rms_norm_eps"] * (sum(factors.values()) / len(factors))
    return {**sorting.config, **per_layer, **shape.as_dict(), "rms_norm_eps": eps, "dtype": str(dtype).removeprefix("torch.")}
