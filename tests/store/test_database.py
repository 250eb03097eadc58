from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from nas.errors import InvalidSpec, StoreUnavailable
from nas.store.store import Store

WRITE_FOR_EVER = """
import sys
from nas.store.store import Store
store = Store.open(sys.argv[1])
search = store.create_search(spec={}, inputs={}, plan={}, label="")
print(search.id, flush=True)
while True:
    print(store.add_event(search.id, "test.event", {}).sequence, flush=True)
"""


BUSY = """
import sys, time
from nas.store.store import Store
store = Store.open(sys.argv[1])
for number in range(10**6):
    with store.write(fence=None) as connection:
        connection.exec_driver_sql("UPDATE projects SET max_active_trials = coalesce(max_active_trials, 0) + 1 WHERE name = 'default'")
        time.sleep(0.008)
    if number == 0:
        print("busy", flush=True)
"""


@pytest.mark.faults
def test_an_acknowledged_write_survives_kill_9(url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, url], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        search_id = process.stdout.readline().strip()
        acknowledged = [int(process.stdout.readline()) for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in process.stdout.read().splitlines()]
    store = Store.open(url)
    sequences = [event.sequence for event in store.list_events(search_id, limit=100_000)]
    store.close()

    assert process.returncode == -signal.SIGKILL
    assert set(acknowledged) <= set(sequences)
    # The write that was under way may have been committed without having been acknowledged; it is whole or absent.
    assert sequences == list(range(1, len(sequences) + 1))
    assert len(sequences) - 1 - len(acknowledged) <= 1


def test_opening_touches_nothing(tmp_path: Path) -> None:
    Store.open(f"sqlite:///{tmp_path / 'folder' / 'nas.db'}").close()

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "got"),
    [
        ("mysql://user:secret@host/db", "mysql:"),
        ("no url: secret", "no URL"),
        ("sqlite://", "without a file"),
        ("sqlite:///:memory:", "without a file"),
    ],
)
def test_another_database_is_refused_without_showing_its_password(url: str, got: str) -> None:
    with pytest.raises(InvalidSpec, match=f"database_url: expected sqlite:///FILE or postgresql://.*{got}") as caught:
        Store.open(url)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["postgresql://user:secret@127.0.0.1:1/nothing", "sqlite:////nowhere/nas.db"])
def test_a_database_that_is_not_there_is_told_without_its_address(url: str) -> None:
    store = Store.open(url)

    with pytest.raises(StoreUnavailable) as caught:
        store.list_teachers()
    with pytest.raises(StoreUnavailable):
        store.add_event("srch_1", "test.event", {})

    assert str(caught.value) == "the database does not answer"
    store.close()


def test_a_writer_that_keeps_its_turn_too_long_is_told_as_a_store_that_does_not_answer(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(sqlite_url, migrate=True)
    monkeypatch.setattr("nas.store.database._BUSY_SECONDS", 0.05)

    with store.write(fence=None), ThreadPoolExecutor(1) as other:
        with pytest.raises(StoreUnavailable):
            other.submit(store.create_project, "late").result()
        assert other.submit(store.list_projects).result()[0][0].name == "default"  # readers never wait
    store.create_project("next")
    store.close()


def test_a_writer_finds_the_gaps_of_a_process_that_writes_without_a_pause(sqlite_url: str) -> None:
    """Counted in that process's transactions. SQLite's own wait, whose sleeps grow to a tenth of a second, let a hundred or two pass for each of these."""
    store = Store.open(sqlite_url, migrate=True)
    with subprocess.Popen([sys.executable, "-c", BUSY, sqlite_url], stdout=subprocess.PIPE) as busy:
        assert busy.stdout is not None
        busy.stdout.readline()
        passed = 0
        for number in range(10):
            time.sleep(0.05)
            before = num_written(store)
            store.create_project(f"project-{number}")
            passed += num_written(store) - before
        busy.kill()
    store.close()
    assert passed < 10 * 40


def num_written(store: Store) -> int:
    with store.read() as connection:
        return connection.execute(text("SELECT max_active_trials FROM projects WHERE name = 'default'")).scalar_one()


def test_sqlite_is_set_up_for_durable_concurrent_use(sqlite_url: str) -> None:
    store = Store.open(sqlite_url)
    with store.read() as connection:
        settings = {name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")}
    store.close()

    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 60_000}


def test_importing_the_store_loads_nothing_heavy() -> None:
    heavy = "torch transformers ray optuna lm_eval alembic numpy"
    code = f"import sys, nas.store.store; print([name for name in '{heavy}'.split() if name in sys.modules])"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
