"""One model of a family: what its config says that counting, legality and slicing need. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nas.errors import InvalidSpec, Problem, TeacherUnavailable
from nas.families import FAMILIES, Axis, Family, Weight
from nas.shape import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A teacher's family, shape and the config facts that counting and slicing need. Built by `read_architecture`."""

    model_type: str
    shape: Shape
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    long_rope_share: float | None = None
    """Rotary share of each head where `long_rope_from_hidden` rules; None: it does not."""
    num_experts_per_tok: int | None = None
    """Experts that each token passes through; None: a dense family."""
    context_length: int | None = None
    """Most tokens of a sequence (`max_position_embeddings`); None: the config does not say."""

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

    def sizes(self, shape: Shape) -> dict[Axis, int]:
        """Length of every axis in a model of `shape`."""
        return {
            Axis.VOCAB: self.vocab_size,
            Axis.HIDDEN: shape.hidden_size,
            Axis.INTERMEDIATE: shape.intermediate_size,
            Axis.QUERY: shape.num_attention_heads * shape.head_dim,
            Axis.KEY_VALUE: shape.num_key_value_heads * shape.head_dim,
            Axis.HEAD_DIM: shape.head_dim,
            Axis.EXPERT: shape.num_experts or 0,
        }

    def config_values(self, shape: Shape) -> dict[str, int]:
        """The shape under the keys of the family's config."""
        values = shape.as_dict()
        values[self.family.intermediate_key] = values.pop("intermediate_size")
        num_experts = values.pop("num_experts", None)
        return values | {key: num_experts for key in self.family.expert_keys if num_experts is not None}

    def allows(self, *, hidden_size: Any, num_attention_heads: Any, num_experts: Any = None) -> Any:
        """Whether transformers takes a model of the family with these numbers (the intermediate size stands by itself).

        Integers, or integer arrays of one shape.
        """
        multiple = self.family.width_multiple
        allowed = (hidden_size > 0) & (hidden_size % multiple == 0)
        if self.family.hidden_divisible_by_heads:
            allowed = allowed & (hidden_size % num_attention_heads == 0)
        if (share := self.long_rope_share) is not None:
            allowed = allowed & (hidden_size // num_attention_heads * share // 1 == self.shape.head_dim * share // 1)
        if self.num_experts_per_tok is not None and num_experts is not None:
            allowed = allowed & (num_experts >= self.num_experts_per_tok)
        return allowed

    def allows_intermediate(self, intermediate_size: int) -> bool:
        return intermediate_size % self.family.width_multiple == 0

    def refusals(self, shape: Shape) -> tuple[Problem, ...]:
        """What `allows` forbids, in words, and experts where there can be none, or none where there must be; empty if nothing."""
        family, problems = self.family, []
        if (shape.num_experts is None) != (self.num_experts_per_tok is None):
            expected = f"none ({self.model_type} is dense)" if self.num_experts_per_tok is None else f"a number ({self.model_type} has experts)"
            problems.append(Problem(field="num_experts", expected=expected, got=str(shape.num_experts)))
        elif shape.num_experts is not None and shape.num_experts < (self.num_experts_per_tok or 0):
            expected = f"at least num_experts_per_tok={self.num_experts_per_tok}"
            problems.append(Problem(field="num_experts", expected=expected, got=str(shape.num_experts)))
        for name in ("hidden_size", "intermediate_size"):
            if (size := getattr(shape, name)) % family.width_multiple:
                expected = f"a multiple of {family.width_multiple}, as transformers' {self.model_type} runs no other"
                problems.append(Problem(field=name, expected=expected, got=str(size)))
        if not problems and not self.allows(hidden_size=shape.hidden_size, num_attention_heads=shape.num_attention_heads):
            expected = f"a multiple of num_attention_heads={shape.num_attention_heads}"
            if self.long_rope_share is not None:
                expected = f"{self.shape.head_dim} x num_attention_heads={shape.num_attention_heads} (long-context rope factors)"
            problems.append(Problem(field="hidden_size", expected=f"{expected}, as transformers' {self.model_type} wants it", got=str(shape.hidden_size)))
        return tuple(problems)


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a Hugging Face config describes; needs neither torch nor transformers.

    Args:
        config: with everything written out, as `check_teacher` stores it or `model.config.to_dict()` gives it: what a
            `config.json` leaves to a default differs between families.
    Raises:
        TeacherUnavailable: the `model_type` has no row, or a number is missing or impossible; the message names it.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise TeacherUnavailable(
            f"model_type: expected one of {', '.join(sorted(FAMILIES))}, got {model_type!r}; a new family is one row of nas/families.py: its weights "
            'with the axes of their sides, what reads them, its norms and the rules of its config (ARCHITECTURE.md, "A model family")'
        )
    family = FAMILIES[model_type]
    for key, value in family.presumed.items():
        if (got := config.get(key)) not in (None, value):
            raise TeacherUnavailable(f"config.json: {key}: expected {value!r} (dense layers between those with experts are not supported), got {got!r}")
    try:
        num_attention_heads = config["num_attention_heads"]
        shape = Shape(
            num_hidden_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config[family.intermediate_key],
            num_attention_heads=num_attention_heads,
            num_key_value_heads=config.get("num_key_value_heads") or num_attention_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // num_attention_heads,
            num_experts=config[next((key for key in family.expert_keys if key in config), family.expert_keys[0])] if family.expert_keys else None,
        )
        vocab_size = config["vocab_size"]
        num_experts_per_tok = config["num_experts_per_tok"] if family.expert_keys else None
    except KeyError as missing:
        raise TeacherUnavailable(f"config.json: expected the key {missing}, got none") from missing
    except InvalidSpec as invalid:
        raise TeacherUnavailable(f"config.json: {invalid}") from invalid
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
        raise TeacherUnavailable(f"config.json: vocab_size: expected an integer of at least 1, got {vocab_size!r}")
    if shape.num_experts is not None and not (isinstance(num_experts_per_tok, int) and 1 <= num_experts_per_tok <= shape.num_experts):
        raise TeacherUnavailable(f"config.json: num_experts_per_tok: expected 1 to {shape.num_experts}, the number of experts, got {num_experts_per_tok!r}")
    rope = config.get("rope_parameters") or {}
    architecture = Architecture(
        model_type=model_type,
        shape=shape,
        vocab_size=vocab_size,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        long_rope_share=float(rope.get("partial_rotary_factor", 1.0)) if family.long_rope_from_hidden and "long_factor" in rope else None,
        num_experts_per_tok=num_experts_per_tok,
        context_length=context if isinstance(context := config.get("max_position_embeddings"), int) else None,
    )
    if problems := architecture.refusals(shape):
        raise TeacherUnavailable(f"config.json: {problems[0]}")
    return architecture
