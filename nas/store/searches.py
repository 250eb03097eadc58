"""Searches and their events. Every change of a search writes its event in the same transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, bindparam, insert, select, update

from nas.errors import Conflict, NotFound
from nas.store.database import Database
from nas.store.machines import Fence
from nas.store.quotas import add_usage, charge, lock_project
from nas.store.records import DEFAULT_PROJECT, WORKING, ActiveSearch, EventRecord, Json, SearchName, SearchRecord, SearchState, SearchTimes, new_id, utc_now
from nas.store.tables import artifacts, board_heads, events, searches

_COLUMNS = [*(column for column in searches.c if column.name not in ("idempotency_key", "body_digest", "prepared")), board_heads.c.head.label("board")]
_SHORT_COLUMNS = [column for column in _COLUMNS if column.name not in ("spec", "inputs", "plan", "winner", "error", "board")]
# Built once: what these ask costs more to put together than to run.
_CREATE = insert(searches).returning(*_SHORT_COLUMNS)
_ADD_EVENT = insert(events)
_TAKE_SEQUENCE = (
    update(searches)
    .where(searches.c.id == bindparam("search_id"))
    .values(num_events=searches.c.num_events + 1, updated_at=bindparam("now"))
    .returning(searches.c.num_events)
)
_ACTIVE = [state for state in SearchState if not state.is_terminal and state is not SearchState.PAUSED]
_WITH_BOARD = searches.outerjoin(board_heads, (board_heads.c.search_id == searches.c.id) & (board_heads.c.version == searches.c.board_version))


class Searches(Database):
    """Create, list and change searches; append and list events. What users ask of one that is there is in `requests.py`.

    A terminal state is never left. What takes a `fence` raises Fenced when it is stale; what takes an id raises NotFound.
    """

    def create_search(
        self,
        *,
        spec: Json,
        inputs: Json,
        plan: Json,
        label: str,
        labels: Mapping[str, str] | None = None,
        project: str = DEFAULT_PROJECT,
        traceparent: str | None = None,
    ) -> SearchRecord:
        """A queued search; its steps belong to the trace of `traceparent` (W3C).

        Raises:
            NotFound: no such project.
            QuotaExceeded: the project may not have this search now; nothing was stored.
        """
        search_id, now = new_id("srch"), utc_now()
        row: dict[str, Any] = {
            "id": search_id,
            "label": label,
            "labels": dict(labels or {}),
            "project": project,
            "state": SearchState.QUEUED,
            "num_events": 1,
            "created_at": now,
            "updated_at": now,
            "spec": spec,
            "inputs": inputs,
            "plan": plan,
            "traceparent": traceparent,
        }
        with self.write(fence=None) as connection:
            stored = connection.execute(_CREATE, {**row, "state_since": self.steady_time(connection, is_kept=True)}).mappings().one()
            event = {"search_id": search_id, "sequence": 1, "type": "search.created", "data": {"label": label}, "created_at": now}
            connection.execute(_ADD_EVENT, event)
            # Last, since from here to the commit other submits of the project wait; what they count then has this one in it.
            quotas = lock_project(connection, project)
            num_trials, tokens = plan.get("max_trials", 0), plan.get("max_distillation_tokens", 0)
            charge(connection, project, quotas=quotas, num_searches=1, num_trials=num_trials, tokens=tokens)
        return _search({**stored, "spec": spec, "inputs": inputs, "plan": plan, "winner": None, "error": None, "board": None})

    def get_search(self, search_id: str, *, project: str | None = None) -> SearchRecord:
        """The search; of one project, or of any. To a project another's is not found, as if it did not exist, and a full distillation is no search."""
        with self.read() as connection:
            search = get_search(connection, search_id)
        if project is not None and (search.project != project or search.distils is not None):
            raise not_found(search_id)
        return search

    def list_searches(
        self,
        *,
        project: str | None = None,
        state: SearchState | None = None,
        labels: Mapping[str, str] | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> list[SearchRecord]:
        """Newest first, of one project or of all; only those that have all these labels, made at or after one time and before another.

        `after` is the id of the last one already seen: pages stay stable while searches arrive.
        """
        query = select(*_COLUMNS).select_from(_WITH_BOARD).where(searches.c.distils.is_(None)).order_by(searches.c.id.desc()).limit(limit)
        if project is not None:
            query = query.where(searches.c.project == project)
        if state is not None:
            query = query.where(searches.c.state == state)
        for name, value in (labels or {}).items():
            query = query.where(searches.c.labels[name].as_string() == value)
        if created_after is not None:
            query = query.where(searches.c.created_at >= created_after)
        if created_before is not None:
            query = query.where(searches.c.created_at < created_before)
        if after is not None:
            query = query.where(searches.c.id < after)
        with self.read() as connection:
            return [_search(row) for row in connection.execute(query).mappings()]

    def latest_searches(self, *, project: str, limit: int) -> list[SearchName]:
        """A project's newest, by name only."""
        query = select(searches.c.id, searches.c.label, searches.c.created_at).where(searches.c.project == project, searches.c.distils.is_(None))
        query = query.order_by(searches.c.id.desc()).limit(limit)
        with self.read() as connection:
            return [SearchName(**row) for row in connection.execute(query).mappings()]

    def search_ids(self) -> set[str]:
        """Of all searches and distillations there are."""
        with self.read() as connection:
            return set(connection.execute(select(searches.c.id)).scalars())

    def active_searches(self) -> dict[str, ActiveSearch]:
        """What a controller looks at in every tick: those for which there may be something to do, neither ended nor paused, oldest first, distillations too."""
        query = select(searches.c.id, searches.c.state, searches.c.num_requests).where(searches.c.state.in_(_ACTIVE)).order_by(searches.c.id)
        with self.read() as connection:
            return {row.id: ActiveSearch(state=SearchState(row.state), num_requests=row.num_requests) for row in connection.execute(query)}

    def times_of(self, search_id: str) -> SearchTimes:
        """How long it has worked, and how long it has been in its state."""
        with self.read() as connection:
            query = select(searches.c.active_seconds, searches.c.active_since, searches.c.state_since, searches.c.updated_at)
            row = connection.execute(query.where(searches.c.id == search_id)).one_or_none()
            if row is None:
                raise not_found(search_id)
            now = self.steady_time(connection)
        working = 0.0 if row.active_since is None else max((now - row.active_since).total_seconds(), 0.0)
        in_state = (now - (row.state_since or row.updated_at)).total_seconds()
        return SearchTimes(at_work_seconds=row.active_seconds + working, in_state_seconds=max(in_state, 0.0))

    def search_versions(self, search_ids: Collection[str]) -> dict[str, tuple[int, SearchState]]:
        """Version and state of each of these that exists: what has changed, for one question."""
        query = select(searches.c.id, searches.c.num_events, searches.c.state).where(searches.c.id.in_(search_ids))
        with self.read() as connection:
            return {search_id: (version, SearchState(state)) for search_id, version, state in connection.execute(query)}

    def change_search(
        self,
        search_id: str,
        *,
        to: SearchState,
        expected: Collection[SearchState],
        fence: Fence | None,
        error: Json | None = None,
        data: Json | None = None,
        end_reason: str | None = None,
        num_requests: int | None = None,
    ) -> SearchRecord:
        """Move a search on, and write the event `search.<to>` with `data` and the error.

        Args:
            end_reason: why no more shapes are evaluated, to be kept from now on.
            num_requests: `SearchRecord.num_requests` that this was decided on; None: whatever users have asked for since, it moves.

        Raises:
            Conflict: its state is not among the expected ones, or terminal, or a user has asked for something since.
        """
        with self.write(fence=fence) as connection:
            search = get_search(connection, search_id, lock=True)
            if search.state not in expected or search.state.is_terminal:
                raise Conflict(f"search {search_id}: expected state {' or '.join(sorted(expected))}, got {search.state}")
            if num_requests not in (None, search.num_requests):
                raise Conflict(f"search {search_id}: expected {num_requests} requests of users so far, got {search.num_requests}")
            return move_search(
                connection,
                search,
                now=self.steady_time(connection, is_kept=True),
                to=to,
                error=error,
                data=data,
                values=None if end_reason is None else {"end_reason": end_reason},
            )

    def replan_search(self, seen: SearchRecord, *, spec: Json, inputs: Json, plan: Json, fence: Fence | None) -> bool:
        """Give a search that waits in the queue the teacher that it waited for, and the plan with it; event `search.teacher_known`.

        The project admitted the search when it was submitted: what it takes more now is counted, and not refused.

        Returns:
            False: a user has asked something of it since it was read, and nothing was stored.
        """
        with self.write(fence=fence) as connection:
            search = get_search(connection, seen.id, lock=True)
            if search.state is not SearchState.QUEUED or search.num_requests != seen.num_requests:
                return False
            more_tokens = plan["max_distillation_tokens"] - search.plan.get("max_distillation_tokens", 0)
            if more_tokens > 0:
                lock_project(connection, search.project)
                add_usage(connection, search.project, tokens=more_tokens)
            connection.execute(update(searches).where(searches.c.id == seen.id).values(spec=spec, inputs=inputs, plan=plan))
            write_event(connection, seen.id, "search.teacher_known", {"search": inputs["teacher"]["search"], "parameters": plan["teacher_parameters"]})
            return True

    def save_prepared(self, search_id: str, prepared: Json, *, fence: Fence | None) -> None:
        """Keep what the prepare step made; event `search.prepared`."""
        self._save(search_id, {"prepared": prepared}, event="search.prepared", data={}, fence=fence)

    def get_prepared(self, search_id: str) -> Json | None:
        """What the prepare step made; None before. Only who ranks reads it: it holds the scores of every document."""
        with self.read() as connection:
            row = connection.execute(select(searches.c.prepared).where(searches.c.id == search_id)).one_or_none()
        if row is None:
            raise not_found(search_id)
        prepared: Json | None = row.prepared
        return prepared

    def save_winner(self, search_id: str, winner: Json, *, fence: Fence | None) -> None:
        """Keep the winner, and its bundles under their digests; event `search.winner` with the budget that has one since now."""
        latest = [winner, *winner.get("more", ())][-1]
        with self.write(fence=fence) as connection:
            write_event(connection, search_id, "search.winner", {"trial": latest.get("trial"), "budget": latest.get("budget", 0)})
            connection.execute(update(searches).where(searches.c.id == search_id).values(winner=winner))
            for one in (winner, *winner.get("more", ())):
                if "bundle" in one:
                    row = {"sha256": one["bundle_sha256"], "search_id": search_id, "path": one["bundle"]}
                    connection.execute(self.insert_if_new(artifacts).values(row))

    def add_event(self, search_id: str, type: str, data: Json, *, fence: Fence | None = None) -> EventRecord:
        """Append an event of one's own."""
        with self.write(fence=fence) as connection:
            return write_event(connection, search_id, type, data)

    def list_events(self, search_id: str, *, after: int = 0, limit: int = 100) -> list[EventRecord]:
        """Events with a sequence above `after`, in order."""
        query = select(events).where(events.c.search_id == search_id, events.c.sequence > after).order_by(events.c.sequence).limit(limit)
        with self.read() as connection:
            return [EventRecord(**row) for row in connection.execute(query).mappings()]

    def _save(self, search_id: str, values: Json, *, event: str, data: Json, fence: Fence | None) -> None:
        with self.write(fence=fence) as connection:
            write_event(connection, search_id, event, data)
            connection.execute(update(searches).where(searches.c.id == search_id).values(values))


def lock_search(connection: Connection, search_id: str) -> None:
    """Lock the search's row until the transaction ends; reads none of its long columns. Foreign keys may still point at it meanwhile."""
    query = select(searches.c.id).where(searches.c.id == search_id).with_for_update(key_share=True)
    if connection.execute(query).first() is None:
        raise not_found(search_id)


def write_event(connection: Connection, search_id: str, type: str, data: Json) -> EventRecord:
    """Append the next event; locks the search's row until the transaction ends, hence no gaps and commit order."""
    now = utc_now()
    sequence = connection.execute(_TAKE_SEQUENCE, {"search_id": search_id, "now": now}).scalar_one_or_none()
    if sequence is None:
        raise not_found(search_id)
    record = EventRecord(search_id=search_id, sequence=sequence, type=type, data=data, created_at=now)
    connection.execute(_ADD_EVENT, {"search_id": search_id, "sequence": sequence, "type": type, "data": data, "created_at": now})
    return record


def move_search(
    connection: Connection,
    search: SearchRecord,
    *,
    now: datetime,
    to: SearchState,
    error: Json | None = None,
    data: Json | None = None,
    event: str | None = None,
    values: Json | None = None,
) -> SearchRecord:
    """Change the state of a search that is locked, and write the event `search.<to>`, or the one that is named.

    Args:
        now: `Database.steady_time`.
        error: why it failed, or why it is paused; it goes when the search leaves that state.
        values: further columns.
    """
    changes: dict[str, Any] = {"state": to, "state_since": now, "error": error, **(values or {})}
    if search.active_since is None and to in WORKING:
        changes |= {"active_since": now, "started_at": search.started_at or utc_now()}
    if search.active_since is not None and (to.is_terminal or to in (SearchState.QUEUED, SearchState.PAUSED)):
        worked = (now - search.active_since).total_seconds()
        changes |= {"active_since": None, "active_seconds": search.active_seconds + max(worked, 0.0)}
    if to.is_terminal:
        changes["finished_at"] = utc_now()
    connection.execute(update(searches).where(searches.c.id == search.id).values(changes))
    write_event(connection, search.id, event or f"{search.kind}.{to}", {**(data or {}), **({"error": error} if error is not None else {})})
    return get_search(connection, search.id)


def get_search(connection: Connection, search_id: str, *, lock: bool = False) -> SearchRecord:
    """The search; locked until the transaction ends, if asked for."""
    query = select(*_COLUMNS).select_from(_WITH_BOARD).where(searches.c.id == search_id)
    row = connection.execute(query.with_for_update(key_share=True, of=searches) if lock else query).mappings().one_or_none()
    if row is None:
        raise not_found(search_id)
    return _search(row)


def list_records(connection: Connection, *wanted: ColumnElement[bool], limit: int) -> list[SearchRecord]:
    """The newest of those rows that fulfil all conditions."""
    query = select(*_COLUMNS).select_from(_WITH_BOARD).where(*wanted).order_by(searches.c.id.desc()).limit(limit)
    return [_search(row) for row in connection.execute(query).mappings()]


def not_found(search_id: str) -> NotFound:
    """There is no such search."""
    return NotFound(f"search: expected the id of one, got {search_id!r}")


def _search(row: Mapping[Any, Any]) -> SearchRecord:
    values: dict[str, Any] = {**row}
    version = values.pop("num_events")
    return SearchRecord(**values | {"state": SearchState(row["state"]), "labels": row["labels"] or {}, "version": version})
