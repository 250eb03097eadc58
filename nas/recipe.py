"""Recipe: how to distil a student in full, as a bundle's `recipe.json` writes it. Checked before anything is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from nas.errors import InvalidSpec, Problem
from nas.memory import Moments
from nas.spec import SearchSpec

FULL_RUN_FACTOR = 10
"""A full run's tokens in units of the last rung's: a start, not a law; Minitron's final runs take 50 times its short ones (94B, 1.8B)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to distil a student; a bundle's `recipe.json` is one."""

    tokens: int
    batch_size: int
    sequence_length: int
    learning_rate: float | None = None
    """Constant along the trunk; None: follows the loss (`trunk_rate`)."""
    warmup_tokens: int = 0
    decay_share: float = 0.2
    """The last share of the tokens, over which the rate falls linearly to zero."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.0
    validation_tokens: int = 32_768
    micro_batch_size: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    moments: Literal["auto", "float32", "offloaded", "bfloat16"] = "auto"
    """Optimiser state; auto: the first of them that fits."""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            Problem(field=name, expected=f"an integer of at least {least}", got=repr(value))
            for name, least in _INTEGERS.items()
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int) or value < least
        ]
        problems += [
            Problem(field=name, expected=f"a number in {interval}", got=repr(value))
            for name, (interval, holds) in _NUMBERS.items()
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, (int, float)) or not holds(value)
            if not (value is None and name == "learning_rate")
        ]
        if self.micro_batch_size is not None and (not isinstance(self.micro_batch_size, int) or self.micro_batch_size < 1):
            problems.append(Problem(field="micro_batch_size", expected="null or an integer of at least 1", got=repr(self.micro_batch_size)))
        if self.moments not in ("auto", *get_args(Moments)):
            problems.append(Problem(field="moments", expected=f"auto, {', '.join(get_args(Moments))}", got=repr(self.moments)))
        if self.dtype not in ("float32", "bfloat16"):
            problems.append(Problem(field="dtype", expected="float32 or bfloat16", got=repr(self.dtype)))
        if self.optimizer not in ("adamw", "muon"):
            problems.append(Problem(field="optimizer", expected="adamw or muon", got=repr(self.optimizer)))
        if not problems and self.validation_tokens < 2 * self.sequence_length:
            expected = f"at least two blocks of sequence_length={self.sequence_length}, whose spread is the standard error"
            problems.append(Problem(field="validation_tokens", expected=expected, got=str(self.validation_tokens)))
        if problems:
            raise InvalidSpec(*problems)

    @classmethod
    def read(cls, path: Path, **overrides: Any) -> Recipe:
        """The `distillation` of a recipe file, with what the caller says on top.

        Raises:
            InvalidSpec: no recipe, an unknown or missing field, or one out of range.
        """
        values = {**_read_recipe(path)["distillation"], **{name: value for name, value in overrides.items() if value is not None}}
        known = {field.name: field for field in fields(cls)}
        problems = [Problem(field=f"distillation.{name}", expected="no such field", got=repr(value)) for name, value in values.items() if name not in known]
        problems += [
            Problem(field=f"distillation.{name}", expected="a value", got="nothing")
            for name, field in known.items()
            if field.default is MISSING and name not in values
        ]
        if problems:
            raise InvalidSpec(*problems)
        return cls(**values)


_INTEGERS = {"tokens": 1, "batch_size": 1, "sequence_length": 8, "warmup_tokens": 0, "validation_tokens": 1, "seed": 0}
"""Least value of every integer of a recipe."""
_NUMBERS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": ("(0, 1] or null", lambda value: 0 < value <= 1),
    "decay_share": ("[0, 1)", lambda value: 0 <= value < 1),
    "weight_decay": ("[0, 10]", lambda value: 0 <= value <= 10),
}


def full_recipe(spec: SearchSpec, **overrides: Any) -> Recipe:
    """How a search's student is distilled in full: as in its rungs, with more tokens and another data order; what the caller says comes on top.

    Raises:
        InvalidSpec: an override is out of range, by itself or with the others.
    """
    short = spec.distillation
    values: dict[str, Any] = {
        "tokens": FULL_RUN_FACTOR * spec.rungs.tokens(spec.rungs.num_trained),
        "learning_rate": short.learning_rate,
        "batch_size": short.batch_size,
        "sequence_length": spec.corpus.sequence_length,
        "warmup_tokens": short.warmup_tokens,
        "decay_share": short.decay_share,
        "optimizer": short.optimizer,
        "weight_decay": short.weight_decay,
        "validation_tokens": spec.corpus.validation_tokens,
        "micro_batch_size": short.micro_batch_size,
        "dtype": short.dtype,
        "moments": short.moments,
        "seed": spec.seed + 1,  # another data order than the rungs'
    }
    return Recipe(**{**values, **overrides})


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeCorpus:
    """One corpus of the search's mixture."""

    name: str
    digest: str | None = None
    weight: float = 1.0
    """Its share of the blocks is weight / sum of weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeInputs:
    """The inputs that a recipe file was written for; one written by hand may leave them out."""

    teacher: str | None
    """Digest of the teacher that the student was cut out of."""
    corpora: tuple[RecipeCorpus, ...]
    teacher_folder: Path | None = None
    """The teacher that lies beside the recipe: a corrected one, which exists nowhere else."""

    @classmethod
    def read(cls, path: Path) -> RecipeInputs:
        """The `teacher` and `corpora` of a recipe file.

        Raises:
            InvalidSpec: no recipe, or they are not written as in a bundle's.
        """
        values = _read_recipe(path)
        try:
            teacher, folder = values.get("teacher", {}).get("digest"), values.get("teacher", {}).get("folder")
            teacher_folder = None if folder is None else path.parent / folder
            corpora = tuple(
                RecipeCorpus(**{name: entry[name] for name in ("name", "digest", "weight") if name in entry}) for entry in values.get("corpora", [])
            )
        except (AttributeError, TypeError) as error:
            expected = "`teacher` with a digest and `corpora`, a list with name, digest and weight, as in a bundle's recipe.json"
            raise InvalidSpec(Problem(field=str(path), expected=expected, got=f"{type(error).__name__}: {error}")) from error
        problems = [
            Problem(field=f"corpora.{index}.weight", expected="a number above 0", got=repr(corpus.weight))
            for index, corpus in enumerate(corpora)
            if isinstance(corpus.weight, bool) or not isinstance(corpus.weight, (int, float)) or not 0 < corpus.weight < math.inf
        ]
        if problems:
            raise InvalidSpec(*problems)
        return cls(teacher=teacher, corpora=corpora, teacher_folder=teacher_folder)


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values["distillation"], dict):
            raise TypeError(f"distillation is {values['distillation']!r}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        expected = "a JSON file with the object `distillation`, such as a bundle's recipe.json"
        raise InvalidSpec(Problem(field=str(path), expected=expected, got=f"{type(error).__name__}: {error}")) from error
    assert isinstance(values, dict)
    return values
