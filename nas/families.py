"""What a pruning code must know about a model family: one table row each, plain data, no torch.

A row lists every weight of the model with the axes of each of its sides, the activations that those weights read, and what
the family's norms and its config class impose. Counting (`cost.py`), legality (`space.py`), measuring, sorting and slicing
(`compress/`) all read this table, so a family is added by one row. How: ARCHITECTURE.md, "A model family".

Axes: V vocabulary, D hidden, F intermediate (of one expert, where there are experts), Q query heads x head_dim,
K key/value heads x head_dim, E head_dim, X experts.
Source of every row: the modeling and configuration files of transformers 5.23; `tests/compress/test_family_suite.py` holds them to the library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any


class Axis(StrEnum):
    """What one side of a weight counts; which prefix of it a student keeps."""

    VOCAB = "V"
    HIDDEN = "D"
    INTERMEDIATE = "F"
    QUERY = "Q"
    KEY_VALUE = "K"
    HEAD_DIM = "E"
    """Never cut: the rotary embedding pairs its channels."""
    EXPERT = "X"
    """The router's rows; each expert's own matrices are tensors of their own."""


Side = tuple[Axis, ...]
"""One side of a weight: a single axis, or where projections are fused, several one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One tensor of the checkpoint, by its name in the file. `{layer}` and `{expert}` in the name stand for indices."""

    name: str
    sides: tuple[Side, ...]
    """Rows first, as in the safetensors file."""
    present_if: str | None = None
    """Config flag that must be true for the tensor to exist; None: always."""
    absent_if: str | None = None
    """Config flag that must be false for the tensor to exist; None: always."""
    is_norm: bool = False
    """The gain of a norm, which averages over this axis (see slicing.py)."""
    in_embedding: bool = False
    """Counted as an embedding parameter: the input table and the untied output head."""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.name

    def lengths(self, sizes: Mapping[Axis, Any]) -> tuple[Any, ...]:
        """Length of each side for axis sizes that are integers, or integer arrays of one shape."""
        return tuple(sum(sizes[axis] for axis in side) for side in self.sides)

    def numel(self, sizes: Mapping[Axis, Any]) -> Any:
        return prod(self.lengths(sizes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One activation over an axis that can be cut, and the weights whose columns multiply it."""

    axis: Axis
    readers: tuple[str, ...]
    norm: str | None = None
    """The norm whose output it is. None: the neurons, the heads' outputs, or the residual stream itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table."""

    model_type: str
    weights: tuple[Weight, ...]
    sources: tuple[Source, ...]
    """In the order of the forward pass; together they name every column side over D, F and Q."""
    output_norms: Mapping[str, str] = field(default_factory=dict)
    """Weight -> the norm that its output passes before anything else reads it."""
    gain_minus_one: bool = False
    """Norms multiply by 1 + the stored weight."""
    norms_centre: bool = False
    """Norms subtract the mean over the width first (LayerNorm)."""
    embedding_grows_with_width: bool = False
    """The forward pass multiplies the embeddings by sqrt(hidden_size)."""
    eps_key: str = "rms_norm_eps"
    """Config key of the one eps that all norms share."""
    activation_key: str = "hidden_act"
    activations: tuple[str, ...] = ("silu", "swish")
    """Those that the row was checked with; the first is the default."""
    attention: str = "sdpa"
    """transformers' attention implementation."""
    hidden_divisible_by_heads: bool = False
    """The config class refuses hidden_size % num_attention_heads != 0 even with an explicit head_dim."""
    long_rope_from_hidden: bool = False
    """The config class checks the number of long-context rope factors against hidden_size // num_attention_heads, not head_dim."""
    code_taken_over: bool = False
    """Published checkpoints still point at code of their own (`auto_map`) that transformers has taken over; it is not run."""
    layer_lists: tuple[str, ...] = ()
    """Config keys with one entry per layer."""
    layer_thresholds: tuple[str, ...] = ()
    """Config keys that hold the index of the first layer of another kind."""
    layer_patterns: tuple[str, ...] = ()
    """Config keys from which older versions derive a list of `layer_lists`: wrong once layers were removed, then left out."""
    intermediate_key: str = "intermediate_size"
    """Config key of the width of the MLP, or of each expert."""
    expert_keys: tuple[str, ...] = ()
    """Config keys of the number of experts: the first that is there is read, all are written. None: a dense family."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Weight -> parameter of transformers' module, where the file calls it otherwise. What belongs to an expert is fused in it:
    experts first, and of each the rows of all its weights with that parameter, in the table's order."""
    width_multiple: int = 1
    """Hidden and intermediate sizes are multiples of this."""
    presumed: Mapping[str, Any] = field(default_factory=dict)
    """Config keys with the one value that the row is right for: with another, layers differ in their weights."""


# -- pieces that rows share -------------------------------------------------------------------------------------------------

_V, _D, _F, _Q, _K, _E, _X = ((axis,) for axis in Axis)
_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."
_EMBEDDING = Weight(name="model.embed_tokens.weight", sides=(_V, _D), in_embedding=True)
_HEAD = Weight(name="lm_head.weight", sides=(_V, _D), absent_if="tie_word_embeddings", in_embedding=True)


def _norm(name: str, *, side: Side = _D, bias: bool = False) -> tuple[Weight, ...]:
    weight = Weight(name=f"{name}.weight", sides=(side,), is_norm=True)
    return (weight, Weight(name=f"{name}.bias", sides=(side,))) if bias else (weight,)


def _linear(name: str, rows: Side, columns: Side, *, bias: bool = False, bias_if: str | None = None) -> tuple[Weight, ...]:
    weight = Weight(name=f"{name}.weight", sides=(rows, columns))
    return (weight, Weight(name=f"{name}.bias", sides=(rows,), present_if=bias_if)) if bias or bias_if else (weight,)


def _attention(*, bias_if: str | None = None, qkv_bias: bool = False) -> tuple[Weight, ...]:
    inputs = {"q": _Q, "k": _K, "v": _K}
    weights = [weight for letter, rows in inputs.items() for weight in _linear(_ATTENTION + f"{letter}_proj", rows, _D, bias=qkv_bias, bias_if=bias_if)]
    return (*weights, *_linear(_ATTENTION + "o_proj", _D, _Q, bias_if=bias_if))


def _gated_mlp(*, bias_if: str | None = None) -> tuple[Weight, ...]:
    inputs = [weight for name in ("gate", "up") for weight in _linear(_MLP + f"{name}_proj", _F, _D, bias_if=bias_if)]
    return (*inputs, *_linear(_MLP + "down_proj", _D, _F, bias_if=bias_if))


def _experts(block: str, *, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """A router and its experts, as the file names them."""
    expert = _LAYER + block + ".experts.{expert}."
    gated = [weight for name in (gate, up) for weight in _linear(expert + name, _F, _D)]
    return (*_linear(f"{_LAYER}{block}.gate", _X, _D), *gated, *_linear(expert + down, _D, _F))


def _fused(block: str, *, gate: str, up: str, down: str) -> dict[str, str]:
    """The parameters of transformers' expert modules."""
    expert = _LAYER + block + ".experts.{expert}."
    fused = {gate: "gate_up_proj", up: "gate_up_proj", down: "down_proj"}
    return {f"{_LAYER}{block}.gate.weight": _MLP + "gate.weight"} | {
        f"{expert}{name}.weight": f"{_MLP}experts.{parameter}" for name, parameter in fused.items()
    }


def _model(*layer: tuple[Weight, ...], norm_bias: bool = False) -> tuple[Weight, ...]:
    return (_EMBEDDING, *(weight for part in layer for weight in part), *_norm("model.norm", bias=norm_bias), _HEAD)


def _sources(
    *,
    attention_norm: str | None = "input_layernorm",
    mlp_norm: str | None = "post_attention_layernorm",
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
    mlp: tuple[str, ...] = ("gate_proj", "up_proj"),
    down: str = "down_proj",
    mlp_block: str = _MLP,
) -> tuple[Source, ...]:
    def norm(name: str | None) -> str | None:
        return f"{_LAYER}{name}.weight" if name else None

    return (
        Source(axis=Axis.HIDDEN, readers=tuple(f"{_ATTENTION}{name}.weight" for name in attention), norm=norm(attention_norm)),
        Source(axis=Axis.QUERY, readers=(_ATTENTION + "o_proj.weight",)),
        Source(axis=Axis.HIDDEN, readers=tuple(f"{mlp_block}{name}.weight" for name in mlp), norm=norm(mlp_norm)),
        Source(axis=Axis.INTERMEDIATE, readers=(f"{mlp_block}{down}.weight",)),
        Source(axis=Axis.HIDDEN, readers=("lm_head.weight",), norm="model.norm.weight"),
    )


_PRE_NORMS = tuple(_norm(_LAYER + name) for name in ("input_layernorm", "post_attention_layernorm"))
_POST_NORMS = tuple(_norm(_LAYER + name) for name in ("post_attention_layernorm", "post_feedforward_layernorm"))
_FOUR_NORMS = *(_norm(_LAYER + name) for name in ("input_layernorm", "pre_feedforward_layernorm")), *_POST_NORMS
_HEAD_NORMS = _norm(_ATTENTION + "q_norm", side=_E), _norm(_ATTENTION + "k_norm", side=_E)
_SUBLAYER_NORMS = {
    _ATTENTION + "o_proj.weight": _LAYER + "post_attention_layernorm.weight",
    _MLP + "down_proj.weight": _LAYER + "post_feedforward_layernorm.weight",
}

# -- the table --------------------------------------------------------------------------------------------------------------

LLAMA = Family(
    model_type="llama",
    weights=_model(*_PRE_NORMS, _attention(bias_if="attention_bias"), _gated_mlp(bias_if="mlp_bias")),
    sources=_sources(),
    hidden_divisible_by_heads=True,
)

MISTRAL = Family(model_type="mistral", weights=_model(*_PRE_NORMS, _attention(), _gated_mlp()), sources=_sources())

# No bias flag: queries, keys and values always have one, the output never.
QWEN2 = Family(
    model_type="qwen2",
    weights=_model(*_PRE_NORMS, _attention(qkv_bias=True), _gated_mlp()),
    sources=_sources(),
    layer_lists=("layer_types",),
    layer_thresholds=("max_window_layers",),
)

QWEN3 = Family(
    model_type="qwen3",
    weights=_model(*_PRE_NORMS, _attention(bias_if="attention_bias"), *_HEAD_NORMS, _gated_mlp()),
    sources=_sources(),
    layer_lists=("layer_types",),
    layer_thresholds=("max_window_layers",),
)

# Four norms per layer, two of them after the sublayers; attention softcaps, which transformers computes only in its eager form.
GEMMA2 = Family(
    model_type="gemma2",
    weights=_model(*_FOUR_NORMS, _attention(bias_if="attention_bias"), _gated_mlp()),
    sources=_sources(mlp_norm="pre_feedforward_layernorm"),
    output_norms=_SUBLAYER_NORMS,
    gain_minus_one=True,
    embedding_grows_with_width=True,
    activation_key="hidden_activation",
    activations=("gelu_pytorch_tanh",),
    attention="eager",
    hidden_divisible_by_heads=True,
    layer_lists=("layer_types",),
)

# As Gemma 2, with norms on each head and two rotary bases, chosen by the layer's type.
GEMMA3 = Family(
    model_type="gemma3_text",
    weights=_model(*_FOUR_NORMS, _attention(bias_if="attention_bias"), *_HEAD_NORMS, _gated_mlp()),
    sources=_sources(mlp_norm="pre_feedforward_layernorm"),
    output_norms=_SUBLAYER_NORMS,
    gain_minus_one=True,
    embedding_grows_with_width=True,
    activation_key="hidden_activation",
    activations=("gelu_pytorch_tanh",),
    hidden_divisible_by_heads=True,
    layer_lists=("layer_types",),
    layer_patterns=("sliding_window_pattern", "_sliding_window_pattern"),
)

# The sublayers read the raw residual stream; their outputs are normalised, and so are queries and keys over all heads together.
OLMO2 = Family(
    model_type="olmo2",
    weights=_model(
        _attention(bias_if="attention_bias"),
        _norm(_ATTENTION + "q_norm", side=_Q),
        _norm(_ATTENTION + "k_norm", side=_K),
        *_POST_NORMS,
        _gated_mlp(),
    ),
    sources=_sources(attention_norm=None, mlp_norm=None),
    output_norms={
        _ATTENTION + "q_proj.weight": _ATTENTION + "q_norm.weight",
        _ATTENTION + "k_proj.weight": _ATTENTION + "k_norm.weight",
        **_SUBLAYER_NORMS,
    },
)

PHI3 = Family(
    model_type="phi3",
    weights=_model(
        *_PRE_NORMS,
        _linear(_ATTENTION + "qkv_proj", (*_Q, *_K, *_K), _D),
        _linear(_ATTENTION + "o_proj", _D, _Q),
        _linear(_MLP + "gate_up_proj", (*_F, *_F), _D),
        _linear(_MLP + "down_proj", _D, _F),
    ),
    sources=_sources(attention=("qkv_proj",), mlp=("gate_up_proj",)),
    long_rope_from_hidden=True,
    code_taken_over=True,
)

# `no_rope_layers` may be longer than the model is deep.
SMOLLM3 = Family(
    model_type="smollm3",
    weights=_model(*_PRE_NORMS, _attention(bias_if="attention_bias"), _gated_mlp(bias_if="mlp_bias")),
    sources=_sources(),
    layer_lists=("layer_types", "no_rope_layers"),
)

# Its multipliers (embedding, attention, residual, logits) are constants of the config, not of the width.
GRANITE = Family(
    model_type="granite",
    weights=_model(*_PRE_NORMS, _attention(bias_if="attention_bias"), _gated_mlp(bias_if="mlp_bias")),
    sources=_sources(),
)

# LayerNorm1P: centres, gain stored minus one, bias; an MLP without a gate; rotary embedding on a part of each head.
NEMOTRON = Family(
    model_type="nemotron",
    weights=_model(
        _norm(_LAYER + "input_layernorm", bias=True),
        _norm(_LAYER + "post_attention_layernorm", bias=True),
        _attention(bias_if="attention_bias"),
        _linear(_MLP + "up_proj", _F, _D, bias_if="mlp_bias"),
        _linear(_MLP + "down_proj", _D, _F, bias_if="mlp_bias"),
        norm_bias=True,
    ),
    sources=_sources(mlp=("up_proj",)),
    gain_minus_one=True,
    norms_centre=True,
    eps_key="norm_eps",
    activations=("relu2",),
)

# Every layer has its router and experts; the weights of the chosen experts are normalised to sum to 1.
# Hidden size and expert width are multiples of 8: transformers' default product of all experts at once wants rows of 16 bytes, in bfloat16 too.
_MIXTRAL_EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}
MIXTRAL = Family(
    model_type="mixtral",
    weights=_model(*_PRE_NORMS, _attention(), _experts("block_sparse_moe", **_MIXTRAL_EXPERT)),
    sources=_sources(mlp_block=_LAYER + "block_sparse_moe.", mlp=("gate", "experts.{expert}.w1", "experts.{expert}.w3"), down="experts.{expert}.w2"),
    expert_keys=("num_local_experts",),
    width_multiple=8,
    parameters=_fused("block_sparse_moe", **_MIXTRAL_EXPERT),
)

# `intermediate_size` is that of dense layers, of which a teacher that is taken has none. Older readers know `num_experts` only.
_QWEN3_EXPERT = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    weights=_model(*_PRE_NORMS, _attention(bias_if="attention_bias"), *_HEAD_NORMS, _experts("mlp", **_QWEN3_EXPERT)),
    sources=_sources(mlp=("gate", "experts.{expert}.gate_proj", "experts.{expert}.up_proj"), down="experts.{expert}.down_proj"),
    intermediate_key="moe_intermediate_size",
    expert_keys=("num_local_experts", "num_experts"),
    width_multiple=8,
    parameters=_fused("mlp", **_QWEN3_EXPERT),
    presumed={"decoder_sparse_step": 1, "mlp_only_layers": []},
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, OLMO2, PHI3, SMOLLM3, GRANITE, NEMOTRON, MIXTRAL, QWEN3_MOE)
}
