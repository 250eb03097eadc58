from __future__ import annotations

import base64
import json

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st

from api.cursors import decode_cursor, encode_cursor

KINDS = ((str,), (int,), (float, type(None)))
POSITIONS = st.tuples(st.text("abc-_ é", max_size=8), st.integers(-(2**63), 2**63 - 1), st.none() | st.floats(allow_nan=False, allow_infinity=False))


@given(POSITIONS)
def test_a_cursor_is_read_as_it_was_written(position: tuple[str, int, float | None]) -> None:
    cursor = encode_cursor("list", *position)

    assert decode_cursor(cursor, order="list", kinds=KINDS) == position
    assert len(cursor) <= 400
    assert cursor.replace("-", "").replace("_", "").isalnum()


@given(st.text(max_size=60))
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(RequestValidationError):
        decode_cursor(text, order="list", kinds=KINDS)


@pytest.mark.parametrize(
    "values",
    [
        ["other", "a", 1, None],
        ["list", "a", 1],
        ["list", "a", 1, None, 2],
        ["list", "a", True, None],
        ["list", "a", 1.0, None],
        ["list", 1, 1, None],
        ["list", "a\0", 1, None],
        ["list", "\ud800", 1, None],
        ["list", "a", 2**63, None],
        ["list", [], 1, None],
        [],
        {},
        None,
    ],
)
def test_a_cursor_of_another_list_or_with_other_values_is_refused(values: object) -> None:
    cursor = base64.urlsafe_b64encode(json.dumps(values, separators=(",", ":")).encode()).rstrip(b"=").decode()

    with pytest.raises(RequestValidationError) as caught:
        decode_cursor(cursor, order="list", kinds=KINDS)

    assert caught.value.errors()[0]["loc"] == ("query", "after")


@pytest.mark.parametrize("text", ['["list", "a", 1, null]', '["list","a",1,NaN]', "[" * 5000])
def test_another_spelling_of_a_cursor_is_refused(text: str) -> None:
    with pytest.raises(RequestValidationError):
        decode_cursor(base64.urlsafe_b64encode(text.encode()).decode().rstrip("="), order="list", kinds=KINDS)
