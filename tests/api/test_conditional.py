from __future__ import annotations

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from api.conditional import check_match, etag_of, is_unchanged


def a_request(**headers: str) -> Request:
    return Request({"type": "http", "headers": [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]})


@pytest.mark.parametrize(
    ("header", "expected"),
    [('"7"', True), ('W/"7"', True), ('"6", "7"', True), ('"6",W/"7"', True), ("*", True), ('"6"', False), ("7", False), ("", False), ('"7', False)],
)
def test_who_has_the_version_is_told_that_nothing_changed(header: str, expected: bool) -> None:
    assert is_unchanged(a_request(if_none_match=header), etag_of(7)) is expected


@pytest.mark.parametrize(("header", "named"), [('"7"', True), ('"6", "7"', True), ("*", False)])
def test_the_present_version_may_be_changed(header: str, named: bool) -> None:
    assert check_match(a_request(if_match=header), etag_of(7)) is named


@pytest.mark.parametrize("header", ['"6"', 'W/"7"', "7", "", "\xff"])
def test_another_version_may_not_be_changed(header: str) -> None:
    with pytest.raises(HTTPException) as caught:
        check_match(a_request(if_match=header), etag_of(7))

    assert caught.value.status_code == 412


def test_a_change_needs_a_version() -> None:
    with pytest.raises(HTTPException) as caught:
        check_match(a_request(), etag_of(7))

    assert caught.value.status_code == 428
