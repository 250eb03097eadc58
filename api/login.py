"""Logging in and out of the pages: a browser gives an API key once and gets a session's cookie for it."""

from __future__ import annotations

import re
from urllib.parse import parse_qs

from fastapi import APIRouter, FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, RedirectResponse, Response

from api.auth import FailedKeys, read_session, session_cookie
from api.rendering import TEMPLATES
from api.routes.dependencies import StoreDep
from nas.errors import KeyRefused

SESSION_SECONDS = 12 * 3600.0
"""How long a browser stays logged in."""

MAX_FORM_BYTES = 4096

# A path of this service. A second slash or a backslash would lead a browser to another host, and so would what it leaves out (tabs, line ends).
_PATH = re.compile(r"/(?:[A-Za-z0-9._~?=&%:-][A-Za-z0-9._~?=&%:/-]*)?", re.ASCII)

router = APIRouter(include_in_schema=False)


def install(app: FastAPI) -> None:
    """Add the pages for logging in and out."""
    app.include_router(router)


@router.get("/login")
def login_page(next: str = "/") -> HTMLResponse:
    return _page(next=next)


@router.post("/login")
async def log_in(request: Request, store: StoreDep) -> Response:
    """Begin a session; the key itself is kept nowhere."""
    fields = await _read_form(request)
    key_text, next = fields.get("key", "").strip(), fields.get("next", "/")
    failures: FailedKeys = request.app.state.failed_keys
    try:
        key = await run_in_threadpool(store.authenticate_key, key_text)
    except KeyRefused as error:
        if wait := failures.count(request, error):
            return _page(next=next, error=f"too many wrong keys; try again in {wait} s", status=429, headers={"Retry-After": str(wait)})
        return _page(next=next, error=str(error), status=401)
    token = await run_in_threadpool(store.begin_session, key, seconds=SESSION_SECONDS)
    answer = RedirectResponse(_own_path(next), status_code=303)
    is_https = request.url.scheme == "https"
    answer.set_cookie(session_cookie(request.url.scheme), token, max_age=int(SESSION_SECONDS), path="/", secure=is_https, httponly=True, samesite="strict")
    return answer


@router.post("/logout")
def log_out(request: Request, store: StoreDep) -> Response:
    """End the session; a key that was sent as a header stays as it is."""
    if (token := read_session(request)) is not None:
        store.end_session(token)
    answer = RedirectResponse("/login", status_code=303)
    is_https = request.url.scheme == "https"
    answer.delete_cookie(session_cookie(request.url.scheme), path="/", secure=is_https, httponly=True, samesite="strict")
    return answer


def _page(*, next: str, error: str | None = None, status: int = 200, headers: dict[str, str] | None = None) -> HTMLResponse:
    page = TEMPLATES.get_template("login.html").render(next=_own_path(next), error=error)
    return HTMLResponse(page, status_code=status, headers={"Cache-Control": "no-store", **(headers or {})})


def _own_path(text: str) -> str:
    """Where to go after logging in: a path of this service, or its first page."""
    return text if _PATH.fullmatch(text) else "/"


async def _read_form(request: Request) -> dict[str, str]:
    """The fields of a form; one that is too long or no form has none."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            return {}
    try:
        return {name: values[-1] for name, values in parse_qs(body.decode("ascii"), max_num_fields=8).items()}
    except ValueError:
        return {}
