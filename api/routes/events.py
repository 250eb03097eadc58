"""What happened in a search: as a list, and as a stream."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from api.feed import Feed, Stream
from api.openapi import event_stream_answer, problems
from api.routes.dependencies import MAX_INTEGER, SearchDep, StoreDep
from api.schemas.common import Page
from api.schemas.events import EventAnswer
from nas.store.store import Store

RECONNECT_MILLISECONDS = 2000
"""How long a browser waits before it takes a broken stream up again."""

KEEPALIVE_SECONDS = 15.0
"""A stream on which nothing happens says so as often, so that nothing between takes it for dead."""

_SEQUENCE = re.compile(r"[0-9]{1,9}")

router = APIRouter(tags=["events"])


async def open_stream(search: SearchDep, request: Request) -> AsyncIterator[Stream]:
    """A place in the feed, given back when the answer has ended, however it ended."""
    feed: Feed = request.app.state.feed
    with feed.subscribe(search) as stream:
        yield stream


LastEventId = Annotated[str | None, Header(description="Sent by a browser that reconnects; wins over `after`.")]
StreamDep = Annotated[Stream, Depends(open_stream)]


@router.get("/searches/{search_id}/events", operation_id="list_events", summary="List events", responses=problems(404, 422))
def list_events(
    search: SearchDep,
    store: StoreDep,
    after: Annotated[int, Query(ge=0, le=MAX_INTEGER, description="Only events after this sequence number.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page[EventAnswer]:
    """What happened, in order."""
    return page_of_events(search.id, store=store, after=after, limit=limit)


def page_of_events(name: str, *, store: Store, after: int, limit: int) -> Page[EventAnswer]:
    """A page of the events of a search or a distillation."""
    found = store.list_events(name, after=after, limit=limit + 1)
    data = [EventAnswer.model_validate(event) for event in found[:limit]]
    has_more = len(found) > limit
    return Page(data=data, has_more=has_more, next_cursor=str(data[-1].sequence) if has_more else None)


@router.get(
    "/searches/{search_id}/events/stream",
    operation_id="stream_events",
    summary="Follow the events",
    response_class=StreamingResponse,
    responses={**event_stream_answer(), **problems(404, 422, 503)},
)
async def stream_events(
    stream: StreamDep,
    search: SearchDep,
    after: Annotated[int, Query(ge=0, le=MAX_INTEGER, description="Only events after this sequence number.")] = 0,
    last_event_id: LastEventId = None,
) -> StreamingResponse:
    """Server-sent events: past ones first, then as they happen. The stream ends after the event that ends the search."""
    return stream_of(stream, name=search.id, after=after, last_event_id=last_event_id)


def stream_of(stream: Stream, *, name: str, after: int, last_event_id: str | None) -> StreamingResponse:
    """The events of a search or a distillation, as they happen."""
    if last_event_id is not None and _SEQUENCE.fullmatch(last_event_id):
        after = int(last_event_id)
    hello = format_sse_event(comment=f"events of {name}", retry=RECONNECT_MILLISECONDS)
    # FastAPI's own way for a generator sends every frame for itself, through three tasks: with 200 streams that is a second of every burst.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_chunks(stream, hello, after=after), media_type="text/event-stream", headers=headers)


async def _chunks(stream: Stream, hello: bytes, *, after: int) -> AsyncIterator[bytes]:
    """What has come at one look as one chunk, and now and then a sign of life."""
    yield hello
    said = time.monotonic()
    async for frames in stream.frames(after=after):
        if frames or time.monotonic() - said > KEEPALIVE_SECONDS:
            yield b"".join(frame.text for frame in frames) or KEEPALIVE_COMMENT
            said = time.monotonic()
