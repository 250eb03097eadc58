"""Conditional requests: a version as an ETag, 304 for who has it already, 412 for who decided on another one (RFC 9110, 13)."""

from __future__ import annotations

import re

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')


def etag_of(version: int | str) -> str:
    """The ETag of a version."""
    return f'"{version}"'


def is_unchanged(request: Request, etag: str) -> bool:
    """Whether the caller has this version: If-None-Match names it, or says `*`."""
    header = request.headers.get("if-none-match", "")
    return header.strip() == "*" or etag.removeprefix("W/") in {f'"{tag}"' for _, tag in _TAG.findall(header)}


def not_modified(etag: str) -> Response:
    """304: what the caller has is what there is."""
    return Response(status_code=304, headers={"ETag": etag})


def check_match(request: Request, etag: str) -> bool:
    """Hold the caller to the version that they decided on; whether they named one (`*` is any that is there).

    Raises:
        HTTPException: 428 without If-Match, 412 where it names another version. Weak tags match nothing.
    """
    header = request.headers.get("if-match")
    if header is None:
        raise HTTPException(428, "If-Match: expected the ETag of the version to change, or *, got nothing")
    if header.strip() == "*":
        return False
    if etag not in {f'"{tag}"' for weak, tag in _TAG.findall(header) if not weak}:
        raise HTTPException(412, f"If-Match: expected {etag}, the present version, got {header[:80]}")
    return True
