"""The name of a request: in its answer's header, in every problem, and in the log."""

from __future__ import annotations

import re
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADER = "X-Request-Id"

_GIVEN = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What a proxy or a client may name a request; anything else could forge lines of a log."""


class RequestId:
    """Names every request: as its header does, or by a new id. The outermost middleware, so that every answer has the name."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        name = given if _GIVEN.fullmatch(given) else f"req_{uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = name

        async def send_with_name(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = name
            await send(message)

        await self.app(scope, receive, send_with_name)


def request_id(request: Request) -> str:
    """The name that the middleware gave it."""
    name: str = request.state.request_id
    return name
