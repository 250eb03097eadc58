from __future__ import annotations

import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from nas.errors import Conflict
from nas.store.database import VERSION_TABLE
from nas.store.store import Store
from nas.store.tables import metadata

FIRST_RUN = """
import sys
from nas.store.store import Store
store = Store.open(sys.argv[1], migrate=True)
print(store.create_search(spec={}, inputs={}, plan={}, label="")[0].id)
"""


def test_the_migrations_build_the_tables_of_the_code(store: Store) -> None:
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_primary_keys_and_foreign_keys_are_enforced(store: Store) -> None:
    with store.read() as connection:
        inspector = inspect(connection)
        for table in metadata.sorted_tables:
            assert inspector.get_pk_constraint(table.name)["constrained_columns"] == [column.name for column in table.primary_key]
            there = {tuple(key["constrained_columns"]) for key in inspector.get_foreign_keys(table.name)}
            assert there == {tuple(column.name for column in key.columns) for key in table.foreign_key_constraints}


def test_migrating_again_changes_nothing(url: str, store: Store) -> None:
    search, _ = store.create_search(spec={}, inputs={}, plan={}, label="kept")
    again = Store.open(url, migrate=True)

    assert again.get_search(search.id) == search
    again.close()


def test_processes_that_run_first_at_the_same_time_all_succeed(empty_url: str) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", FIRST_RUN, empty_url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=60) for process in processes]

    assert [process.returncode for process in processes] == [0] * 4, outputs
    store = Store.open(empty_url)
    assert {search.id for search in store.list_searches()} == {output.strip() for output, _ in outputs}
    store.close()


def test_a_database_of_a_newer_version_is_refused(empty_url: str) -> None:
    store = Store.open(empty_url, migrate=True)
    with store.write(fence=None) as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    store.close()

    with pytest.raises(Conflict, match=r"database schema: .*9999"):
        Store.open(empty_url, migrate=True)
