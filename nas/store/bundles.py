"""Bundles of trials that are no winners: asked for by users, packed by a controller. A row is a wish until it is packed, or was tried in vain."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, RowMapping, Select, Update, insert, select, update

from nas.errors import Conflict, NotFound
from nas.store.database import Database
from nas.store.machines import Fence
from nas.store.quotas import add_device_seconds, charge, lock_project
from nas.store.records import BundleRecord, BundleState, Json, utc_now
from nas.store.searches import get_search, lock_search
from nas.store.tables import artifacts, bundles
from nas.store.trials import get_trial


class Bundles(Database):
    """Ask for a bundle, answer, read. What takes a `fence` raises Fenced when it is stale, and does nothing where the search was deleted meanwhile."""

    def request_bundle(self, search_id: str, trial: int) -> BundleRecord:
        """Have a trial's bundle packed. One that waits or is packed is left alone, one that failed is tried again.

        Raises:
            NotFound: no such search or trial.
            Conflict: the search has not ended: its files may still change.
            QuotaExceeded: its project has used up its device seconds of the day.
        """
        with self.write(fence=None) as connection:
            search = get_search(connection, search_id)
            get_trial(connection, search_id, trial)
            if not search.state.is_terminal:  # which is never left: there is nothing to lock yet
                raise Conflict(f"search {search_id}: expected one that has ended, got state {search.state}; a bundle is packed afterwards")
            quotas = lock_project(connection, search.project)
            lock_search(connection, search_id)
            row = {"state": BundleState.WAITING, "requested_at": utc_now(), "finished_at": None, "num_failures": 0, "error": None}
            found = connection.execute(_of(search_id, trial)).mappings().one_or_none()
            if found is None or found["state"] == BundleState.FAILED:
                charge(connection, search.project, quotas=quotas, num_searches=0, num_trials=0, tokens=0)
            if found is None:
                connection.execute(insert(bundles).values(search_id=search_id, trial=trial, **row))
            elif found["state"] == BundleState.FAILED:
                connection.execute(_update(search_id, trial).values(row))
            return _record(connection.execute(_of(search_id, trial)).mappings().one())

    def find_bundle(self, search_id: str, trial: int) -> BundleRecord | None:
        """What is known of a trial's bundle; None: nobody asked for it."""
        with self.read() as connection:
            row = connection.execute(_of(search_id, trial)).mappings().one_or_none()
        return None if row is None else _record(row)

    def waiting_bundles(self, *, limit: int) -> list[BundleRecord]:
        """Those that are still to be packed, the first that was asked for first."""
        query = select(bundles).where(bundles.c.state == BundleState.WAITING).order_by(bundles.c.requested_at, bundles.c.search_id, bundles.c.trial)
        with self.read() as connection:
            return [_record(row) for row in connection.execute(query.limit(limit)).mappings()]

    def save_bundle(self, search_id: str, trial: int, *, path: str, sha256: str, num_bytes: int, device_seconds: float, fence: Fence | None) -> None:
        """It is packed: its file is found by its digest from now on."""
        values = {"state": BundleState.PACKED, "finished_at": utc_now(), "path": path, "sha256": sha256, "num_bytes": num_bytes}
        with self.write(fence=fence) as connection:
            if self._end(connection, search_id, trial, values, device_seconds=device_seconds):
                connection.execute(self.insert_if_new(artifacts).values(sha256=sha256, search_id=search_id, path=path))

    def fail_bundle(self, search_id: str, trial: int, *, error: Json, max_failures: int, device_seconds: float, fence: Fence | None) -> None:
        """A try has failed: it waits for another one, until so many have failed."""
        with self.write(fence=fence) as connection:
            found = connection.execute(_of(search_id, trial)).mappings().one_or_none()
            if found is not None:
                num_failures = found["num_failures"] + 1
                is_spent = num_failures >= max_failures
                ended = {"state": BundleState.FAILED, "finished_at": utc_now()} if is_spent else {}
                self._end(connection, search_id, trial, {"num_failures": num_failures, "error": error, **ended}, device_seconds=device_seconds)

    @staticmethod
    def _end(connection: Connection, search_id: str, trial: int, values: Json, *, device_seconds: float) -> bool:
        """How a try ended; False: the search is gone."""
        try:
            lock_search(connection, search_id)
        except NotFound:
            return False
        add_device_seconds(connection, search_id, device_seconds)
        return connection.execute(_update(search_id, trial).values(values)).rowcount == 1


def _of(search_id: str, trial: int) -> Select[Any]:
    return select(bundles).where(bundles.c.search_id == search_id, bundles.c.trial == trial)


def _update(search_id: str, trial: int) -> Update:
    return update(bundles).where(bundles.c.search_id == search_id, bundles.c.trial == trial)


def _record(row: RowMapping) -> BundleRecord:
    return BundleRecord(**{**row, "state": BundleState(row["state"])})
