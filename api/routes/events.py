"""What happened in a search: as a list, and as a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from api.openapi import problems
from api.routes.dependencies import MAX_INTEGER, SearchDep, StoreDep
from api.schemas.common import Page
from api.schemas.events import EventAnswer
from nas.store.records import EventRecord, SearchState

POLL_SECONDS = 0.5
"""How often an open event stream looks for new events."""

router = APIRouter(tags=["events"])


@router.get("/searches/{search_id}/events", operation_id="list_events", summary="List events", responses=problems(404, 422))
def list_events(
    search: SearchDep,
    store: StoreDep,
    after: Annotated[int, Query(ge=0, le=MAX_INTEGER, description="Only events after this sequence number.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page[EventAnswer]:
    """What happened, in order."""
    found = store.list_events(search.id, after=after, limit=limit + 1)
    data = [EventAnswer.model_validate(event) for event in found[:limit]]
    has_more = len(found) > limit
    return Page(data=data, has_more=has_more, next_cursor=str(data[-1].sequence) if has_more else None)


@router.get(
    "/searches/{search_id}/events/stream",
    operation_id="stream_events",
    summary="Follow the events",
    response_class=EventSourceResponse,
    responses=problems(404, 422),
)
async def stream_events(
    search: SearchDep,
    store: StoreDep,
    after: Annotated[int, Query(ge=0, le=MAX_INTEGER, description="Only events after this sequence number.")] = 0,
    last_event_id: Annotated[str | None, Header(description="Sent by a browser that reconnects; wins over `after`.")] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: past ones first, then as they happen. The stream ends after the event that ends the search."""
    seen = after
    if last_event_id is not None and last_event_id.isdecimal() and int(last_event_id) <= MAX_INTEGER:
        seen = int(last_event_id)
    yield ServerSentEvent(comment=f"events of {search.id}", retry=2000)
    while True:
        # The state is read before the events: whatever ended the search is then among the events, or already seen.
        ended = (await run_in_threadpool(store.get_search, search.id)).state.is_terminal
        events = await run_in_threadpool(store.list_events, search.id, after=seen, limit=500)
        for event in events:
            yield _frame(event)
            seen = event.sequence
            if event.type in _TERMINAL_EVENTS:
                return
        if ended and not events:
            return
        if not events:
            await asyncio.sleep(POLL_SECONDS)


_TERMINAL_EVENTS = frozenset(f"search.{state}" for state in SearchState if state.is_terminal)


def _frame(event: EventRecord) -> ServerSentEvent:
    data = json.loads(EventAnswer.model_validate(event).model_dump_json())
    return ServerSentEvent(id=str(event.sequence), event=event.type, data=data)
