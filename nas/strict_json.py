"""JSON from outside, read strictly: no name twice, no number that is not finite, no coercion; what is wrong is told field by field."""

from __future__ import annotations

import json
from collections import Counter
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from nas.errors import InvalidSpec, Problem

_T = TypeVar("_T")

MAX_PROBLEMS = 100
"""So many wrong fields are told at most: a body has room for a hundred thousand."""

MAX_NAME_LENGTH = 200
"""Of an unknown name so many characters are compared with the names that there are."""


def read_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InvalidSpec: not JSON, nested too deeply, no object, or a name is twice in one.
    """
    try:
        values = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise InvalidSpec(Problem(field="(body)", expected="a JSON object", got=str(error))) from error
    if not isinstance(values, dict):
        raise InvalidSpec(Problem(field="(body)", expected="a JSON object", got=type(values).__name__))
    return values


def validate(values: dict[str, Any], *, adapter: TypeAdapter[_T]) -> _T:
    """The values as what the adapter makes of them.

    Raises:
        InvalidSpec: a field is unknown, missing, of another type or out of range.
    """
    try:
        # JSON mode: strict about types, yet an array is a tuple.
        return adapter.validate_json(json.dumps(values))
    except ValidationError as error:
        details = error.errors(include_url=False)
        # One wrong item also makes its tuple too short, since pydantic counts the valid ones: the item says it better.
        around = {detail["loc"][:length] for detail in details for length in range(len(detail["loc"]))}
        told = [detail for detail in details if detail["loc"] not in around]
        raise InvalidSpec(*(_problem(dict(detail), adapter=adapter) for detail in told[:MAX_PROBLEMS])) from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = sorted(name for name, count in counts.items() if count > 1)
        raise ValueError("the name " + ", ".join(map(repr, twice[:MAX_PROBLEMS])) + " twice in one object")
    return values


def _problem(detail: dict[str, Any], *, adapter: TypeAdapter[Any]) -> Problem:
    """pydantic's error as field, expected, got."""
    where = ".".join(str(part) for part in detail["loc"]) or "(body)"
    message = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    kind = str(detail["type"])
    if kind.startswith("missing"):
        return Problem(field=where, expected="a value", got="nothing")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return Problem(field=where, expected=_no_such_field(detail["loc"], fields=_fields_of(adapter)), got=_shorten(detail.get("input")))
    if kind == "too_short":
        return Problem(field=where, expected=f"at least {detail['ctx']['min_length']} item", got=_shorten(detail.get("input")))
    if kind == "string_pattern_mismatch":
        message = "a name of 1 to 96 letters, digits, dots, dashes and underscores, the first a letter or digit"
        if detail["loc"][:1] == ("objectives",):
            message = "parameters, memory_bytes, flops_per_token, prefill_ms:NAME or decode_ms:NAME"
        if detail["loc"][:1] == ("labels",) and detail["loc"][-1] != "[key]":
            message = "a line of text without control characters"
    if kind == "json_invalid":
        return Problem(field="(body)", expected="Unicode text in every string", got=message)
    return Problem(field=where, expected=message, got=_shorten(detail.get("input")))


def _no_such_field(where: tuple[int | str, ...], *, fields: tuple[str, ...]) -> str:
    """What was probably meant: the name as it is spelt there, or the place where there is one of that name."""
    *parents, name = ".".join("0" if isinstance(part, int) else part for part in where)[:MAX_NAME_LENGTH].split(".")
    inside = ".".join([*parents, ""])
    siblings = [field.removeprefix(inside) for field in fields if field.startswith(inside) and "." not in field.removeprefix(inside)]
    meant = [inside + close for close in get_close_matches(name, siblings, n=1)] or [field for field in fields if field.rpartition(".")[2] == name]
    if not meant:
        return "no such field"
    return "no such field; did you mean " + " or ".join(field.replace(".0.", "[].") for field in meant[:3]) + "?"


@lru_cache(maxsize=8)
def _fields_of(adapter: TypeAdapter[Any]) -> tuple[str, ...]:
    """Every field by its dotted path; an item of a list is 0."""
    schema = adapter.json_schema()
    found: list[str] = []

    def walk(node: dict[str, Any], path: tuple[str, ...]) -> None:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        for name, inner in node.get("properties", {}).items():
            found.append(".".join([*path, name]))
            walk(inner, (*path, name))
        if isinstance(node.get("items"), dict):
            walk(node["items"], (*path, "0"))
        for choice in node.get("anyOf", ()):
            walk(choice, path)

    walk(schema, ())
    return tuple(found)


def _shorten(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
