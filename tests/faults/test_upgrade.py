"""The upgrade of a service in the middle of its searches: what the previous release left goes on under this one, and ends well.

`previous_release/` has the database and the mailboxes of that release, with one search that has ended, one half-way (results of rungs, two steps that run, of
which one has ended unheard), one that is being cancelled, one that prepares and one in the queue; its `make.py` says how it was made.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import JSON, MetaData, create_engine, insert, select

from nas.store.database import VERSION_TABLE, Database, _alembic_config
from nas.store.records import AttemptState, SearchState
from tests.faults.history import History
from tests.faults.summary import RecordProperty, record
from tests.simulation.several import Fleet, View

pytestmark = pytest.mark.faults

PREVIOUS = Path(__file__).parent / "previous_release"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The previous release's database, on each kind."""
    file = tmp_path / "nas.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript((PREVIOUS / "data.sql").read_text(encoding="utf-8"))
        connection.execute("PRAGMA journal_mode=WAL")
    for name, text in json.loads((PREVIOUS / "files.json").read_text(encoding="utf-8")).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if request.param == "sqlite":
        return f"sqlite:///{file}"
    url = str(request.getfixturevalue("new_postgresql_url")())
    copy(f"sqlite:///{file}", to=url)
    return url


def copy(source: str, *, to: str) -> None:
    """All rows of a SQLite file into a PostgreSQL database of the same revision, made by the migrations."""
    old = create_engine(source)
    tables = MetaData()
    tables.reflect(old)
    with old.begin() as connection:
        revision = connection.execute(select(tables.tables[VERSION_TABLE])).scalar_one()
    new, config = Database(to), _alembic_config()
    with new.write(fence=None) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    there = MetaData()
    with new.write(fence=None) as target, old.begin() as connection:
        there.reflect(target)
        for table in there.sorted_tables:
            if table.name == VERSION_TABLE:
                continue
            for column in table.columns:
                if isinstance(column.type, JSON):
                    column.type.none_as_null = True
            target.execute(table.delete())
            if rows := [{name: with_zone(value) for name, value in row.items()} for row in connection.execute(select(tables.tables[table.name])).mappings()]:
                target.execute(insert(table), rows)
    new.close()
    old.dispose()


def with_zone(value: Any) -> Any:
    """SQLite keeps UTC without saying so."""
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) else value


@pytest.fixture
def fleet(tmp_path: Path, url: str) -> Iterator[Fleet]:
    """This release on it: opening the store migrates."""
    fleet = Fleet(folder=tmp_path, num_searches=0, num_trials=0, seed=0, database_url=url)
    yield fleet
    fleet.close()


def results_of_sql() -> dict[tuple[str, int, int], Any]:
    """Trial and rung of every result in the previous release's database, by search."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript((PREVIOUS / "data.sql").read_text(encoding="utf-8"))
        rows = connection.execute("SELECT search_id, trial, rung, summary FROM rungs").fetchall()
    return {(search_id, trial, rung): json.loads(summary)["kl"]["value"] for search_id, trial, rung, summary in rows}


def test_searches_of_the_previous_release_go_on_and_end_well(fleet: Fleet, url: str, record_property: RecordProperty) -> None:
    before = results_of_sql()
    searches = {search.label or "ended": search.id for search in fleet.store.list_searches()}
    histories = [History(store=fleet.store, search_id=search_id) for search_id in searches.values()]
    running = [attempt for search_id in searches.values() for attempt in fleet.store.list_attempts(search_id) if attempt.state is AttemptState.RUNNING]
    unheard = [attempt for attempt in running if (fleet.settings.searches_folder / attempt.search_id / "attempts" / attempt.id / "result.json").exists()]

    fleet.join()
    fleet.join()
    fleet.to_end()

    states = {label: fleet.store.get_search(search_id).state for label, search_id in searches.items()}
    assert states.pop("cancelling") is SearchState.CANCELLED
    assert set(states.values()) == {SearchState.SUCCEEDED}
    record(record_property, histories, kills={"service of the previous release": 1})
    after = {attempt.id: attempt.state for search_id in searches.values() for attempt in fleet.store.list_attempts(search_id)}
    assert len(running) >= 4
    assert [after[attempt.id] for attempt in unheard] == [AttemptState.SUCCEEDED], "a step that had ended ran again"
    assert {after[attempt.id] for attempt in running if attempt not in unheard} <= {AttemptState.LOST, AttemptState.CANCELLED}
    kept = {(rung.search_id, rung.trial, rung.rung): rung.result["kl"]["value"] for id in searches.values() for rung in fleet.store.list_rungs(id)}
    assert before.items() <= kept.items(), "a result of the previous release changed, or is gone"
    View(store=fleet.store, search_id=searches["searching"], history=[]).check()
