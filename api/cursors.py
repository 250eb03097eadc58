"""Cursors: where a page of a list ended, as one opaque word. What a page is ordered by is in it, so that no other list takes it.

A cursor is the sort values of the last row (a keyset), never a count of rows: a page stays in step while rows come and go,
and costs the same however deep it is.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Query
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from api.schemas.common import Page

_Row = TypeVar("_Row")
_Item = TypeVar("_Item", bound=BaseModel)

MAX_CURSOR_LENGTH = 400

AfterCursor = Annotated[str | None, Query(max_length=MAX_CURSOR_LENGTH, pattern=r"^[A-Za-z0-9_-]+$", description="`next_cursor` of the page before.")]

Value = str | int | float | bool | None


def encode_cursor(order: str, *position: Value) -> str:
    """The cursor behind a row.

    Args:
        order: name of the list and of its order: `trials.-parameters`.
        position: the row's sort values; the last one is unique within the list.
    """
    text = json.dumps([order, *position], separators=(",", ":"), allow_nan=False)
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def decode_cursor(cursor: str, *, order: str, kinds: tuple[tuple[type, ...], ...], field: str = "after") -> tuple[Any, ...]:
    """The sort values of the row behind which the next page begins.

    Args:
        kinds: the types that each value may have; `bool` is none of `int`.

    Raises:
        RequestValidationError: no cursor that `encode_cursor` gave for this order.
    """
    try:
        values = json.loads(base64.b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
        is_ours = isinstance(values, list) and values[:1] == [order] and len(values) == 1 + len(kinds) and encode_cursor(*values) == cursor
    except (ValueError, RecursionError, binascii.Error):
        is_ours = False
    if not is_ours or not all(type(value) in allowed and _is_storable(value) for value, allowed in zip(values[1:], kinds, strict=True)):
        message = "Input should be the next_cursor of a page of this list in this order"
        raise RequestValidationError([{"type": "value_error", "loc": ("query", field), "msg": message, "input": cursor[:80]}])
    return tuple(values[1:])


def page_of(found: Sequence[_Row], *, limit: int, answer: Callable[[_Row], _Item], cursor: Callable[[_Row], str]) -> Page[_Item]:
    """A page out of the rows that were found: one more than `limit` where there are more.

    Args:
        answer: a row as the API tells it.
        cursor: where a row stands.
    """
    has_more = len(found) > limit
    rows = found[:limit]
    return Page(data=[answer(row) for row in rows], has_more=has_more, next_cursor=cursor(rows[-1]) if has_more else None)


def _is_storable(value: Value) -> bool:
    """Whether a database takes it as a question: integers of 64 bits, finite numbers, plain text."""
    if isinstance(value, str):
        return "\0" not in value and value.isprintable()
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or math.isfinite(value)
