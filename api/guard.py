"""Who may reach the service at all: addresses, host names, other sites' pages; and the security headers of every answer.

A browser runs pages of strangers inside the user's network. None of them may reach the service through a host name that it
points at its address (DNS rebinding), nor send it anything that changes something (cross-site request forgery).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem_response
from nas.errors import InvalidSpec, Problem
from nas.settings import Settings

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})

PROBES = frozenset({"/healthz", "/readyz"})
"""Asked by machines that know an address and no name; they tell nothing that is anybody's."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_STRICT = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

CONTENT_SECURITY_POLICY = f"{_STRICT}; img-src 'self' data:"
"""Of every answer that says nothing else: no script, style or address but the service's own."""

PLOTTED_SECURITY_POLICY = f"{_STRICT}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:"
"""Of pages with figures: plotly.js adds <style> elements of its own. Scripts are as elsewhere."""


_SESSION_COOKIE = re.compile(rb"(?:__Host-)?nas_session=[A-Za-z0-9_-]{1,100}")


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_single_user(settings: Settings) -> bool:
    """Whether the service may serve without keys: it listens on loopback, and nothing says that others are led to it."""
    return is_loopback(settings.host) and not settings.allowed_hosts


def check_exposure(settings: Settings, *, has_keys: bool) -> None:
    """Whether the service may begin to listen.

    Raises:
        InvalidSpec: others could reach it and it has no keys, or it does not know the names by which browsers reach it.
    """
    if is_single_user(settings):
        return
    if not has_keys:
        field, got = ("NAS_ALLOWED_HOSTS", ",".join(settings.allowed_hosts)) if is_loopback(settings.host) else ("NAS_HOST", settings.host)
        expected = "a service that only this machine reaches (a loopback address) as long as there is no API key; make one with `nas keys create`"
        raise InvalidSpec(Problem(field=field, expected=expected, got=got))
    if _is_every_address(settings.host) and not settings.allowed_hosts:
        expected = f"the names by which browsers reach a service that listens on {settings.host}, such as nas.example.org,10.0.0.7"
        raise InvalidSpec(Problem(field="NAS_ALLOWED_HOSTS", expected=expected, got="nothing"))


def allowed_hosts(settings: Settings) -> frozenset[str]:
    """The host names that requests may be sent to."""
    own = frozenset() if _is_every_address(settings.host) else frozenset({settings.host.lower()})
    return LOOPBACK_HOSTS | own | frozenset(settings.allowed_hosts)


def any_host_paths(settings: Settings) -> frozenset[str]:
    """Paths that are served under any host name. Prometheus, too, knows addresses only; where keys are needed, no page of a stranger has one."""
    return PROBES if is_single_user(settings) else PROBES | {"/metrics"}


def _is_every_address(host: str) -> bool:
    return host in ("0.0.0.0", "::")


class Guard:
    """Refuses requests to other host names and of other sites' pages, and adds the security headers to every answer."""

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str], any_host: frozenset[str] = PROBES) -> None:
        self.app = app
        self.hosts = hosts
        self.any_host = any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", CONTENT_SECURITY_POLICY)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "same-origin"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                if headers.get("Content-Type", "").startswith("text/html"):
                    headers["Cache-Control"] = "no-store"  # after a logout the browser's back button must show nothing
                elif headers.get("Cache-Control", "no-cache") == "no-cache":  # FastAPI's own, of event streams
                    headers["Cache-Control"] = "private, no-cache"  # a proxy must not keep one tenant's answer for another
            await send(message)

        scope["headers"] = list(_with_own_cookies(scope["headers"]))
        headers = Headers(scope=scope)
        if scope["path"] not in self.any_host and _host_name(headers.get("host", "")) not in self.hosts:
            detail = f"Host: expected one of {', '.join(sorted(self.hosts))}, got {headers.get('host', 'nothing')!r}"
            await problem_response(Request(scope), "bad-request", detail=detail)(scope, receive, send_with_headers)
        elif "transfer-encoding" in headers and "content-length" in headers:
            # Proxies and servers disagree on which one counts, and so on where the next request begins (RFC 9112, 6.3).
            detail = "the body: expected Content-Length or Transfer-Encoding, got both"
            await problem_response(Request(scope), "bad-request", detail=detail, headers={"Connection": "close"})(scope, receive, send_with_headers)
        elif scope["method"] not in SAFE_METHODS and (why := _cross_site(headers)) is not None:
            await problem_response(Request(scope), "cross-site", detail=why)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)


def _with_own_cookies(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    """The headers without the cookies of other services on the same host name, and without any in quotes.

    FastAPI parses all of them for every route, and Python before 3.11.10 takes five seconds over 50 kB of backslashes in quotes (CVE-2024-7592).
    """
    for name, value in headers:
        if name != b"cookie":
            yield name, value
        elif own := [part for cookie in value.split(b";") if _SESSION_COOKIE.fullmatch(part := cookie.strip())]:
            yield name, b"; ".join(own)


def _cross_site(headers: Headers) -> str | None:
    """Why a request that changes something is another site's; None if it is not, or comes from outside of a browser."""
    site = headers.get("sec-fetch-site", "none")
    if site not in ("same-origin", "none"):
        return f"Sec-Fetch-Site: expected same-origin, got {site!r}"
    origin = headers.get("origin")
    if origin is None:
        return None
    # The scheme is left out: behind a proxy that ends TLS this service sees http.
    scheme, _, place = origin.partition("://")
    if scheme.lower() not in ("http", "https") or place.lower() != headers.get("host", "").lower():
        return f"Origin: expected this service's own, at {headers.get('host', '')!r}, got {origin!r}"
    return None


def _host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
