"""A typed client of the REST API, used by the CLI, the demo and the tests. Every error of the service is an `ApiError`.

A method for every operation. What acts is sent with an Idempotency-Key: a connection that breaks does nothing twice.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2

from nas.connection import ApiError, Connection, error_of, given
from nas.errors import InvalidSpec, Problem

TERMINAL_STATES = ("succeeded", "failed", "cancelled")
_BOARD_PAGE = 500
"""Rows of a leaderboard asked for at once."""
RECONNECT_SECONDS = (0.2, 0.5, 1.0, *(2.0 for _ in range(45)))
"""Waits between the tries of `follow` to take a broken stream up again: a restart of the service takes a few of them."""
BUNDLE_SECONDS = 1.0
"""Between two looks at a bundle that is being packed."""
UPDATE_TRIES = 5
"""A search at work changes all the time: so often its change is tried on the version that was just read."""

JSON = {"Content-Type": "application/json"}


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


class Client(Connection):
    """A service, operation by operation; a context manager. Answers are the API's JSON documents."""

    def is_ready(self) -> bool:
        """Whether the service answers."""
        try:
            return self._http.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def project(self) -> dict[str, Any]:
        """The project that the key opens, its scopes, its quotas and what is used of them."""
        return self._ask("GET", "/v1/project")

    def is_alive(self) -> bool:
        """Whether the process answers, whatever its store is at."""
        try:
            return self._http.get("/healthz").status_code == 200
        except httpx2.TransportError:
            return False

    def version(self) -> dict[str, Any]:
        """Versions of the service, its libraries and its schema."""
        return self._ask("GET", "/version")

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
        return self._ask("POST", "/v1/searches:preview", content=spec, headers=JSON, params={"shape": list(shapes)})

    def submit(self, spec: bytes, *, idempotency_key: str | None = None) -> dict[str, Any]:
        """Submit a spec (JSON); the same key and spec again give the same search."""
        return self._act("/v1/searches", idempotency_key=idempotency_key, headers=JSON, content=spec)

    def searches(
        self, *, state: str | None = None, labels: Mapping[str, str] | None = None, created_after: str | None = None, created_before: str | None = None
    ) -> list[dict[str, Any]]:
        """Newest first; in one state, with all of these labels, submitted at or after one time and before another (RFC 3339)."""
        named = [f"{name}:{value}" for name, value in (labels or {}).items()]
        return list(self._pages("/v1/searches", state=state, label=named or None, created_after=created_after, created_before=created_before))

    def search(self, search_id: str) -> dict[str, Any]:
        return self._ask("GET", f"/v1/searches/{search_id}")

    def cancel(self, search_id: str) -> dict[str, Any]:
        return self._act(f"/v1/searches/{search_id}/cancel")

    def pause(self, search_id: str) -> dict[str, Any]:
        return self._act(f"/v1/searches/{search_id}/pause")

    def resume(self, search_id: str) -> dict[str, Any]:
        return self._act(f"/v1/searches/{search_id}/resume")

    def update(
        self, search_id: str, *, max_trials: int | None = None, max_parallel_trials: int | None = None, labels: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Change what may change of a search that has not ended, on the version that is there now."""
        changes = given({"max_trials": max_trials, "max_parallel_trials": max_parallel_trials, "labels": labels})
        for is_last_try in (*(False for _ in range(UPDATE_TRIES - 1)), True):
            version = self.search(search_id)["version"]
            try:
                return self._ask("PATCH", f"/v1/searches/{search_id}", json=changes, headers={"If-Match": f'"{version}"'})
            except ApiError as error:
                if error.status != 412 or is_last_try:
                    raise
        raise AssertionError("the last try returns or raises")

    def delete(self, search_id: str) -> None:
        """Forget a search that has ended, with all that belongs to it."""
        self._send("DELETE", f"/v1/searches/{search_id}")

    def trials(self, search_id: str, *, state: str | None = None, origin: str | None = None, sort: str = "number") -> list[dict[str, Any]]:
        """In the order of `sort` (`number`, `parameters`; a minus is the largest first); in one state, of one origin."""
        return list(self._pages(f"/v1/searches/{search_id}/trials", state=state, origin=origin, sort=sort))

    def trial(self, search_id: str, number: int) -> dict[str, Any]:
        return self._ask("GET", f"/v1/searches/{search_id}/trials/{number}")

    def trial_metrics(self, search_id: str, number: int, *, rung: int | None = None, max_points: int = 1000) -> dict[str, Any]:
        """A trial's learning curve, or an even choice of its points."""
        return self._ask("GET", f"/v1/searches/{search_id}/trials/{number}/metrics", params=given({"rung": rung, "max_points": max_points}))

    def retry(self, search_id: str, number: int) -> dict[str, Any]:
        """Let a failed trial wait for its next rung again."""
        return self._act(f"/v1/searches/{search_id}/trials/{number}/retry")

    def attempts(self, search_id: str, *, trial: int | None = None) -> Iterator[dict[str, Any]]:
        """Every try at a step of the search, or of one of its trials; the latest first, asked for as they are needed."""
        return self._pages(f"/v1/searches/{search_id}/attempts", trial=trial)

    def log(self, search_id: str, attempt_id: str) -> str:
        """The end of what an attempt said, 64 KiB at most."""
        return self._send("GET", f"/v1/searches/{search_id}/attempts/{attempt_id}/log").text

    def leaderboard(self, search_id: str, *, most: int | None = None, **query: Any) -> dict[str, Any]:
        """The board of one of the search's budgets with all its rows of one version, or the first few.

        Args:
            most: rows at most; then `has_more` and `next_cursor` say whether and where there are others.
            query: `budget`, `sort`, `state`, `rung`, `pareto`, `min_parameters`, `max_parameters`, `after`, as the API names them.
        """
        try:
            return self._whole_leaderboard(search_id, most=most, query=query)
        except ApiError as error:
            if error.status != 410:
                raise
        # The version went while it was read, which takes minutes: begin again with the newest.
        return self._whole_leaderboard(search_id, most=most, query=query)

    def _whole_leaderboard(self, search_id: str, *, most: int | None, query: Mapping[str, Any]) -> dict[str, Any]:
        board: dict[str, Any] = {}
        rows: list[dict[str, Any]] = []
        asked = given(query)
        while not board or (board["has_more"] and (most is None or len(rows) < most)):
            limit = _BOARD_PAGE if most is None else min(_BOARD_PAGE, most - len(rows))
            board = self._ask("GET", f"/v1/searches/{search_id}/leaderboard", params={**asked, "limit": limit})
            rows += board["rows"]
            asked["after"] = board["next_cursor"]
        return {**board, "rows": rows}

    def leaderboard_csv(self, search_id: str, **query: Any) -> str:
        """All rows of the board, or those that the query (see `leaderboard`) is about."""
        return self._send("GET", f"/v1/searches/{search_id}/leaderboard", params={"format": "csv", **given(query)}).text

    def compare(self, first: str, second: str) -> dict[str, Any]:
        """Two searches side by side: what was asked differently, the shapes on both boards, best against best, and what each took."""
        return self._ask("GET", f"/v1/searches/{first}/compare", params={"with": second})

    def importances(self, search_id: str, *, budget: int = 0) -> dict[str, float]:
        """Share of the spread of log KL that each choice explains, the largest first; empty before there is a winner."""
        found: dict[str, float] = self._ask("GET", f"/v1/searches/{search_id}/importances", params={"budget": budget})["importances"]
        return found

    def winner(self, search_id: str, *, budget: int = 0) -> dict[str, Any]:
        return self._ask("GET", f"/v1/searches/{search_id}/winner", params={"budget": budget})

    def winner_as(self, search_id: str, *, format: str, budget: int = 0) -> str:
        """The winner as text: `hf-config` is its config.json, `yaml` all of it."""
        return self._send("GET", f"/v1/searches/{search_id}/winner", params={"format": format, "budget": budget}).text

    def download_bundle(self, search_id: str, *, target: Path, budget: int = 0) -> Path:
        """Save the bundle of a budget's winner (a tar file) and check its digest.

        Raises:
            CorruptFile: what arrived is not what the service announced. OSError: the target cannot be written.
        """
        expected = self.winner(search_id, budget=budget)["bundle_sha256"]
        return self._download(f"/v1/searches/{search_id}/winner/bundle", sha256=expected, target=target, budget=budget)

    def request_bundle(self, search_id: str, number: int) -> dict[str, Any]:
        """Have the bundle of a verified trial packed; again is no error, and one that failed is tried again."""
        return self._act(f"/v1/searches/{search_id}/trials/{number}/bundle")

    def download_trial_bundle(self, search_id: str, number: int, *, target: Path) -> Path:
        """Save a verified trial's bundle (a tar file), packed first where it is not yet, and check its digest. Raises as `download_bundle` does.

        Raises:
            ApiError: the trial was not verified, its student was not kept, or it could not be packed.
        """
        bundle = self.request_bundle(search_id, number)
        while bundle["state"] == "waiting":
            time.sleep(BUNDLE_SECONDS)
            bundle = self.trial(search_id, number)["bundle"]
        path = f"/v1/searches/{search_id}/trials/{number}/bundle"
        if bundle["state"] == "failed":
            self._send("GET", path)  # which is refused, and says why
        return self._download(path, sha256=bundle["sha256"], target=target)

    def download(self, sha256: str, *, target: Path) -> Path:
        """Save a file by its digest, which is checked. Raises as `download_bundle` does."""
        return self._download(f"/v1/artifacts/{sha256}", sha256=sha256, target=target)

    def distil(self, request: bytes, *, idempotency_key: str | None = None) -> dict[str, Any]:
        """Submit a full distillation (JSON); the same key and request again give the same one."""
        return self._act("/v1/distillations", idempotency_key=idempotency_key, headers=JSON, content=request)

    def distillations(self, *, search: str | None = None, state: str | None = None) -> list[dict[str, Any]]:
        """Full distillations, newest first; of one search's students, in one state."""
        return list(self._pages("/v1/distillations", search=search, state=state))

    def distillation(self, distillation_id: str) -> dict[str, Any]:
        """One full distillation, with its attempts and its learning curve."""
        return self._ask("GET", f"/v1/distillations/{distillation_id}")

    def cancel_distillation(self, distillation_id: str) -> dict[str, Any]:
        return self._act(f"/v1/distillations/{distillation_id}/cancel")

    def delete_distillation(self, distillation_id: str) -> None:
        """Forget a distillation that has ended, with its file."""
        self._send("DELETE", f"/v1/distillations/{distillation_id}")

    def distillation_log(self, distillation_id: str, *, attempt: str | None = None) -> str:
        """The end of what its latest attempt, or another one, said."""
        return self._send("GET", f"/v1/distillations/{distillation_id}/log", params=given({"attempt": attempt})).text

    def download_distillation(self, distillation_id: str, *, target: Path) -> Path:
        """Save the distilled model (a tar file) and check its digest. Raises as `download_bundle` does.

        Raises:
            ApiError: it has not succeeded.
        """
        path, result = f"/v1/distillations/{distillation_id}/file", self.distillation(distillation_id)["result"]
        if result is None:
            self._send("GET", path)  # which is refused, and says why
        return self._download(path, sha256=result["sha256"], target=target)

    def distillation_events(self, distillation_id: str, *, after: int = 0) -> list[dict[str, Any]]:
        return list(self._pages(f"/v1/distillations/{distillation_id}/events", after=after))

    def follow_distillation(self, distillation_id: str, *, after: int = 0, on_break: Callable[[ApiError], None] | None = None) -> Iterator[dict[str, Any]]:
        """Its events as they happen; otherwise as `follow`."""
        return self._follow(f"/v1/distillations/{distillation_id}", after=after, on_break=on_break)

    def events(self, search_id: str, *, after: int = 0) -> list[dict[str, Any]]:
        return list(self._pages(f"/v1/searches/{search_id}/events", after=after))

    def follow(self, search_id: str, *, after: int = 0, on_break: Callable[[ApiError], None] | None = None) -> Iterator[dict[str, Any]]:
        """Events as they happen, until the one that ends the search; a broken connection is taken up where it broke.

        Args:
            on_break: told once of each time that the service is away, before it is waited for.
        Raises:
            ApiError: no such search, or the service stays away.
        """
        return self._follow(f"/v1/searches/{search_id}", after=after, on_break=on_break)

    def _follow(self, path: str, *, after: int, on_break: Callable[[ApiError], None] | None) -> Iterator[dict[str, Any]]:
        self._ask("GET", path)  # a wrong id or address is told at once, not after all the waits
        waits, is_broken = iter(RECONNECT_SECONDS), False
        while True:
            was_broken, is_broken = is_broken, True
            try:
                with self._http.stream("GET", f"{path}/events/stream", params={"after": after}, timeout=60.0) as response:
                    if response.status_code != 200:
                        response.read()
                        raise error_of(response)
                    for frame in httpx2.EventSource(response):
                        waits, was_broken = iter(RECONNECT_SECONDS), False
                        if not frame.data:  # a comment that keeps the connection open
                            continue
                        event: dict[str, Any] = json.loads(frame.data)
                        after = event["sequence"]
                        yield event
                if self._ask("GET", path)["state"] in TERMINAL_STATES:
                    return
                last, is_broken = ApiError(f"the event stream of {path} ends again and again", status=None, problem={}), False
            except httpx2.TransportError as error:
                last = self._unreachable(error)
            except ApiError as error:
                if error.status is not None and error.status < 500:
                    raise
                last = error
            wait = next(waits, None)
            if wait is None:
                raise last
            if is_broken and not was_broken and on_break is not None:
                on_break(last)
            time.sleep(wait)
