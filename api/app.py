"""The web application: REST routes, pages, problems and the checks on every request. It opens no store and starts no server."""

from __future__ import annotations

import logging
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import openapi, pages, routes
from api.feed import Feed
from api.problems import install_problem_handlers, problem_response
from api.requests import RequestId
from api.schemas.common import Health
from nas.settings import Settings
from nas.store.store import Store

logger = logging.getLogger(__name__)

API_VERSION = "1.0"
"""Of the REST interface under /v1: it grows, and keeps what it has."""

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})

# plotly.js adds <style> elements of its own; nothing else in the pages is inline.
_CONTENT_SECURITY_POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def create_app(*, store: Store, settings: Settings, allow_remote: bool = False) -> FastAPI:
    """The application over an open store.

    Args:
        allow_remote: answer to any host name. Without it only to loopback names, so that a page of another site cannot
            reach the service through a host name that it points at 127.0.0.1 (DNS rebinding).
    """
    app = FastAPI(
        title="nas",
        summary="Neural architecture search for compressed language models",
        description=openapi.DESCRIPTION,
        version=API_VERSION,
        openapi_tags=openapi.TAGS,
        # Both load their scripts from a CDN; `pages.py` has one that works offline.
        docs_url=None,
        redoc_url=None,
    )
    app.state.store, app.state.settings, app.state.feed = store, settings, Feed(store)
    install_problem_handlers(app)
    app.include_router(routes.router)
    app.add_api_route(
        "/healthz", read_health, tags=["service"], operation_id="get_health", summary="Is the process alive?", response_model=Health, methods=["GET"]
    )
    app.add_api_route(
        "/readyz",
        read_readiness,
        tags=["service"],
        operation_id="get_readiness",
        summary="Does the store answer?",
        response_model=Health,
        methods=["GET"],
        responses=openapi.problems(503),
    )
    pages.install(app)
    app.add_middleware(Guard, allowed_hosts=None if allow_remote else LOOPBACK_HOSTS)
    app.add_middleware(RequestId)
    app.openapi = openapi.openapi_of(app)  # type: ignore[method-assign]
    return app


def read_health() -> Health:
    """Answers as long as the process does."""
    return Health(status="ok")


def read_readiness(request: Request) -> object:
    """Ready when the store answers a query."""
    try:
        request.app.state.store.active_states()
    except Exception as error:  # whatever the database throws means the same here: not ready
        logger.warning("the store does not answer", exc_info=error)
        return problem_response(request, "not-ready", detail="the store does not answer")
    return Health(status="ready")


class Guard:
    """Refuses requests of other sites' pages, and adds the security headers to every answer."""

    def __init__(self, app: ASGIApp, *, allowed_hosts: frozenset[str] | None) -> None:
        self.app = app
        self.allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _CONTENT_SECURITY_POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "same-origin"
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        headers = Headers(scope=scope)
        if self.allowed_hosts is not None and _host_name(headers.get("host", "")) not in self.allowed_hosts:
            detail = f"Host: expected one of {', '.join(sorted(self.allowed_hosts))}, got {headers.get('host', 'nothing')!r}"
            await problem_response(Request(scope), "bad-request", detail=detail)(scope, receive, send_with_headers)
        elif scope["method"] not in _SAFE_METHODS and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            detail = f"Sec-Fetch-Site: expected same-origin, got {headers['sec-fetch-site']!r}"
            await problem_response(Request(scope), "cross-site", detail=detail)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)


def _host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
