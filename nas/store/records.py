"""The store's values: what is kept of teachers, corpora, tasks, searches, trials and their results. Who works on them: `machines.py`.

Plain frozen dataclasses without any database; `store.py` makes them out of rows. Times are aware UTC datetimes, nested
values are plain JSON (finite numbers only). What the JSON of a spec, a plan, a result or a board means is defined where
it is made (`spec.py`, `submission.py`, `search/results.py`, `search/ranking.py`); the store only keeps it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

Json = dict[str, Any]
"""A JSON object: string keys, finite numbers."""

DEFAULT_PROJECT = "default"
"""The one project of a deployment that has made no other."""

Stage = Literal["prepare", "rung", "confirm", "bundle", "distil"]


OVER_BUDGET = "over_budget"
"""Reason of a trial that was stopped because a measured cost is above its ceiling."""


class SearchState(StrEnum):
    """Where a search stands; it never leaves one of the last three."""

    QUEUED = "queued"
    """Waits for a controller: a new search, and one that goes on after a pause."""
    PREPARING = "preparing"
    SEARCHING = "searching"
    CONFIRMING = "confirming"
    RUNNING = "running"
    """Of a full distillation, which has one step; a search is never here."""
    PAUSING = "pausing"
    """Its steps are asked to stop."""
    PAUSED = "paused"
    """Nothing of it runs, and nothing is lost: `Store.request_resume` puts it back into the queue."""
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in (SearchState.SUCCEEDED, SearchState.FAILED, SearchState.CANCELLED)


WORKING = (SearchState.PREPARING, SearchState.SEARCHING, SearchState.CONFIRMING, SearchState.RUNNING)
"""States in which a search's steps are started, and in which its time counts."""


class TrialState(StrEnum):
    """Where a trial stands; a trial is running exactly while one of its rung attempts is."""

    WAITING = "waiting"
    """Proposed, or finished a rung and may go on."""
    RUNNING = "running"
    COMPLETED = "completed"
    """Reached the last rung."""
    STOPPED = "stopped"
    """Not promoted, or over a ceiling that is measured: its failure then has the reason `OVER_BUDGET`."""
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self not in (TrialState.WAITING, TrialState.RUNNING)


class AttemptState(StrEnum):
    """How one try of one step went."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """Counts against `limits.max_attempts`."""
    LOST = "lost"
    """The service restarted under it: does not count."""
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRecord:
    """A registered teacher; its config is kept so that shapes can be checked without torch."""

    name: str
    digest: str
    path: str
    config: Json
    parameters: int
    added_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusRecord:
    """A registered corpus."""

    name: str
    digest: str
    files: tuple[str, ...]
    num_documents: int
    num_bytes: int
    added_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecord:
    """A registered task; `card` is `TaskCard.as_dict()` of `evaluate/tasks.py`."""

    name: str
    digest: str
    folder: str
    card: Json
    added_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRecord:
    """One search: what was asked for, what submit found out, where it stands, and what came out."""

    id: str
    label: str
    state: SearchState
    spec: Json
    inputs: Json
    """Names, digests and paths of teacher, corpora and tasks at submit."""
    plan: Json
    """What submit computed: legal shapes, tokens, parameters."""
    board: Json | None
    """The leaderboard's facts without its rows, as of `board_version`; None before the first result."""
    winner: Json | None
    error: Json | None
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    """When it left the queue for work; None for one that was cancelled in the queue."""
    finished_at: datetime | None
    project: str = DEFAULT_PROJECT
    """Who sees it."""
    version: int
    """Sequence of the search's last event. Every change but a learning curve's points writes one, so it serves as an ETag."""
    board_version: int | None = None
    labels: dict[str, str] = field(default_factory=dict)
    """The user's own names and values, to filter lists by."""
    active_seconds: float = 0.0
    """Time at work before `active_since`: neither the queue's nor that of pauses. By `Database.steady_time`, as the two below."""
    active_since: datetime | None = None
    """Since when it works; None while it does not."""
    state_since: datetime | None = None
    """When it came into its state; None: an older version wrote it."""
    end_reason: str | None = None
    """Why no more shapes are evaluated, once that is so: max_trials, space_exhausted, or the limit that was reached."""
    num_requests: int = 0
    """Grows with everything that a user asks of a search that is there: a controller that sees a new number reads the search again."""
    traceparent: str | None = None
    """The trace to which its steps belong: that of the request that submitted it (W3C); None where nothing is traced."""
    distils: str | None = None
    """Of a full distillation: the search whose student it distils, which may be deleted since. None: it is a search."""

    @property
    def kind(self) -> Literal["search", "distillation"]:
        """What it is; its events are named by it."""
        return "search" if self.distils is None else "distillation"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchTimes:
    """How long a search has taken so far, whatever the calendar did meanwhile."""

    at_work_seconds: float
    """Neither in the queue nor paused."""
    in_state_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveSearch:
    """What a controller looks at in every tick."""

    state: SearchState
    num_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OnceRequest:
    """A request that may arrive twice, as its sender named it."""

    project: str
    key: str
    """The sender's own word for it: 1 to 255 characters."""
    operation: str
    """What it asks for: method and path."""
    body_digest: str
    """SHA-256 of its body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchName:
    """What a choice among searches shows of one."""

    id: str
    label: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialCounts:
    """Numbers of a search's trials, by (state, number of finished rungs). A trial finishes its rungs one after the other, from rung 0."""

    cells: Mapping[tuple[TrialState, int], int]

    @property
    def by_state(self) -> dict[TrialState, int]:
        """Every state is a key."""
        return {state: sum(number for (of_state, _), number in self.cells.items() if of_state is state) for state in TrialState}

    def finished(self, rung: int) -> int:
        """Trials that have finished this rung."""
        return sum(number for (_, num_rungs), number in self.cells.items() if num_rungs > rung)

    def running(self, rung: int) -> int:
        """Trials that are in this rung."""
        return self.cells.get((TrialState.RUNNING, rung), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One proposed shape of a search."""

    search_id: str
    number: int
    origin: str
    """anchor:width_only, anchor:depth_only, anchor:uniform, user, sampler, control, repeat:1."""
    shape: Json
    choices: Json | None
    """The sampler's raw choices; None for a shape that it did not propose."""
    parameters: int
    state: TrialState
    rung: int | None
    """Deepest finished rung."""
    failure: Json | None
    """stage, reason, message, attempts."""
    confirmation: Json | None
    """Of a finalist: verified, reason, parameters of the file, held-out result (without documents), latency."""
    created_at: datetime
    updated_at: datetime
    budget: int = 0
    """Index among the search's budgets (`SearchSpec.budgets`) of the one it was proposed for."""

    @property
    def is_out(self) -> bool:
        """It failed or is over a measured ceiling: it takes no place from others, and the sampler learns the worst of it."""
        return self.state is TrialState.FAILED or (self.failure or {}).get("reason") == OVER_BUDGET


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """One try of one step."""

    id: str
    search_id: str
    stage: Stage
    trial: int | None
    rung: int | None
    state: AttemptState
    reason: str | None
    started_at: datetime
    finished_at: datetime | None
    counts: bool = True
    """Whether its failure counts against `limits.max_attempts`: those before a retry do not."""
    device_seconds: float | None = None
    """Wall seconds from its first sign of life times its GPUs, or CPU cores where it has none. None: it has not ended, or nobody saw it end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRecord:
    """The end of what an attempt said."""

    attempt_id: str
    search_id: str
    text: str
    """At most 64 KiB, without secrets; what was before it is left out with a line that says so."""
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRecord:
    """A file that a search made, known by its content."""

    sha256: str
    search_id: str
    path: str
    """Below the data folder."""


class BundleState(StrEnum):
    """Where the bundle of a trial stands that somebody asked for."""

    WAITING = "waiting"
    """For a controller to pack it, or to have packed it."""
    PACKED = "packed"
    FAILED = "failed"
    """Asked for again, it is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleRecord:
    """The bundle of one trial of a search that has ended."""

    search_id: str
    trial: int
    state: BundleState
    requested_at: datetime | None
    """None of a winner's, which nobody has to ask for."""
    finished_at: datetime | None
    num_failures: int
    """Since it was asked for."""
    error: Json | None
    """Of one that failed: reason, message, the last lines of its log."""
    path: str | None
    """Of the tar file, below the data folder; None until it is packed, as the two below."""
    sha256: str | None
    num_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RungRecord:
    """The result of one trial at one rung: `RungResult.as_dict()`."""

    search_id: str
    trial: int
    rung: int
    sequence: int
    """1.. within the search, in the order in which rungs finished."""
    result: Json
    finished_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PointRecord:
    """One point of a learning curve."""

    search_id: str
    trial: int
    rung: int
    tokens: int
    loss: float
    learning_rate: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """Something that happened to a search, written in the transaction in which it happened."""

    search_id: str
    sequence: int
    """1.. within the search, without gaps, in commit order."""
    type: str
    data: Json
    created_at: datetime


def all_winners(search: SearchRecord) -> list[Json]:
    """The winner of each budget that has one, by `budget`: the search's own, and what it keeps of the further budgets under `more`."""
    if search.winner is None:
        return []
    first = {name: value for name, value in search.winner.items() if name != "more"}
    return sorted([{"budget": 0, **first}, *search.winner.get("more", ())], key=lambda winner: int(winner["budget"]))


def new_id(prefix: str) -> str:
    """A new identifier that sorts by the time of its making, to the nanosecond: `srch_18a3...`."""
    return f"{prefix}_{time.time_ns():016x}{secrets.token_hex(6)}"


def utc_now() -> datetime:
    """The host's time, aware."""
    return datetime.now(UTC)
