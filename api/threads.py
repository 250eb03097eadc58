"""The threads that serve requests: a few for all, and fewer for submits, so that a hundred of these at once hold up no read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from fastapi import FastAPI

NUM_THREADS = 16
"""That serve requests. They wait for the database, which a few cover, and compute one at a time: more of them only take turns, and each keeps memory."""
NUM_SUBMITTING = 2
"""That price and store what is submitted; the others wait here, and not in a thread that a read could have."""

_submitting: RunVar[CapacityLimiter] = RunVar("nas.submitting")  # a limiter belongs to one event loop
_T = TypeVar("_T")


@asynccontextmanager
async def with_few_threads(_: FastAPI) -> AsyncIterator[None]:
    """The lifespan of the application."""
    to_thread.current_default_thread_limiter().total_tokens = NUM_THREADS
    yield


async def submitting(work: Callable[[], _T]) -> _T:
    """Do the work of a submit in one of its threads, in the order of arrival."""
    try:
        limiter = _submitting.get()
    except LookupError:
        limiter = CapacityLimiter(NUM_SUBMITTING)
        _submitting.set(limiter)
    return await to_thread.run_sync(work, limiter=limiter)
