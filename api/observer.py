"""One line in the log and one count in the metrics for every request, and its name in every line that is said meanwhile."""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.metrics import RequestMetrics
from nas.logs import about

logger = logging.getLogger("api.access")

UNMATCHED = "(none)"
"""Route of a request that reached none: a wrong address, or one that was refused before."""
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked every few seconds by machines: told only when something is wrong."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Observer:
    """Watches requests pass. It stands inside the middleware that names them, and outside of all others.

    A line holds the route's template and never the address itself, which may hold what is nobody's business.
    """

    def __init__(self, app: ASGIApp, *, metrics: RequestMetrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status, is_stream = 500, False

        async def watched(message: Message) -> None:
            nonlocal status, is_stream
            if message["type"] == "http.response.start":
                status = message["status"]
                is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
                if is_stream:
                    self._metrics.streams.inc()
            await send(message)

        with about(request_id=scope.get("state", {}).get("request_id")):
            try:
                await self.app(scope, receive, watched)
            except Exception:
                logger.exception("the request failed", extra={"action": "request_failed"})
                raise
            finally:
                self._tell(scope, status=status, seconds=time.perf_counter() - began, is_stream=is_stream)

    def _tell(self, scope: Scope, *, status: int, seconds: float, is_stream: bool) -> None:
        method, route = scope["method"] if scope["method"] in _METHODS else "OTHER", route_of(scope)
        self._metrics.requests.labels(method=method, route=route, status=str(status)).inc()
        if is_stream:
            self._metrics.streams.dec()
        else:
            self._metrics.seconds.labels(method=method, route=route).observe(seconds)
        level = logging.WARNING if status >= 500 else logging.DEBUG if route in _QUIET and status < 400 else logging.INFO
        principal: Any = scope.get("state", {}).get("principal")
        values = {"action": "request", "method": method, "route": route, "status": status, "ms": round(seconds * 1000, 1)}
        logger.log(level, "%s %s %d", method, route, status, extra={**values, "key": getattr(principal, "key_id", None)})


def is_probe(scope: Scope) -> bool:
    """Whether a machine only looks in."""
    return scope.get("path") in _QUIET


def route_of(scope: Scope) -> str:
    """The template of the route that took a request: `/v1/searches/{search_id}`."""
    # FastAPI keeps the template with the prefixes of the including routers apart from the route itself.
    context = scope.get("fastapi", {}).get("effective_route_context") or scope.get("route")
    if context is not None:
        return str(getattr(context, "path_format", None) or UNMATCHED)
    return "/static/{path}" if scope.get("path", "").startswith("/static/") and "endpoint" in scope else UNMATCHED
