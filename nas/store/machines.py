"""The store's values about who works: controllers and their leases, the cluster's nodes, and how fast they are. Plain, as those of `records.py`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from nas.store.records import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """The right to write under a lease: refused from the moment on at which another one holds the lease."""

    name: str
    """Of the lease: a search's id, or what else has one controller at a time."""
    token: int
    """Grows with every claim and release of that lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """A lease that somebody holds now."""

    name: str
    owner: str
    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerRecord:
    """A controller process that lives, as far as the store knows."""

    owner: str
    """Its name, of no other process ever."""
    host: str
    pid: int
    version: str
    """Of this package."""
    started_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRecord:
    """How fast a worker with these resources trains and scores."""

    key: str
    cpus: float
    gpus: float
    dtype: str
    points: list[Json] | None
    """`compress.speed.SpeedPoint` of several sizes of model; None: not measured."""
    host: str | None
    """Where it was measured."""
    error: str | None
    """Why it could not be measured."""
    measured_at: datetime | None


NodeState = Literal["joining", "fit", "unfit", "gone"]
"""Not checked yet; gets steps; gets none, for its `problems`; has left the cluster, or nobody watches it any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A machine of the cluster that runs steps."""

    id: str
    """Ray's, new with every start of its node."""
    host: str
    address: str
    state: NodeState
    problems: list[str]
    """Why it gets no steps: what was expected there, and what was found."""
    warnings: list[str]
    facts: Json
    """cpus, gpus, devices, memory_bytes, versions, cache, cache_free_bytes, clock_offset_seconds, as far as they are known."""
    checked_at: datetime | None
    seen_at: datetime
