"""The threads that serve requests: a few for all, and fewer for submits and for files, so that a hundred of these at once hold up no read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from fastapi import FastAPI

NUM_THREADS = 16
"""That serve the others. They wait for the database, which a few cover, and compute one at a time: more of them only take turns, and each keeps memory."""
NUM_SUBMITTING = 2
"""That price and store what is submitted; the others wait here, and not in a thread that a read could have."""

NUM_FETCHING = 4
"""That look for files, which may lie behind a URL that does not answer, or fetch them from there."""

# A limiter belongs to one event loop.
_submitting: RunVar[CapacityLimiter] = RunVar("nas.submitting")
_fetching: RunVar[CapacityLimiter] = RunVar("nas.fetching")
_T = TypeVar("_T")


@asynccontextmanager
async def with_few_threads(_: FastAPI) -> AsyncIterator[None]:
    """The lifespan of the application."""
    to_thread.current_default_thread_limiter().total_tokens = NUM_THREADS
    yield


async def submitting(work: Callable[[], _T]) -> _T:
    """Do the work of a submit in one of its threads, in the order of arrival."""
    return await _run(work, limiter=_submitting, num_threads=NUM_SUBMITTING)


async def fetching(work: Callable[[], _T]) -> _T:
    """Do in one of its threads what reads files that other machines share."""
    return await _run(work, limiter=_fetching, num_threads=NUM_FETCHING)


async def _run(work: Callable[[], _T], *, limiter: RunVar[CapacityLimiter], num_threads: int) -> _T:
    try:
        few = limiter.get()
    except LookupError:
        few = CapacityLimiter(num_threads)
        limiter.set(few)
    return await to_thread.run_sync(work, limiter=few)
