"""Who asks, and may they: a key, a browser's session, or the one user of a machine. Every path but the public ones goes through here.

What a path needs follows from its method, and the exceptions are one table: a new route is closed until somebody opens it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import quote

import anyio
from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.guard import PROBES, SAFE_METHODS
from api.limits import TokenBuckets
from api.principal import LOCAL_USER, Principal, current_principal, parse_bearer
from api.problems import answer_error, problem_response, wants_page
from nas.errors import KeyRefused, NasError, StoreUnavailable
from nas.store.access import KeyRecord
from nas.store.store import Store

logger = logging.getLogger(__name__)

REVALIDATE_SECONDS = 0.4
"""How often the key of an open stream is looked at again."""

FAILURES_PER_SECOND, FAILURES_AT_ONCE = 0.5, 20.0
"""Wrong keys that one address may try. A right key is never held up: behind a proxy many share an address, and 256 bits are not guessed."""

_PUBLIC = PROBES | {"/login"}
_PUBLIC_FOLDERS = ("/static/", "/problems/")

_SCOPES: dict[tuple[str, str], str | None] = {
    ("POST", "/v1/searches:preview"): "read",  # stores nothing
    ("POST", "/logout"): None,
    ("GET", "/metrics"): "admin",  # of all projects
    ("GET", "/v1/nodes"): "admin",
}
"""Where the method does not tell which scope is needed."""


def needed_scope(method: str, path: str) -> str | None:
    """The scope that a request needs; None: any key will do."""
    method = "GET" if method == "HEAD" else method
    return _SCOPES.get((method, path), "read" if method in SAFE_METHODS else "submit")


def is_public(path: str) -> bool:
    """Whether a path is served to anybody: it shows nothing of any project."""
    return path in _PUBLIC or path.startswith(_PUBLIC_FOLDERS)


def session_cookie(scheme: str) -> str:
    """The cookie's name. Over https it has the prefix that keeps other hosts of the domain and plain http from setting it."""
    return "__Host-nas_session" if scheme == "https" else "nas_session"


def read_session(request: Request) -> str | None:
    """The session's secret in a browser's cookie, if there is one."""
    return request.cookies.get(session_cookie(request.url.scheme))


class _Anonymous(Exception):
    """A request without a key, where one is needed; the message says what was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Credentials:
    """What a request shows of whom it comes from; secrets, so nothing prints it."""

    authorization: tuple[str, ...] = field(repr=False)
    session: str | None = field(repr=False)


class FailedKeys:
    """Counts the wrong keys of each address, for the log and for a limit."""

    def __init__(self) -> None:
        self._buckets = TokenBuckets(rate=FAILURES_PER_SECOND, burst=FAILURES_AT_ONCE)

    def count(self, request: Request, error: KeyRefused) -> int:
        """Whole seconds that the address has to wait before it may try another; 0 while it need not."""
        client = request.client.host if request.client else "unknown"
        if wait := self._buckets.take(client):
            return math.ceil(wait)
        logger.warning("a key was refused: %s", error, extra={"action": "refuse_key", "client": client})
        return 0


class Authentication:
    """Finds the principal of each request, or answers 401, 403 or 429 in its place; ends an open stream once its key is revoked or has expired."""

    def __init__(self, app: ASGIApp, *, store: Store, single_user: bool, requests_per_second: float, failed_keys: FailedKeys) -> None:
        self.app = app
        self._store = store
        self._single_user = single_user
        self._requests = TokenBuckets(rate=requests_per_second, burst=2 * requests_per_second)
        self._failed_keys = failed_keys
        self._looked: dict[_Credentials, tuple[float, asyncio.Task[bool]]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_public(scope["path"]):
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        credentials = _Credentials(authorization=tuple(request.headers.getlist("authorization")), session=read_session(request))
        try:
            principal = await run_in_threadpool(self._find, credentials)
            scope.setdefault("state", {})["principal"] = principal
            answer = self._limit(request, principal)
        except (KeyRefused, _Anonymous) as error:
            answer = self._refuse(request, error)
        except NasError as error:  # the application's own handlers are further in
            answer = answer_error(request, error)
        if answer is not None:
            await answer(scope, receive, send)
            return
        reset = current_principal.set(principal)
        try:
            await self._serve(scope, receive, send, is_still=lambda: self._is_still(principal, credentials))
        finally:
            current_principal.reset(reset)

    def _find(self, credentials: _Credentials) -> Principal:
        """Whose credentials these are. It asks the store, which blocks.

        Raises:
            KeyRefused, _Anonymous: nobody's.
        """
        if credentials.authorization:
            token = parse_bearer(credentials.authorization[0]) if len(credentials.authorization) == 1 else None
            if token is None:
                raise _Anonymous("Authorization: expected one header `Bearer KEY`, got something else")
            return _of_key(self._store.authenticate_key(token))
        if self._single_user and not self._store.has_keys():
            return LOCAL_USER
        if credentials.session is not None:
            return _of_key(self._store.authenticate_session(credentials.session))
        raise _Anonymous("Authorization: expected an API key (`Bearer nas_...`), got nothing")

    def _limit(self, request: Request, principal: Principal) -> Response | None:
        """Why this principal may not ask this, or not yet."""
        if principal.key_id is not None and (wait := self._requests.take(principal.key_id)):
            detail = f"the key {principal.key_id} asks too often; ask again in {wait:.2f} s"
            return problem_response(request, "too-many-requests", detail=detail, headers={"Retry-After": str(math.ceil(wait))})
        scope = needed_scope(request.method, request.scope["path"])  # not of the URL, in which a tab is nothing
        if scope is not None and scope not in principal.scopes:
            detail = f"{request.method} {request.url.path} needs a key with the scope {scope}; {principal.key_id} has {', '.join(sorted(principal.scopes))}"
            return problem_response(request, "missing-scope", detail=detail)
        return None

    def _refuse(self, request: Request, error: Exception) -> Response:
        if isinstance(error, KeyRefused) and (wait := self._failed_keys.count(request, error)):
            detail = f"too many wrong keys from this address; try again in {wait} s"
            return problem_response(request, "too-many-requests", detail=detail, headers={"Retry-After": str(wait)})
        if request.method == "GET" and wants_page(request):
            return RedirectResponse(f"/login?next={quote(_address(request), safe='')}", status_code=303)
        challenge = 'Bearer realm="nas", error="invalid_token"' if isinstance(error, KeyRefused) else 'Bearer realm="nas"'
        return problem_response(request, "unauthorized", detail=str(error), headers={"WWW-Authenticate": challenge})

    async def _serve(self, scope: Scope, receive: Receive, send: Send, *, is_still: Callable[[], Awaitable[bool]]) -> None:
        """Answer; a stream of events for as long as the principal is one."""
        watcher: asyncio.Task[None] | None = None

        async def watch() -> None:
            while await is_still():
                await asyncio.sleep(REVALIDATE_SECONDS)
            open_stream.cancel()

        async def send_watched(message: Message) -> None:
            nonlocal watcher
            if message["type"] == "http.response.start" and Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream"):
                watcher = asyncio.create_task(watch())
            await send(message)

        with anyio.CancelScope() as open_stream:
            try:
                await self.app(scope, receive, send_watched)
            finally:
                if watcher is not None:
                    watcher.cancel()
        if open_stream.cancelled_caught:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _is_still(self, principal: Principal, credentials: _Credentials) -> bool:
        """Whether the credentials are still those of the principal: asked a few times a second at most, however many streams they have open."""
        now = time.monotonic()
        self._looked = {known: answer for known, answer in self._looked.items() if now - answer[0] < REVALIDATE_SECONDS}
        if credentials not in self._looked:
            # A task, so that streams that ask meanwhile wait for the same answer.
            self._looked[credentials] = (now, asyncio.create_task(run_in_threadpool(self._look_again, principal, credentials)))
        return await asyncio.shield(self._looked[credentials][1])

    def _look_again(self, principal: Principal, credentials: _Credentials) -> bool:
        try:
            return self._find(credentials) == principal
        except StoreUnavailable:  # then no event comes out of it either, and when it is back this is asked again
            return True
        except (KeyRefused, _Anonymous):
            return False


def _of_key(key: KeyRecord) -> Principal:
    return Principal(project=key.project, scopes=key.scopes, key_id=key.id)


def _address(request: Request) -> str:
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")
