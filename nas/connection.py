"""HTTP as the client speaks it: one connection, errors as `ApiError`, pages to their end, what may be sent again is, downloads go on where they broke."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import httpx2

from nas.errors import CorruptFile, NasError

BUSY_SECONDS = (1.0, 2.0, 4.0)
"""Waits, at the least, before a request is sent again that the service did not look at, or whose connection broke."""

_NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.UnsupportedProtocol)


class ApiError(NasError):
    """The service refused a request, or could not be reached.

    Attributes:
        status: HTTP status; None when there was no answer.
        problem: the problem document (RFC 9457), empty when there was none.
    """

    def __init__(self, message: str, *, status: int | None, problem: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.status = status
        self.problem = problem


class Connection:
    """One connection to a service; a context manager. Answers are the API's JSON documents."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout_seconds: float = 30.0) -> None:
        self._url = url
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def _pages(self, path: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """The items of a list, page after page; parameters that are None are left out."""
        asked = given(parameters)
        while True:
            page = self._ask("GET", path, params=asked)
            yield from page["data"]
            if not page["has_more"]:
                return
            asked["after"] = page["next_cursor"]

    def _act(self, path: str, *, idempotency_key: str | None = None, headers: Mapping[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
        """A request that acts. It has a key, its own if none is given: sent again after a broken connection, it acts once."""
        named = {"Idempotency-Key": idempotency_key or f"nas-{uuid4().hex}", **(headers or {})}
        return self._ask("POST", path, headers=named, **arguments)

    def _ask(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """A request whose answer is a JSON object."""
        response = self._send(method, path, **arguments)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ApiError(f"{self._url} answered no JSON object to {method} {path}; is it the address of `nas serve`?", status=None, problem={})
        return answer

    def _send(self, method: str, path: str, **arguments: Any) -> httpx2.Response:
        is_repeatable = method == "GET" or "Idempotency-Key" in arguments.get("headers", {})
        for wait in (*BUSY_SECONDS, None):
            try:
                response = self._http.request(method, path, **arguments)
            except httpx2.TransportError as error:
                if wait is None or not is_repeatable or isinstance(error, _NEVER_SENT):
                    raise self._unreachable(error) from error
                time.sleep(wait)
                continue
            if wait is None or not (_asks_too_often(response) or (response.status_code == 503 and is_repeatable)):
                break
            time.sleep(max(wait, float(response.headers.get("Retry-After", "0"))))
        if response.status_code >= 300:
            raise error_of(response)
        return response

    def _download(self, path: str, *, sha256: str, target: Path, **parameters: Any) -> Path:
        """Save a file and check its digest. A connection that breaks is taken up where it broke, also by a later call.

        Raises:
            CorruptFile: what arrived is not what the service announced. OSError: the target cannot be written.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{sha256[:12]}.partial")
        for wait in (*BUSY_SECONDS, None):
            try:
                self._fetch(path, partial=partial, sha256=sha256, parameters=parameters)
                break
            except httpx2.TransportError as error:
                if wait is None or isinstance(error, _NEVER_SENT):
                    raise self._unreachable(error) from error
                time.sleep(wait)
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            partial.unlink()
            raise CorruptFile(f"{target.name}: expected sha256 {sha256}, got {digest}")
        return partial.replace(target)

    def _fetch(self, path: str, *, partial: Path, sha256: str, parameters: Mapping[str, Any]) -> None:
        """What is missing of a file, appended to what is there."""
        there = partial.stat().st_size if partial.exists() else 0
        headers = {"Range": f"bytes={there}-", "If-Range": f'"{sha256}"'} if there else {}
        with self._http.stream("GET", path, params=parameters, headers=headers) as response:
            if response.status_code == 416:  # nothing is missing: the digest tells
                return
            if response.status_code not in (200, 206):
                response.read()
                raise error_of(response)
            with partial.open("ab" if response.status_code == 206 else "wb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)

    def _unreachable(self, error: Exception) -> ApiError:
        return ApiError(f"the service at {self._url} cannot be reached ({error}); is `nas serve` running?", status=None, problem={})


def given(query: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that are not None."""
    return {name: value for name, value in query.items() if value is not None}


def error_of(response: httpx2.Response) -> ApiError:
    """A refusal as one message: field by field where the service names them."""
    problem = _problem(response)
    lines = [f"{item['field']}: expected {item['expected']}, got {item['got']}" for item in problem.get("errors") or []]
    message = "\n".join(lines) or problem.get("detail") or problem.get("title") or f"HTTP {response.status_code}"
    if response.status_code == 401:
        message += "; give a key with NAS_API_KEY or `nas --key-file FILE` (an operator makes one: `nas keys create`)"
    if response.status_code >= 500 and (name := problem.get("request_id")):
        message += f" (request {name})"
    if response.status_code in (429, 503) and (seconds := response.headers.get("Retry-After")):
        message += f" (try again in {seconds} s)"
    return ApiError(message, status=response.status_code, problem=problem)


def _problem(response: httpx2.Response) -> dict[str, Any]:
    is_problem = response.headers.get("content-type", "").startswith("application/problem+json")
    return dict(response.json()) if is_problem else {}


def _asks_too_often(response: httpx2.Response) -> bool:
    return response.status_code == 429 and _problem(response).get("type") == "/problems/too-many-requests"
