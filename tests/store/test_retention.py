from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from nas.store import retention
from nas.store.records import SearchRecord, SearchState
from nas.store.store import Store


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_BATCH", 2)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many days pass by the database's clock."""
    now = Store.wall_time

    def pass_days(days: float) -> None:
        def wall_time(store: Store, connection: Any) -> datetime:
            return now(store, connection) + timedelta(days=days)

        monkeypatch.setattr(Store, "wall_time", wall_time)

    return pass_days


def keep_logs(store: Store, search: SearchRecord, *texts: str) -> list[str]:
    """An attempt for each text, which it said."""
    attempts = [store.start_attempt(search.id, stage="prepare", trial=None, rung=None, fence=None).id for _ in texts]
    for attempt, said in zip(attempts, texts, strict=True):
        store.save_logs(search.id, {attempt: said}, fence=None)
    return attempts


def drop_logs(store: Store, **limits: int) -> list[int]:
    """How many each call removed, until one removed none."""
    removed = []
    while number := store.drop_old_logs(**{"days": 30, "max_bytes": 10**9} | limits):
        removed.append(number)
    return removed


def test_logs_go_by_age_a_few_at_a_time(store: Store, new_search: Callable[..., SearchRecord], later: Callable[[float], None]) -> None:
    attempts = keep_logs(store, new_search(), "a", "b", "c")

    assert drop_logs(store) == []
    later(31.0)
    assert drop_logs(store) == [2, 1]
    assert [store.read_log(attempt) for attempt in attempts] == [None] * 3


def test_of_too_many_bytes_the_oldest_go(store: Store, new_search: Callable[..., SearchRecord]) -> None:
    attempts = keep_logs(store, new_search(), "ü" * 50, "b" * 100, "c" * 100, "d" * 100)

    assert drop_logs(store, max_bytes=400) == []
    assert drop_logs(store, max_bytes=250) == [2]
    assert [log.text[0] if (log := store.read_log(attempt)) else None for attempt in attempts] == [None, None, "c", "d"]


def test_events_of_searches_that_ended_long_ago_go_but_for_the_last(
    store: Store, new_search: Callable[..., SearchRecord], later: Callable[[float], None]
) -> None:
    ended, open_search = new_search(), new_search()
    for search in (ended, open_search):
        for number in range(5):
            store.add_event(search.id, "noted", {"number": number})
    store.request_cancel(ended.id)
    version = store.get_search(ended.id).version
    later(366.0)

    removed = 0
    while number := store.drop_old_events(days=365):
        assert number <= 2
        removed += number

    assert removed == version - 1
    assert [(event.sequence, event.type) for event in store.list_events(ended.id)] == [(version, f"search.{SearchState.CANCELLED}")]
    assert len(store.list_events(open_search.id)) == 6
    assert store.get_search(ended.id).version == version


def test_what_ended_a_moment_ago_stays_whole(store: Store, new_search: Callable[..., SearchRecord]) -> None:
    search = new_search()
    store.request_cancel(search.id)

    assert store.drop_old_events(days=1) == 0
    assert len(store.list_events(search.id)) == 2


def test_the_sum_of_all_sizes_reads_no_text(sqlite_url: str) -> None:
    """PostgreSQL keeps long texts apart from their rows by itself."""
    store = Store.open(sqlite_url)
    with store.read() as connection:
        plan = " ".join(str(row) for row in connection.execute(text("EXPLAIN QUERY PLAN SELECT sum(num_bytes) FROM attempt_logs")))
    store.close()

    assert "USING COVERING INDEX" in plan
