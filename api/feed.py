"""The event feed of one process: however many streams are open, one task looks at the store for all of them.

Each stream keeps its own place. What it has not seen yet comes out of the channel's few latest frames, or, where it is
further behind, out of the store, a page at a time. So nothing waits in memory for a slow reader, ids have no gap, and a
database that goes away leaves the streams open and silent until it is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from api.schemas.events import EventAnswer
from nas.errors import NasError, StoreUnavailable
from nas.store.records import EventRecord, SearchRecord, SearchState
from nas.store.store import Store

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""How often the feed looks for new events."""

PAGE = 500
KEPT_FRAMES = 256
MAX_STREAMS = 1000
"""Streams that one process keeps open: each costs a socket and three tasks."""

MAX_STREAMS_OF_A_PROJECT = 500
"""Of these, so that one tenant cannot take them all."""

TERMINAL_EVENTS = frozenset(f"{kind}.{state}" for kind in ("search", "distillation") for state in SearchState if state.is_terminal)


class TooManyStreams(NasError):
    """This process has as many open event streams as it keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One event, encoded once for all streams."""

    sequence: int
    text: bytes
    is_last: bool


@dataclass(slots=True, kw_only=True)
class _Channel:
    """What the feed knows of one search that somebody follows."""

    project: str
    version: int
    ended: bool
    num_streams: int = 0
    latest: deque[Frame] = field(default_factory=lambda: deque(maxlen=KEPT_FRAMES))
    """Without a gap, up to `version`; empty before anything happened."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def after(self, sequence: int) -> list[Frame] | None:
        """The frames behind one, if they are all here."""
        if not self.latest or sequence + 1 < self.latest[0].sequence:
            return None
        return [frame for frame in self.latest if frame.sequence > sequence]


class Feed:
    """All event streams of a process. Of one event loop; its task runs while a stream is open."""

    def __init__(self, store: Store, *, max_streams: int = MAX_STREAMS, max_streams_of_a_project: int = MAX_STREAMS_OF_A_PROJECT) -> None:
        self._store = store
        self._max_streams = max_streams
        self._max_streams_of_a_project = max_streams_of_a_project
        self._channels: dict[str, _Channel] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def num_streams(self) -> int:
        """Streams that are open now."""
        return sum(channel.num_streams for channel in self._channels.values())

    @contextmanager
    def subscribe(self, search: SearchRecord) -> Iterator[Stream]:
        """A stream of a search's events, as long as the context lasts.

        Raises:
            TooManyStreams: as many are open as this process keeps, of the project or of all.
        """
        of_project = sum(channel.num_streams for channel in self._channels.values() if channel.project == search.project)
        if of_project >= self._max_streams_of_a_project:
            raise TooManyStreams(f"event streams: expected fewer than {self._max_streams_of_a_project} open ones of a project in this process, got another")
        if self.num_streams >= self._max_streams:
            raise TooManyStreams(f"event streams: expected fewer than {self._max_streams} open ones in this process, got another")
        channel = self._channels.setdefault(search.id, _Channel(project=search.project, version=search.version, ended=search.state.is_terminal))
        channel.num_streams += 1
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._poll(), name="event feed")
        try:
            yield Stream(self._store, search.id, channel)
        finally:
            channel.num_streams -= 1
            if channel.num_streams == 0:
                del self._channels[search.id]
            if not self._channels and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _poll(self) -> None:
        is_away = False
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self._look()
                is_away = False
            except StoreUnavailable as error:
                if not is_away:
                    logger.warning("event feed: the store does not answer; the streams wait", exc_info=error)
                is_away = True
            except Exception:  # a bug must not leave every stream silent for ever
                logger.exception("event feed: a look at the store failed")

    async def _look(self) -> None:
        """One question for all searches, one more for each that has changed."""
        channels = dict(self._channels)
        found = await run_in_threadpool(self._store.search_versions, list(channels))
        for search_id, channel in channels.items():
            version, state = found.get(search_id, (channel.version, None))
            if version > channel.version:
                events = await run_in_threadpool(self._store.list_events, search_id, after=channel.version, limit=PAGE)
                if not events:  # deleted between the two questions
                    continue
                channel.latest.extend(_frames(events))
                channel.version = events[-1].sequence
            # A search that is gone has nothing more to tell. With a page that was not the last, the end is seen later.
            channel.ended = state is None or (state.is_terminal and channel.version >= version)
            channel.wake()


class Stream:
    """One reader's place in a search's events."""

    def __init__(self, store: Store, search_id: str, channel: _Channel) -> None:
        self._store = store
        self._search_id = search_id
        self._channel = channel

    async def frames(self, *, after: int) -> AsyncIterator[Sequence[Frame]]:
        """Frames with a sequence above `after`, in order, up to the one that ends the search.

        Also yields an empty sequence at every look at the store that brought nothing, so that the caller may stop.
        """
        seen = after
        while True:
            changed = self._channel.changed
            found = await self._next(seen)
            yield found
            if found:
                seen = found[-1].sequence
            if any(frame.is_last for frame in found) or (self._channel.ended and seen >= self._channel.version):
                return
            if not found:
                await changed.wait()

    async def _next(self, seen: int) -> Sequence[Frame]:
        if seen >= self._channel.version:
            return ()
        found = self._channel.after(seen)
        if found is not None:
            return found
        try:
            return _frames(await run_in_threadpool(self._store.list_events, self._search_id, after=seen, limit=PAGE))
        except StoreUnavailable:
            return ()  # the feed has said so; the next look tells when it is back


def _frames(events: Sequence[EventRecord]) -> list[Frame]:
    return [
        Frame(
            sequence=event.sequence,
            text=format_sse_event(id=str(event.sequence), event=event.type, data_str=EventAnswer.model_validate(event).model_dump_json()),
            is_last=event.type in TERMINAL_EVENTS,
        )
        for event in events
    ]
