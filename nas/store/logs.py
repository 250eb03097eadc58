"""Logs of attempts: the end of what each one said, kept after its node and its folder are gone."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select, update

from nas.errors import NotFound
from nas.store.database import Database
from nas.store.records import Fence, LogRecord, utc_now
from nas.store.tables import attempt_logs, attempts


class Logs(Database):
    """Keep and read the logs of attempts. What takes a `fence` raises Fenced when it is stale."""

    def save_log(self, attempt_id: str, text: str, *, fence: Fence | None) -> None:
        """Keep the log of an attempt, in place of what was kept of it before.

        Raises:
            NotFound: no such attempt.
        """
        with self.write(fence=fence) as connection:
            search_id = connection.execute(select(attempts.c.search_id).where(attempts.c.id == attempt_id)).scalar_one_or_none()
            if search_id is None:
                raise NotFound(f"attempt: expected the id of one, got {attempt_id!r}")
            keep_log(connection, attempt_id, search_id=search_id, text=text)

    def read_log(self, attempt_id: str) -> LogRecord | None:
        """What is kept of an attempt's log; None where nothing is."""
        query = select(attempt_logs).where(attempt_logs.c.attempt_id == attempt_id)
        with self.read() as connection:
            row = connection.execute(query).mappings().one_or_none()
            return None if row is None else LogRecord(**row)


def keep_log(connection: Connection, attempt_id: str, *, search_id: str, text: str | None) -> None:
    """Write a log in the transaction that ends its attempt; None leaves what there is."""
    if text is None:
        return
    values = {"text": text, "updated_at": utc_now()}
    if connection.execute(update(attempt_logs).where(attempt_logs.c.attempt_id == attempt_id).values(values)).rowcount == 0:
        connection.execute(insert(attempt_logs).values(attempt_id=attempt_id, search_id=search_id, **values))
