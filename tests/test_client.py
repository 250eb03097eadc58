"""The client against a real HTTP server that answers what a test says: errors, pages, downloads, and streams that break."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nas import client as client_module
from nas import connection
from nas.client import ApiError, Client
from nas.errors import CorruptFile

Answer = tuple[int, str, bytes]
"""Status, content type, body."""


class Service:
    """Answers by path; a list of answers is given one by one, the last again and again."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[str] = []

    def json(self, path: str, *values: Any, status: int = 200, kind: str = "application/json") -> None:
        self.answers[path] = [(status, kind, json.dumps(value).encode()) for value in values]

    def stream(self, path: str, *streams: list[dict[str, Any]]) -> None:
        frames = ["".join(f"id: {event['sequence']}\nevent: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events) for events in streams]
        self.answers[path] = [(200, "text/event-stream", f": hello\n\n{text}".encode()) for text in frames]

    def answer(self, target: str) -> Answer:
        self.asked.append(target)
        answers = self.answers.get(target) or self.answers.get(target.partition("?")[0], [(404, "text/plain", b"no")])
        return answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.fixture
def service() -> Iterator[tuple[Service, str]]:
    told = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, body = told.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield told, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RECONNECT_SECONDS", (0.0, 0.01, 0.01))


@pytest.fixture
def open_client(service: tuple[Service, str]) -> Iterator[Client]:
    with Client(service[1]) as client:
        yield client


def an_event(sequence: int, kind: str = "trial.proposed") -> dict[str, Any]:
    return {"sequence": sequence, "type": kind, "data": {}, "created_at": "2026-01-01T00:00:00Z"}


STREAM = "/v1/searches/srch_1/events/stream"


def test_pages_are_followed_to_the_last(service: tuple[Service, str], open_client: Client) -> None:
    service[0].json("/v1/teachers", {"data": [{"name": "a"}], "has_more": True, "next_cursor": "a"})
    service[0].json("/v1/teachers?after=a", {"data": [{"name": "b"}], "has_more": False, "next_cursor": None})
    assert [teacher["name"] for teacher in open_client.teachers()] == ["a", "b"]


def test_a_problem_is_told_field_by_field(service: tuple[Service, str], open_client: Client) -> None:
    errors = [{"field": "teacher", "expected": "a name", "got": "x"}, {"field": "seed", "expected": "an integer", "got": "y"}]
    service[0].json("/v1/searches/srch_1", {"title": "Invalid", "errors": errors}, status=422, kind="application/problem+json")
    with pytest.raises(ApiError) as refused:
        open_client.search("srch_1")
    assert str(refused.value) == "teacher: expected a name, got x\nseed: expected an integer, got y"
    assert refused.value.status == 422


def test_an_answer_that_is_no_json_object_names_the_address(service: tuple[Service, str], open_client: Client) -> None:
    service[0].answers["/v1/searches/srch_1"] = [(200, "text/html", b"<html>hello</html>")]
    with pytest.raises(ApiError, match="is it the address of `nas serve`") as refused:
        open_client.search("srch_1")
    assert refused.value.status is None


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "ftp://127.0.0.1"])
def test_a_service_that_is_not_there_is_told_with_its_address(url: str) -> None:
    with Client(url) as client:
        assert not client.is_ready()
        for ask in (client.searches, lambda: list(client.follow("srch_1"))):
            with pytest.raises(ApiError, match=f"the service at {url} cannot be reached") as refused:
                ask()
            assert refused.value.status is None


def test_events_are_followed_to_the_end_of_the_search(service: tuple[Service, str], open_client: Client) -> None:
    service[0].json("/v1/searches/srch_1", {"state": "succeeded"})
    service[0].stream(STREAM, [an_event(1), an_event(2)])
    assert [event["sequence"] for event in open_client.follow("srch_1")] == [1, 2]


def test_a_stream_that_breaks_is_taken_up_behind_its_last_event(service: tuple[Service, str], open_client: Client) -> None:
    service[0].json("/v1/searches/srch_1", {"state": "searching"}, {"state": "searching"}, {"state": "succeeded"})
    service[0].stream(f"{STREAM}?after=0", [an_event(1), an_event(2)])
    service[0].stream(f"{STREAM}?after=2", [an_event(3)])
    assert [event["sequence"] for event in open_client.follow("srch_1")] == [1, 2, 3]


def test_a_service_that_is_away_is_told_once_each_time(service: tuple[Service, str], open_client: Client) -> None:
    service[0].json("/v1/searches/srch_1", {"state": "searching"}, {"state": "succeeded"})
    busy = (503, "application/problem+json", b'{"title": "Away"}')
    service[0].stream(f"{STREAM}?after=0", [an_event(1)])
    service[0].answers[f"{STREAM}?after=0"][:0] = [busy, busy]
    told: list[str] = []

    assert [event["sequence"] for event in open_client.follow("srch_1", on_break=lambda error: told.append(str(error)))] == [1]
    assert told == ["Away"]


def test_a_stream_that_ends_again_and_again_is_given_up(service: tuple[Service, str], open_client: Client) -> None:
    service[0].json("/v1/searches/srch_1", {"state": "searching"})
    service[0].stream(STREAM, [])
    with pytest.raises(ApiError, match="ends again and again"):
        list(open_client.follow("srch_1"))
    assert sum(target.startswith(STREAM) for target in service[0].asked) == 4


def test_an_unknown_search_is_not_waited_for(service: tuple[Service, str], open_client: Client) -> None:
    service[0].json("/v1/searches/srch_1", {"detail": "no such search"}, status=404, kind="application/problem+json")
    with pytest.raises(ApiError, match="no such search"):
        list(open_client.follow("srch_1"))
    assert len(service[0].asked) == 1


@pytest.fixture
def with_bundle(service: tuple[Service, str]) -> Callable[[bytes, bytes], None]:
    def tell(announced: bytes, sent: bytes) -> None:
        service[0].json("/v1/searches/srch_1/winner", {"bundle_sha256": hashlib.sha256(announced).hexdigest()})
        service[0].answers["/v1/searches/srch_1/winner/bundle"] = [(200, "application/x-tar", sent)]

    return tell


def test_a_bundle_is_saved_with_its_folders(open_client: Client, with_bundle: Callable[[bytes, bytes], None], tmp_path: Path) -> None:
    with_bundle(b"content", b"content")
    saved = open_client.download_bundle("srch_1", target=tmp_path / "new" / "bundle.tar")
    assert saved.read_bytes() == b"content"
    assert list(saved.parent.iterdir()) == [saved]


def test_a_bundle_that_arrives_damaged_is_not_kept(open_client: Client, with_bundle: Callable[[bytes, bytes], None], tmp_path: Path) -> None:
    with_bundle(b"content", b"c0ntent")
    with pytest.raises(CorruptFile, match=r"bundle\.tar: expected sha256"):
        open_client.download_bundle("srch_1", target=tmp_path / "bundle.tar")
    assert list(tmp_path.iterdir()) == []


class Broken(BaseHTTPRequestHandler):
    """Breaks the connection in the middle of every answer, until it has been asked often enough."""

    content = b"0123456789" * 20_000
    digest = hashlib.sha256(content).hexdigest()
    asked: list[tuple[str, str | None, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Range"], self.headers["If-Range"]))
        first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if self.headers["Range"] else 0
        part = self.content[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if len(self.asked) < 3 else part)

    def do_POST(self) -> None:
        self.asked.append((self.path, self.headers["Idempotency-Key"], None))
        if len(self.asked) < 3:
            self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{")
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"state": "paused"}')

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(connection, "BUSY_SECONDS", (0.0, 0.0, 0.0))
    Broken.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_download_goes_on_where_its_connection_broke(broken: str, tmp_path: Path) -> None:
    with Client(broken) as client:
        saved = client.download(Broken.digest, target=tmp_path / "file.tar")

    assert saved.read_bytes() == Broken.content
    assert list(tmp_path.iterdir()) == [saved]
    assert [asked[1] for asked in Broken.asked] == [None, "bytes=100000-", "bytes=150000-"]
    assert {asked[2] for asked in Broken.asked} == {None, f'"{Broken.digest}"'}


def test_a_request_that_acts_is_sent_again_under_the_same_key_when_its_connection_breaks(broken: str) -> None:
    with Client(broken) as client:
        assert client.pause("srch_1") == {"state": "paused"}

    assert len(Broken.asked) == 3
    assert len({key for _, key, _ in Broken.asked}) == 1
    assert Broken.asked[0][1]


def test_a_service_that_is_busy_is_asked_again(service: tuple[Service, str], open_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BUSY_SECONDS", (0.0, 0.0))
    busy = (503, "application/problem+json", b'{"detail": "away", "request_id": "req_1"}')
    service[0].answers["/v1/searches/srch_1"] = [busy, (200, "application/json", b'{"state": "queued"}'), busy]
    assert open_client.search("srch_1") == {"state": "queued"}
    with pytest.raises(ApiError, match=r"away \(request req_1\)") as refused:
        open_client.search("srch_1")
    assert refused.value.status == 503


def test_a_leaderboard_is_read_to_its_end_and_again_when_its_version_goes(service: tuple[Service, str]) -> None:
    told, url = service
    path = "/v1/searches/srch_1/leaderboard"
    first = {"version": 3, "rows": [{"number": 1}], "has_more": True, "next_cursor": "c3"}
    newer = {"version": 4, "rows": [{"number": 2}], "has_more": True, "next_cursor": "c4"}
    last = {"version": 4, "rows": [{"number": 1}], "has_more": False, "next_cursor": None}
    gone = (410, "application/problem+json", json.dumps({"detail": "gone"}).encode())
    told.json(path, first, newer, last)
    told.answers[path].insert(1, gone)
    with Client(url) as client:
        board = client.leaderboard("srch_1", sort="kl", state=None)

    assert (board["version"], board["rows"]) == (4, [{"number": 2}, {"number": 1}])
    assert [target.partition("?")[2] for target in told.asked] == [
        "sort=kl&limit=500",
        "sort=kl&after=c3&limit=500",
        "sort=kl&limit=500",
        "sort=kl&after=c4&limit=500",
    ]


def test_a_part_of_a_leaderboard_is_no_more_than_was_wanted(service: tuple[Service, str]) -> None:
    told, url = service
    told.json("/v1/searches/srch_1/leaderboard", {"rows": [{"number": 1}, {"number": 2}], "has_more": True, "next_cursor": "c"})
    with Client(url) as client:
        assert len(client.leaderboard("srch_1", most=2)["rows"]) == 2
    assert told.asked == ["/v1/searches/srch_1/leaderboard?limit=2"]
