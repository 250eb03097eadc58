"""Event streams over real HTTP: one look at the store for all of them, no gap, no leak."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import uvicorn

from api import feed as feed_module
from api.feed import Feed, TooManyStreams
from api.problems import MEDIA_TYPE
from nas.errors import StoreUnavailable
from nas.store.records import SearchRecord, SearchState

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from tests.api.conftest import Service


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "POLL_SECONDS", 0.05)


@asynccontextmanager
async def served(service: Service) -> AsyncIterator[httpx2.AsyncClient]:
    """The application behind a real socket, in this event loop."""
    server = uvicorn.Server(uvicorn.Config(service.client.app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, limits=httpx2.Limits(max_connections=None)) as client:
        yield client
    server.should_exit = True
    await running


async def read_ids(client: httpx2.AsyncClient, search: SearchRecord, *, after: int = 0) -> list[int]:
    """The ids of a stream up to its end."""
    async with client.stream("GET", f"/v1/searches/{search.id}/events/stream", params={"after": after}) as answer:
        assert answer.status_code == 200
        return [int(line.removeprefix("id: ")) async for line in answer.aiter_lines() if line.startswith("id: ")]


def write_events(service: Service, search: SearchRecord, number: int, *, end: bool = True) -> None:
    for _ in range(number):
        service.store.add_event(search.id, "test.event", {})
    if end:
        service.move(search, SearchState.FAILED)


def count_calls(service: Service, monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    calls: list[Any] = []
    original: Callable[..., Any] = getattr(service.store, name)
    monkeypatch.setattr(service.store, name, lambda *values, **named: (calls.append(values), original(*values, **named))[1])
    return calls


async def until(condition: Callable[[], bool], *, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def feed_of(service: Service) -> Feed:
    app: Starlette = service.client.app  # type: ignore[assignment]
    feed: Feed = app.state.feed
    return feed


def test_sixty_streams_see_every_event_once_in_order_for_one_look_at_a_time(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    search = service.submit()
    looks, pages, keys = (count_calls(service, monkeypatch, name) for name in ("search_versions", "list_events", "has_keys"))

    async def run() -> list[list[int]]:
        async with served(service) as client:
            streams = [asyncio.create_task(read_ids(client, search)) for _ in range(60)]
            await until(lambda: feed_of(service).num_streams == 60)
            await until(lambda: len(looks) >= 3)
            for calls in (looks, pages, keys):
                calls.clear()
            await asyncio.to_thread(write_events, service, search, 40)
            found = await asyncio.gather(*streams)
            assert len(looks) < 60
            assert len(pages) <= len(looks)  # none for each stream
            assert len(keys) < 20  # whether they may still listen is asked for all of one key
            return found

    found = asyncio.run(run())

    last = service.store.get_search(search.id).version
    assert last > 40
    assert found == [list(range(1, last + 1))] * 60


def test_a_reader_that_is_far_behind_gets_what_it_missed_out_of_the_store(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "KEPT_FRAMES", 4)
    monkeypatch.setattr(feed_module, "PAGE", 7)
    search = service.submit()

    async def run() -> list[int]:
        feed = Feed(service.store)
        with feed.subscribe(service.store.get_search(search.id)) as stream:
            pages = stream.frames(after=0)
            seen = [frame.sequence for frame in await anext(pages)]
            await asyncio.to_thread(write_events, service, search, 50)
            await asyncio.sleep(0.3)  # the feed has long gone on
            return seen + [frame.sequence async for page in pages for frame in page]

    assert asyncio.run(run()) == list(range(1, service.store.get_search(search.id).version + 1))


def test_who_leaves_leaves_nothing_behind(service: Service) -> None:
    search = service.submit()

    async def run() -> None:
        async with served(service) as client:
            await client.get("/healthz")
            before = len(asyncio.all_tasks())
            streams = [asyncio.create_task(read_ids(client, search)) for _ in range(20)]
            await until(lambda: feed_of(service).num_streams == 20)
            assert len(asyncio.all_tasks()) > before + 20
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            await until(lambda: feed_of(service).num_streams == 0)
            await until(lambda: len(asyncio.all_tasks()) <= before)

    asyncio.run(run())


def test_one_stream_too_many_is_told_when_to_come_back(service: Service) -> None:
    search = service.submit()
    service.client.app.state.feed = Feed(service.store, max_streams=2)  # type: ignore[attr-defined]

    async def run() -> tuple[httpx2.Response, list[int]]:
        async with served(service) as client:
            streams = [asyncio.create_task(read_ids(client, search)) for _ in range(2)]
            await until(lambda: feed_of(service).num_streams == 2)
            refused = await client.get(f"/v1/searches/{search.id}/events/stream")
            await asyncio.to_thread(write_events, service, search, 0)
            await asyncio.gather(*streams)
            await until(lambda: feed_of(service).num_streams == 0)
            return refused, await read_ids(client, search)

    refused, later = asyncio.run(run())

    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert refused.headers["content-type"] == MEDIA_TYPE
    assert refused.json()["type"] == "/problems/too-many-streams"
    assert later == [1, 2]


def test_one_project_cannot_take_all_streams(service: Service) -> None:
    service.store.create_project("theirs")
    feed = Feed(service.store, max_streams=10, max_streams_of_a_project=2)
    ours = [service.submit() for _ in range(2)]
    theirs = service.store.create_search(spec={}, inputs={}, plan={}, label="", project="theirs")

    async def run() -> None:
        with feed.subscribe(ours[0]), feed.subscribe(ours[1]):
            with pytest.raises(TooManyStreams, match="of a project"), feed.subscribe(ours[0]):
                pass
            with feed.subscribe(theirs):
                assert feed.num_streams == 3
        with feed.subscribe(ours[0]):  # there is room again
            assert feed.num_streams == 1

    asyncio.run(run())


@pytest.mark.parametrize("away", ["search_versions", "list_events"])
def test_streams_outlive_a_database_that_goes_away(service: Service, monkeypatch: pytest.MonkeyPatch, away: str) -> None:
    search = service.submit()
    gone = threading.Event()
    original: Callable[..., Any] = getattr(service.store, away)

    def ask(*values: Any, **named: Any) -> Any:
        if gone.is_set():
            raise StoreUnavailable("the database does not answer")
        return original(*values, **named)

    monkeypatch.setattr(service.store, away, ask)

    async def run() -> list[int]:
        async with served(service) as client:
            stream = asyncio.create_task(read_ids(client, search))
            await until(lambda: feed_of(service).num_streams == 1)
            gone.set()
            await asyncio.to_thread(write_events, service, search, 5)
            await asyncio.sleep(0.2)
            assert not stream.done()
            gone.clear()
            return await stream

    assert asyncio.run(run()) == list(range(1, 8))


@pytest.mark.parametrize("name", ["x", "-1", "9" * 5000, "\u0663", "1.0", ""])
def test_an_event_id_that_is_none_of_ours_is_passed_over(service: Service, name: str) -> None:
    search = service.submit()
    write_events(service, search, 0)

    answer = service.client.get(f"/v1/searches/{search.id}/events/stream", headers={"Last-Event-ID": name.encode()})

    assert answer.status_code == 200
    assert [line for line in answer.text.splitlines() if line.startswith("id: ")] == ["id: 1", "id: 2"]
    assert "retry: 2000" in answer.text


def test_a_search_that_is_deleted_ends_its_streams(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    search = service.submit()
    gone: dict[str, Any] = {}

    async def run() -> list[int]:
        async with served(service) as client:
            stream = asyncio.create_task(read_ids(client, search))
            await until(lambda: feed_of(service).num_streams == 1)
            monkeypatch.setattr(service.store, "search_versions", lambda _: gone)
            return await asyncio.wait_for(stream, 5)

    assert asyncio.run(run()) == [1]
