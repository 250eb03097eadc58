"""Shape: the numbers of one architecture. It refuses impossible ones; what a *family* forbids lives in `families.py`."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nas.errors import InvalidSpec, Problem


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Shape:
    """Width, depth and heads of a decoder; every layer has the same. Hugging Face spelling.

    Raises:
        InvalidSpec: a number is not a positive integer, or the query heads do not divide among the KV heads.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    """Always written out: it is the teacher's, never `hidden_size / num_attention_heads`, once a model was pruned."""
    num_experts: int | None = None
    """Experts of each layer, whose width is `intermediate_size`; None: a dense model."""

    def __post_init__(self) -> None:
        problems = [
            Problem(field=field.name, expected="an integer of at least 1", got=repr(value))
            for field in fields(self)
            if (value := getattr(self, field.name)) is not field.default and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
        ]
        if not problems and self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                Problem(
                    field="num_attention_heads",
                    expected=f"a multiple of num_key_value_heads={self.num_key_value_heads}",
                    got=str(self.num_attention_heads),
                )
            )
        if problems:
            raise InvalidSpec(*problems)

    @property
    def query_heads_per_kv(self) -> int:
        """Query heads that share one KV head (a KV group)."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def key(self) -> str:
        """Canonical text of the shape; equal shapes, and only they, have equal keys."""
        experts = "" if self.num_experts is None else f"-X{self.num_experts}"
        return (
            f"L{self.num_hidden_layers}-D{self.hidden_size}-F{self.intermediate_size}"
            f"-H{self.num_attention_heads}-K{self.num_key_value_heads}-E{self.head_dim}{experts}"
        )

    @classmethod
    def from_key(cls, key: str) -> Shape:
        """The shape with this key.

        Raises:
            InvalidSpec: it is no key, or one of an impossible shape.
        """
        found = re.fullmatch(r"L(\d{1,9})-D(\d{1,9})-F(\d{1,9})-H(\d{1,9})-K(\d{1,9})-E(\d{1,9})(?:-X(\d{1,9}))?", key, flags=re.ASCII)
        if found is None:
            expected = "L(layers)-D(hidden)-F(MLP)-H(query heads)-K(KV heads)-E(head dim), with experts -X(experts): L4-D56-F144-H4-K4-E8"
            raise InvalidSpec(Problem(field="shape", expected=expected, got=repr(key[:200])))
        try:
            return cls(**{field.name: int(number) for field, number in zip(fields(cls), found.groups(), strict=True) if number is not None})
        except InvalidSpec as invalid:
            raise InvalidSpec(*(replace(problem, field=f"shape {key}: {problem.field}") for problem in invalid.problems)) from invalid

    def as_dict(self) -> dict[str, int]:
        """The numbers by name; a dense model has no `num_experts`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Shape:
        """A shape from plain numbers; unknown or missing names are an InvalidSpec."""
        names = [field.name for field in fields(cls)]
        problems = [Problem(field=name, expected="a field of Shape: " + ", ".join(names), got=name) for name in values if name not in names]
        problems += [Problem(field=name, expected="an integer", got="nothing") for name in names if name not in values and name != "num_experts"]
        if problems:
            raise InvalidSpec(*problems)
        return cls(**values)
