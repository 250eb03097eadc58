"""Requests that may arrive twice: what the first of them did is what every later one is answered with.

The name of a request and its effect are written in one transaction, so there is no moment at which one is there without the
other. Of two at the same moment the second waits for the first one's transaction, milliseconds, and is then answered as any later one is. (The draft of
the header would have it refused with 409: that is for services whose requests take long, and would only make the client come again.)
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from sqlalchemy import ColumnElement, Connection, Executable, RowMapping, bindparam, select, update
from sqlalchemy.dialects import postgresql, sqlite

from nas.errors import IdempotencyKeyReused
from nas.store.database import Database
from nas.store.records import Json, OnceRequest
from nas.store.tables import idempotency_keys

KEPT_HOURS = 24
"""How long a key is remembered; afterwards it is a new one, whether or not it was removed (`retention.py`)."""

_T = TypeVar("_T")


class Idempotency(Database):
    """Doing a thing once, however often it is asked for."""

    def once(self, request: OnceRequest | None, effect: Callable[[], _T], *, search_of: Callable[[_T], str], again: Callable[[str], _T]) -> tuple[_T, bool]:
        """What the effect made, and whether it was made now. Without a request it always is.

        Args:
            effect: calls methods of this store, in this thread; all of them are part of one transaction. What it raises undoes the whole.
            search_of: the search that it made or changed; a deleted one's keys are forgotten with it.
            again: reads what was made the first time, as it is now.

        Raises:
            IdempotencyKeyReused: the key came before, with another operation or body.
        """
        if request is None:
            return effect(), True
        row = {"project": request.project, "key": request.key, "operation": request.operation, "body_digest": request.body_digest}
        with self.together() as connection:
            now = self.steady_time(connection, is_kept=True)
            is_this = _is(request)
            if not self._claim(connection, {**row, "search_id": None, "created_at": now}):
                there = connection.execute(select(idempotency_keys).where(is_this)).mappings().one()
                return again(_search_of(there, request=request)), False
            made = effect()
            connection.execute(update(idempotency_keys).where(is_this).values(search_id=search_of(made)))
            return made, True

    def find_done(self, request: OnceRequest | None) -> str | None:
        """The search that the request made or changed when it came before; None: it has not, or has no name.

        Raises:
            IdempotencyKeyReused: the key came before, with another operation or body.
        """
        if request is None:
            return None
        with self.read() as connection:
            there = connection.execute(select(idempotency_keys).where(_is(request))).mappings().one_or_none()
            if there is None or there["created_at"] <= self.steady_time(connection) - timedelta(hours=KEPT_HOURS):
                return None
        return _search_of(there, request=request)

    def _claim(self, connection: Connection, row: Json) -> bool:
        """Write the key, over one that is too old to count; whether nobody has it. Of two at the same moment the second waits here."""
        limit = row["created_at"] - timedelta(hours=KEPT_HOURS)
        return connection.execute(_CLAIM[connection.dialect.name], {**row, "limit": limit}).first() is not None


def _claim(row: sqlite.Insert | postgresql.Insert) -> Executable:
    values = {column.name: column for column in row.excluded if column.name not in ("project", "key")}
    is_old = idempotency_keys.c.created_at <= bindparam("limit")
    names = [idempotency_keys.c.project, idempotency_keys.c.key]
    return row.on_conflict_do_update(index_elements=names, set_=values, where=is_old).returning(idempotency_keys.c.key)


_CLAIM = {"sqlite": _claim(sqlite.insert(idempotency_keys)), "postgresql": _claim(postgresql.insert(idempotency_keys))}


def _is(request: OnceRequest) -> ColumnElement[bool]:
    return (idempotency_keys.c.project == request.project) & (idempotency_keys.c.key == request.key)


def _search_of(there: RowMapping, *, request: OnceRequest) -> str:
    if (there["operation"], there["body_digest"]) != (request.operation, request.body_digest):
        raise IdempotencyKeyReused(f"Idempotency-Key {request.key!r}: expected the request that it came with before, got another")
    return str(there["search_id"])
