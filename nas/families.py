"""What a pruning code must know about a model family: one table row each, plain data, no torch.

A row lists every weight of the model with the axis of each of its sides. Counting (`cost.py`), sorting and slicing
(`compress/`) all read this table, so a family is added by one row. How: ARCHITECTURE.md, "Add a model family".

Axes: V vocabulary, D hidden, F intermediate, Q query heads x head_dim, K key/value heads x head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from nas.errors import InvalidSpec, TeacherUnavailable
from nas.shape import Shape


class Axis(StrEnum):
    """One side of a weight; which prefix of it a student keeps."""

    VOCAB = "V"
    HIDDEN = "D"
    INTERMEDIATE = "F"
    QUERY = "Q"
    KEY_VALUE = "K"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One tensor of the checkpoint. `{layer}` in the name stands for the layer's index."""

    name: str
    axes: tuple[Axis, ...]
    """The axis of each side, rows first, as in the safetensors file."""
    present_if: str | None = None
    """Config flag that must be true for the tensor to exist; None: always."""
    absent_if: str | None = None
    """Config flag that must be false for the tensor to exist; None: always."""
    is_norm: bool = False
    """A gain over the hidden axis, whose normaliser averages over the width (see slicing.py)."""
    in_embedding: bool = False
    """Counted as an embedding parameter: the input table and the untied output head."""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table."""

    model_type: str
    weights: tuple[Weight, ...]
    hidden_readers: Mapping[str, tuple[str, ...]]
    """Norm weight -> the weights that read its output over the hidden axis (their column side)."""
    neuron_reader: str
    """The weight whose columns read the MLP neurons."""
    head_reader: str
    """The weight whose columns read the attention heads' outputs."""
    hidden_divisible_by_heads: bool
    """transformers' config class refuses hidden_size % num_attention_heads != 0 even with an explicit head_dim."""


_A = Axis
_LAYER = "model.layers.{layer}."

LLAMA = Family(
    model_type="llama",
    weights=(
        Weight(name="model.embed_tokens.weight", axes=(_A.VOCAB, _A.HIDDEN), in_embedding=True),
        Weight(name=_LAYER + "input_layernorm.weight", axes=(_A.HIDDEN,), is_norm=True),
        Weight(name=_LAYER + "self_attn.q_proj.weight", axes=(_A.QUERY, _A.HIDDEN)),
        Weight(name=_LAYER + "self_attn.q_proj.bias", axes=(_A.QUERY,), present_if="attention_bias"),
        Weight(name=_LAYER + "self_attn.k_proj.weight", axes=(_A.KEY_VALUE, _A.HIDDEN)),
        Weight(name=_LAYER + "self_attn.k_proj.bias", axes=(_A.KEY_VALUE,), present_if="attention_bias"),
        Weight(name=_LAYER + "self_attn.v_proj.weight", axes=(_A.KEY_VALUE, _A.HIDDEN)),
        Weight(name=_LAYER + "self_attn.v_proj.bias", axes=(_A.KEY_VALUE,), present_if="attention_bias"),
        Weight(name=_LAYER + "self_attn.o_proj.weight", axes=(_A.HIDDEN, _A.QUERY)),
        Weight(name=_LAYER + "self_attn.o_proj.bias", axes=(_A.HIDDEN,), present_if="attention_bias"),
        Weight(name=_LAYER + "post_attention_layernorm.weight", axes=(_A.HIDDEN,), is_norm=True),
        Weight(name=_LAYER + "mlp.gate_proj.weight", axes=(_A.INTERMEDIATE, _A.HIDDEN)),
        Weight(name=_LAYER + "mlp.gate_proj.bias", axes=(_A.INTERMEDIATE,), present_if="mlp_bias"),
        Weight(name=_LAYER + "mlp.up_proj.weight", axes=(_A.INTERMEDIATE, _A.HIDDEN)),
        Weight(name=_LAYER + "mlp.up_proj.bias", axes=(_A.INTERMEDIATE,), present_if="mlp_bias"),
        Weight(name=_LAYER + "mlp.down_proj.weight", axes=(_A.HIDDEN, _A.INTERMEDIATE)),
        Weight(name=_LAYER + "mlp.down_proj.bias", axes=(_A.HIDDEN,), present_if="mlp_bias"),
        Weight(name="model.norm.weight", axes=(_A.HIDDEN,), is_norm=True),
        Weight(name="lm_head.weight", axes=(_A.VOCAB, _A.HIDDEN), absent_if="tie_word_embeddings", in_embedding=True),
    ),
    hidden_readers={
        _LAYER + "input_layernorm.weight": tuple(_LAYER + f"self_attn.{p}_proj.weight" for p in "qkv"),
        _LAYER + "post_attention_layernorm.weight": (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
        "model.norm.weight": ("lm_head.weight",),
    },
    neuron_reader=_LAYER + "mlp.down_proj.weight",
    head_reader=_LAYER + "self_attn.o_proj.weight",
    hidden_divisible_by_heads=True,
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (LLAMA,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A teacher's family, shape and the config facts that counting and slicing need. Built by `read_architecture`."""

    model_type: str
    shape: Shape
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The weights that this model's checkpoint holds; a tied head is not among them."""
        return tuple(
            weight
            for weight in self.family.weights
            if (weight.present_if is None or getattr(self, weight.present_if)) and not (weight.absent_if is not None and getattr(self, weight.absent_if))
        )

    def size(self, axis: Axis, shape: Shape) -> int:
        """Length of one axis in a model of `shape`."""
        match axis:
            case Axis.VOCAB:
                return self.vocab_size
            case Axis.HIDDEN:
                return shape.hidden_size
            case Axis.INTERMEDIATE:
                return shape.intermediate_size
            case Axis.QUERY:
                return shape.num_attention_heads * shape.head_dim
            case Axis.KEY_VALUE:
                return shape.num_key_value_heads * shape.head_dim


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a Hugging Face `config.json` describes.

    Raises:
        TeacherUnavailable: the `model_type` has no row, or a number is missing or impossible; the message names it.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise TeacherUnavailable(f"model_type: expected one of {', '.join(sorted(FAMILIES))} (a row of nas/families.py), got {model_type!r}")
    try:
        num_attention_heads = config["num_attention_heads"]
        shape = Shape(
            num_hidden_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_attention_heads=num_attention_heads,
            num_key_value_heads=config.get("num_key_value_heads") or num_attention_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // num_attention_heads,
        )
        vocab_size = config["vocab_size"]
    except KeyError as missing:
        raise TeacherUnavailable(f"config.json: expected the key {missing}, got none") from missing
    except InvalidSpec as invalid:
        raise TeacherUnavailable(f"config.json: {invalid}") from invalid
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
        raise TeacherUnavailable(f"config.json: vocab_size: expected an integer of at least 1, got {vocab_size!r}")
    return Architecture(
        model_type=model_type,
        shape=shape,
        vocab_size=vocab_size,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )
