"""Logs of attempts: the end of what each one said, kept after its node and its folder are gone."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, insert, select, update

from nas.store.database import Database
from nas.store.machines import Fence
from nas.store.records import LogRecord, utc_now
from nas.store.tables import attempt_logs

_COLUMNS = [column for column in attempt_logs.c if column.name != "num_bytes"]


class Logs(Database):
    """Keep and read the logs of attempts. What takes a `fence` raises Fenced when it is stale."""

    def save_logs(self, search_id: str, logs: Mapping[str, str], *, fence: Fence | None) -> None:
        """Keep the logs of attempts of one search, by attempt, each in place of what was kept of it before."""
        with self.write(fence=fence) as connection:
            for attempt_id, text in logs.items():
                keep_log(connection, attempt_id, search_id=search_id, text=text)

    def read_log(self, attempt_id: str) -> LogRecord | None:
        """What is kept of an attempt's log; None where nothing is."""
        query = select(*_COLUMNS).where(attempt_logs.c.attempt_id == attempt_id)
        with self.read() as connection:
            row = connection.execute(query).mappings().one_or_none()
            return None if row is None else LogRecord(**row)

    def list_logged(self, search_id: str) -> set[str]:
        """Ids of the attempts of a search of which something is kept."""
        with self.read() as connection:
            return set(connection.execute(select(attempt_logs.c.attempt_id).where(attempt_logs.c.search_id == search_id)).scalars())


def keep_log(connection: Connection, attempt_id: str, *, search_id: str, text: str | None) -> None:
    """Write a log in the transaction that ends its attempt; None leaves what there is."""
    if text is None:
        return
    values = {"text": text, "updated_at": utc_now(), "num_bytes": len(text.encode("utf-8", "replace"))}
    if connection.execute(update(attempt_logs).where(attempt_logs.c.attempt_id == attempt_id).values(values)).rowcount == 0:
        connection.execute(insert(attempt_logs).values(attempt_id=attempt_id, search_id=search_id, **values))
