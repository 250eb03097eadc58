from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from nas.errors import Conflict
from nas.store import database
from nas.store.database import VERSION_TABLE, Database
from nas.store.quotas import Quotas
from nas.store.store import Store
from nas.store.tables import metadata
from tests.store.store_values import shape

FIRST_RUN = """
import sys
from nas.store.store import Store
store = Store.open(sys.argv[1], migrate=True)
print(store.create_search(spec={}, inputs={}, plan={}, label="").id)
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
    search = store.create_search(spec={}, inputs={}, plan={}, label="kept")
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


def test_trials_that_are_there_belong_to_the_first_budget_after_the_upgrade(empty_url: str) -> None:
    old = Database(empty_url)
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    with old.write(fence=None) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        now = "'2026-01-01 00:00:00.000000'"
        columns = "id, label, state, num_events, created_at, updated_at, spec, inputs, plan"
        connection.execute(text(f"INSERT INTO searches ({columns}) VALUES ('srch_1', '', 'queued', 0, {now}, {now}, '{{}}', '{{}}', '{{}}')"))
        columns = "search_id, number, origin, shape, shape_key, parameters, state, created_at, updated_at"
        values = f"'srch_1', 0, 'sampler', '{json.dumps(shape())}', 'key', 5, 'waiting', {now}, {now}"
        connection.exec_driver_sql(f"INSERT INTO trials ({columns}) VALUES ({values})")
    old.close()

    store = Store.open(empty_url, migrate=True)

    assert [(trial.budget, trial.parameters) for trial in store.list_trials("srch_1")] == [(0, 5)]
    store.close()


def test_a_board_that_is_there_stays_its_searchs_after_the_upgrade(empty_url: str) -> None:
    old = Database(empty_url)
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    with old.write(fence=None) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0004")
        columns, now = "id, label, state, num_events, created_at, updated_at, spec, inputs, plan, board", "'2026-01-01 00:00:00.000000'"
        for number, board in ((1, """'{"winner": 3}'"""), (2, "NULL")):
            values = f"'srch_{number}', '', 'queued', 0, {now}, {now}, '{{}}', '{{}}', '{{}}', {board}"
            connection.exec_driver_sql(f"INSERT INTO searches ({columns}) VALUES ({values})")
    old.close()

    store = Store.open(empty_url, migrate=True)

    assert [store.whole_board(name) for name in ("srch_1", "srch_2")] == [{"winner": 3, "rows": []}, None]
    store.close()


def test_a_search_at_work_keeps_its_time_through_the_upgrade(empty_url: str) -> None:
    old = Database(empty_url)
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    with old.write(fence=None) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0006")
        columns, now = "id, label, state, num_events, created_at, updated_at, started_at, spec, inputs, plan", "'2026-01-01 00:00:00.000000'"
        for number, (state, started) in enumerate((("queued", "NULL"), ("searching", now))):
            values = f"'srch_{number}', '', '{state}', 0, {now}, {now}, {started}, '{{}}', '{{}}', '{{}}'"
            connection.exec_driver_sql(f"INSERT INTO searches ({columns}) VALUES ({values})")
    old.close()

    store = Store.open(empty_url, migrate=True)

    queued, searching = (store.get_search(f"srch_{number}") for number in range(2))
    assert (queued.active_since, queued.labels, queued.active_seconds) == (None, {}, 0.0)
    assert searching.active_since == searching.started_at
    assert store.request_pause(queued.id).state == "paused"
    assert store.request_pause(searching.id).state == "pausing"
    store.close()


def test_searches_of_before_there_were_projects_belong_to_the_default_one(empty_url: str) -> None:
    old = Database(empty_url)
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    now, plan = "'2026-01-01 00:00:00.000000'", json.dumps({"max_trials": 7})
    columns = "id, label, state, num_events, created_at, updated_at, spec, inputs, plan"
    insert = f"INSERT INTO searches ({columns}) VALUES ('%s', '', 'searching', 0, {now}, {now}, '{{}}', '{{}}', '{plan}')"
    with old.write(fence=None) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0007")
        connection.exec_driver_sql(insert % "srch_1")

    store = Store.open(empty_url, migrate=True)
    with old.write(fence=None) as connection:  # a process of the old version that still runs
        connection.exec_driver_sql(insert % "srch_2")
    old.close()

    assert {search.id for search in store.list_searches(project="default")} == {"srch_1", "srch_2"}
    assert not store.has_keys()
    project, used = store.get_project("default")
    assert (project.quotas, used.active_searches, used.active_trials) == (Quotas(), 2, 14)
    store.close()


def test_a_process_that_may_not_migrate_refuses_what_is_not_current_and_changes_nothing(empty_url: str) -> None:
    with pytest.raises(Conflict, match="got none; back up the database"):
        Store.open_for_service(empty_url, migrate=False)
    store = Store.open_for_service(empty_url, migrate=True)
    found, expected = store.schema_revisions()
    assert found == expected
    store.close()
    Store.open_for_service(empty_url, migrate=False).close()


def test_the_file_of_the_database_is_its_owners_alone(tmp_path: Path) -> None:
    """Other accounts of the machine: it has what all projects have done, and the digests of keys and sessions."""
    with contextlib.closing(Store.open(f"sqlite:///{tmp_path / 'data' / 'nas.db'}", migrate=True)) as store:
        store.create_project("somebody")

        modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "data").iterdir()}

    assert modes == dict.fromkeys(("nas.db", "nas.db-wal", "nas.db-shm"), 0o600)
