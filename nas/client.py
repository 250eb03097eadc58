"""A typed client of the REST API, used by the CLI, the demo and the tests. Every error of the service is an `ApiError`."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2

from nas.errors import CorruptFile, InvalidSpec, NasError, Problem

TERMINAL_STATES = ("succeeded", "failed", "cancelled")
_BOARD_PAGE = 500
"""Rows of a leaderboard asked for at once."""
RECONNECT_SECONDS = (0.2, 0.5, 1.0, *(2.0 for _ in range(45)))
"""Waits between the tries of `follow` to take a broken stream up again: a restart of the service takes a few of them."""


BUSY_SECONDS = (1.0, 2.0, 4.0)
"""Waits, at the least, before a request is sent again that the service did not look at, since its key asks too often."""


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


def read_api_key(environment: Mapping[str, str]) -> str | None:
    """The key in the file that NAS_API_KEY_FILE names, else that of NAS_API_KEY, else none.

    Raises:
        InvalidSpec: it is no key; the message does not repeat it.
        OSError: the file cannot be read.
    """
    if path := environment.get("NAS_API_KEY_FILE", "").strip():
        name, text = "NAS_API_KEY_FILE", Path(path).expanduser().read_text(encoding="utf-8", errors="replace").strip()
    elif text := environment.get("NAS_API_KEY", "").strip():
        name = "NAS_API_KEY"
    else:
        return None
    if not re.fullmatch(r"[!-~]+", text):
        raise InvalidSpec(Problem(field=name, expected="one API key, nas_..., and nothing else", got="something else"))
    return text


class Client:
    """One connection to a service; a context manager. Answers are the API's JSON documents."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout_seconds: float = 30.0) -> None:
        self._url = url
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=timeout_seconds)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def is_ready(self) -> bool:
        """Whether the service answers."""
        try:
            return self._http.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def project(self) -> dict[str, Any]:
        """The project that the key opens, its scopes, its quotas and what is used of them."""
        return self._ask("GET", "/v1/project")

    def teachers(self) -> list[dict[str, Any]]:
        return list(self._pages("/v1/teachers"))

    def corpora(self) -> list[dict[str, Any]]:
        return list(self._pages("/v1/corpora"))

    def tasks(self) -> list[dict[str, Any]]:
        return list(self._pages("/v1/tasks"))

    def nodes(self) -> list[dict[str, Any]]:
        """Machines of the cluster: whether they get steps, and if not, why. Needs a key with the scope admin."""
        return list(self._pages("/v1/nodes"))

    def preview(self, spec: bytes, *, shapes: Sequence[str] = ()) -> dict[str, Any]:
        """What a spec would mean: legal shapes, budget, tokens, time; and whether these shapes are legal. No search is stored."""
        headers = {"Content-Type": "application/json"}
        return self._ask("POST", "/v1/searches:preview", content=spec, headers=headers, params={"shape": list(shapes)})

    def submit(self, spec: bytes, *, idempotency_key: str | None = None) -> dict[str, Any]:
        """Submit a spec (JSON); the same key and spec again give the same search."""
        headers = {"Content-Type": "application/json", **({"Idempotency-Key": idempotency_key} if idempotency_key else {})}
        return self._ask("POST", "/v1/searches", content=spec, headers=headers)

    def searches(self, *, state: str | None = None) -> list[dict[str, Any]]:
        return list(self._pages("/v1/searches", **({"state": state} if state else {})))

    def search(self, search_id: str) -> dict[str, Any]:
        return self._ask("GET", f"/v1/searches/{search_id}")

    def cancel(self, search_id: str) -> dict[str, Any]:
        return self._ask("POST", f"/v1/searches/{search_id}/cancel")

    def trials(self, search_id: str) -> list[dict[str, Any]]:
        return list(self._pages(f"/v1/searches/{search_id}/trials"))

    def trial(self, search_id: str, number: int) -> dict[str, Any]:
        return self._ask("GET", f"/v1/searches/{search_id}/trials/{number}")

    def attempts(self, search_id: str, *, trial: int | None = None) -> Iterator[dict[str, Any]]:
        """Every try at a step of the search, or of one of its trials; the latest first, asked for as they are needed."""
        return self._pages(f"/v1/searches/{search_id}/attempts", **({} if trial is None else {"trial": trial}))

    def log(self, search_id: str, attempt_id: str) -> str:
        """The end of what an attempt said, 64 KiB at most."""
        return self._send("GET", f"/v1/searches/{search_id}/attempts/{attempt_id}/log").text

    def leaderboard(self, search_id: str, *, most: int | None = None, **query: Any) -> dict[str, Any]:
        """The board of one of the search's budgets with all its rows of one version, or the first few.

        Args:
            most: rows at most; then `has_more` and `next_cursor` say whether and where there are others.
            query: `budget`, `sort`, `state`, `rung`, `pareto`, `min_parameters`, `max_parameters`, `after`, as the API names them.
        """
        for is_last_try in (False, False, True):
            try:
                return self._whole_leaderboard(search_id, most=most, query=query)
            except ApiError as error:
                # It takes minutes until a version is gone: only a very slow reader gets here.
                if error.status != 410 or is_last_try or "after" in query:
                    raise
        raise AssertionError("the last try returns or raises")

    def _whole_leaderboard(self, search_id: str, *, most: int | None, query: Mapping[str, Any]) -> dict[str, Any]:
        board: dict[str, Any] = {}
        rows: list[dict[str, Any]] = []
        asked = _given(query)
        while not board or (board["has_more"] and (most is None or len(rows) < most)):
            limit = _BOARD_PAGE if most is None else min(_BOARD_PAGE, most - len(rows))
            board = self._ask("GET", f"/v1/searches/{search_id}/leaderboard", params={**asked, "limit": limit})
            rows += board["rows"]
            asked["after"] = board["next_cursor"]
        return {**board, "rows": rows}

    def leaderboard_csv(self, search_id: str, **query: Any) -> str:
        """All rows of the board, or those that the query (see `leaderboard`) is about."""
        return self._send("GET", f"/v1/searches/{search_id}/leaderboard", params={"format": "csv", **_given(query)}).text

    def compare(self, first: str, second: str) -> dict[str, Any]:
        """Two searches side by side: what was asked differently, the shapes on both boards, best against best, and what each took."""
        return self._ask("GET", f"/v1/searches/{first}/compare", params={"with": second})

    def winner(self, search_id: str, *, budget: int = 0) -> dict[str, Any]:
        return self._ask("GET", f"/v1/searches/{search_id}/winner", params={"budget": budget})

    def download_bundle(self, search_id: str, *, target: Path, budget: int = 0) -> Path:
        """Save the bundle of a budget's winner (a tar file) and check its digest.

        Raises:
            CorruptFile: what arrived is not what the service announced. OSError: the target cannot be written.
        """
        expected = self.winner(search_id, budget=budget)["bundle_sha256"]
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        digest = hashlib.sha256()
        try:
            with self._http.stream("GET", f"/v1/searches/{search_id}/winner/bundle", params={"budget": budget}) as response, partial.open("wb") as file:
                if response.status_code != 200:
                    response.read()
                    raise _error(response)
                for chunk in response.iter_bytes():
                    digest.update(chunk)
                    file.write(chunk)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        if digest.hexdigest() != expected:
            partial.unlink()
            raise CorruptFile(f"bundle of {search_id}: expected sha256 {expected}, got {digest.hexdigest()}")
        return partial.replace(target)

    def events(self, search_id: str, *, after: int = 0) -> list[dict[str, Any]]:
        return list(self._pages(f"/v1/searches/{search_id}/events", after=after))

    def follow(self, search_id: str, *, after: int = 0) -> Iterator[dict[str, Any]]:
        """Events as they happen, until the one that ends the search; a broken connection is taken up where it broke.

        Raises:
            ApiError: no such search, or the service stays away.
        """
        self.search(search_id)  # a wrong id or address is told at once, not after all the waits
        waits = iter(RECONNECT_SECONDS)
        while True:
            try:
                with self._http.stream("GET", f"/v1/searches/{search_id}/events/stream", params={"after": after}, timeout=60.0) as response:
                    if response.status_code != 200:
                        response.read()
                        raise _error(response)
                    for frame in httpx2.EventSource(response):
                        waits = iter(RECONNECT_SECONDS)
                        if not frame.data:  # a comment that keeps the connection open
                            continue
                        event: dict[str, Any] = json.loads(frame.data)
                        after = event["sequence"]
                        yield event
                if self.search(search_id)["state"] in TERMINAL_STATES:
                    return
                last = ApiError(f"the event stream of {search_id} ends again and again", status=None, problem={})
            except httpx2.TransportError as error:
                last = self._unreachable(error)
            except ApiError as error:
                if error.status is not None and error.status < 500:
                    raise
                last = error
            wait = next(waits, None)
            if wait is None:
                raise last
            time.sleep(wait)

    def _pages(self, path: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        while True:
            page = self._ask("GET", path, params=parameters)
            yield from page["data"]
            if not page["has_more"]:
                return
            parameters["after"] = page["next_cursor"]

    def _ask(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        response = self._send(method, path, **arguments)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ApiError(f"{self._url} answered no JSON object to {method} {path}; is it the address of `nas serve`?", status=None, problem={})
        return answer

    def _send(self, method: str, path: str, **arguments: Any) -> httpx2.Response:
        for wait in (*BUSY_SECONDS, None):
            try:
                response = self._http.request(method, path, **arguments)
            except httpx2.TransportError as error:
                raise self._unreachable(error) from error
            if wait is None or not _asks_too_often(response):
                break
            time.sleep(max(wait, float(response.headers.get("Retry-After", "0"))))
        if response.status_code >= 300:
            raise _error(response)
        return response

    def _unreachable(self, error: Exception) -> ApiError:
        return ApiError(f"the service at {self._url} cannot be reached ({error}); is `nas serve` running?", status=None, problem={})


def _given(query: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in query.items() if value is not None}


def _problem(response: httpx2.Response) -> dict[str, Any]:
    is_problem = response.headers.get("content-type", "").startswith("application/problem+json")
    return dict(response.json()) if is_problem else {}


def _asks_too_often(response: httpx2.Response) -> bool:
    return response.status_code == 429 and _problem(response).get("type") == "/problems/too-many-requests"


def _error(response: httpx2.Response) -> ApiError:
    problem = _problem(response)
    lines = [f"{item['field']}: expected {item['expected']}, got {item['got']}" for item in problem.get("errors") or []]
    message = "\n".join(lines) or problem.get("detail") or problem.get("title") or f"HTTP {response.status_code}"
    if response.status_code == 401:
        message += "; give a key with NAS_API_KEY or `nas --key-file FILE` (an operator makes one: `nas keys create`)"
    if response.status_code == 429 and (seconds := response.headers.get("Retry-After")):
        message += f" (in {seconds} s)"
    return ApiError(message, status=response.status_code, problem=problem)
