"""What is not kept for ever: logs of attempts by age and by size, events of searches that ended long ago, keys of requests that no longer count.

One call is one short transaction, so that whoever works meanwhile never waits long; it says how much it removed, and whoever
cleans up calls again until that is nothing.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import delete, func, select, tuple_

from nas.store.database import Database
from nas.store.idempotency import KEPT_HOURS
from nas.store.tables import attempt_logs, events, idempotency_keys, searches

_BATCH = 500
"""Rows that one transaction removes at most."""


class Retention(Database):
    """Remove what is too old, or too much. No fence: it is the same whoever does it, and doing it twice does no harm."""

    def drop_old_logs(self, *, days: int, max_bytes: int) -> int:
        """Remove the oldest logs: those that are older, and of the others as many as are too much together.

        Args:
            max_bytes: of UTF-8 text, all logs together.
        Returns:
            how many were removed; 0 when nothing is left to remove.
        """
        with self.write(fence=None) as connection:
            limit = self.wall_time(connection) - timedelta(days=days)
            excess = (connection.execute(select(func.sum(attempt_logs.c.num_bytes))).scalar() or 0) - max_bytes
            oldest = select(attempt_logs.c.attempt_id, attempt_logs.c.updated_at, attempt_logs.c.num_bytes).order_by(attempt_logs.c.updated_at).limit(_BATCH)
            leaving = []
            for attempt_id, updated_at, num_bytes in connection.execute(oldest):
                if updated_at >= limit and excess <= 0:
                    break
                leaving.append(attempt_id)
                excess -= num_bytes
            if leaving:
                connection.execute(delete(attempt_logs).where(attempt_logs.c.attempt_id.in_(leaving)))
            return len(leaving)

    def drop_old_events(self, *, days: int) -> int:
        """Remove events of searches that ended so long ago, all but the last one of each: it tells how the search ended, and is its version.

        Returns:
            how many were removed; 0 when nothing is left to remove.
        """
        with self.write(fence=None) as connection:
            limit = self.wall_time(connection) - timedelta(days=days)
            first = select(func.min(events.c.sequence)).where(events.c.search_id == searches.c.id).scalar_subquery()
            query = select(searches.c.id, searches.c.num_events, first).where(searches.c.finished_at < limit, first < searches.c.num_events).limit(1)
            found = connection.execute(query).one_or_none()
            if found is None:
                return 0
            search_id, last, begin = found
            leaving = (events.c.search_id == search_id, events.c.sequence < min(last, begin + _BATCH))
            return connection.execute(delete(events).where(*leaving)).rowcount

    def drop_old_keys(self) -> int:
        """Remove idempotency keys that stand for nothing any more.

        Returns:
            how many were removed; 0 when nothing is left to remove.
        """
        names = (idempotency_keys.c.project, idempotency_keys.c.key)
        with self.write(fence=None) as connection:
            is_old = idempotency_keys.c.created_at <= self.steady_time(connection) - timedelta(hours=KEPT_HOURS)
            # One that somebody takes anew in this moment is not waited for.
            leaving = connection.execute(select(*names).where(is_old).limit(_BATCH).with_for_update(skip_locked=True)).all()
            if leaving:
                connection.execute(delete(idempotency_keys).where(tuple_(*names).in_(leaving)))
            return len(leaving)
