"""The bodies of requests: their size, their media type, and JSON that is read strictly."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

MAX_BODY_BYTES = 2**20


async def read_body(request: Request) -> bytes:
    """The raw body. FastAPI's own limit answers in plain text, and from outside every handler of ours."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body: expected at most {MAX_BODY_BYTES} bytes, got more")
    return bytes(body)


RawBodyDep = Annotated[bytes, Depends(read_body)]


async def read_json_body(request: Request, body: RawBodyDep) -> bytes:
    """A body of JSON, still as text: who reads it names the field that is wrong, and sees a NaN.

    Asking for the JSON media type also makes a browser ask before another site's page may send one.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"Content-Type: expected application/json, got {media_type or 'nothing'}")
    return body


JsonBodyDep = Annotated[bytes, Depends(read_json_body)]


async def read_no_body(body: RawBodyDep) -> None:
    """Of a request that has nothing to say: what it says all the same would be passed over.

    Raises:
        RequestValidationError: there is a body, and not an empty object.
    """
    if body.strip() not in (b"", b"{}"):
        raise RequestValidationError([{"type": "value_error", "loc": ("body",), "msg": "Input should be no body", "input": body[:80]}])
