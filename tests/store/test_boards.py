"""Leaderboards: pages of one version are that version, whatever is written meanwhile; their cost is that of the page."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, func, select, text, update

from nas.errors import NotFound, Outdated
from nas.store import boards
from nas.store.boards import KEPT_SECONDS, BoardQuery
from nas.store.records import Json, SearchRecord, TrialState, utc_now
from nas.store.store import Store
from nas.store.tables import board_heads, board_rows
from tests.store.big_search import fill
from tests.store.store_values import board_row

NewSearch = Callable[..., SearchRecord]
SORTS = ("rank", "score", "kl", "parameters")
QUERIES = [BoardQuery(sort=sort, descending=descending) for sort in SORTS for descending in (False, True)]  # type: ignore[arg-type]
QUERIES += [BoardQuery(state=TrialState.STOPPED), BoardQuery(rung=1, sort="kl"), BoardQuery(pareto=True), BoardQuery(pareto=False, descending=True)]
QUERIES += [BoardQuery(max_parameters=1003), BoardQuery(min_parameters=1002, max_parameters=1006, sort="score"), BoardQuery(budget=1)]


def version_of(store: Store, search: SearchRecord) -> int:
    version = store.get_search(search.id).board_version
    assert version is not None
    return version


def pages(store: Store, search: SearchRecord, *, query: BoardQuery, version: int, limit: int) -> list[Json]:
    """All rows, a page at a time."""
    rows, after = [], None
    while True:
        page = store.leaderboard_page(search.id, version=version, query=query, after=after, limit=limit)
        assert len(page.rows) == limit or page.end is None
        rows += page.rows
        if page.end is None:
            return rows
        after = json.loads(json.dumps(page.end))  # as a cursor carries it


def expected(board: Json, query: BoardQuery) -> list[Json]:
    """What the query means, by sorting and filtering the whole board."""
    its = [board, *board.get("more_budgets", ())][query.budget]
    rows = [
        row
        for row in its["rows"]
        if (query.state is None or row["state"] == query.state)
        and (query.rung is None or row["rung"] == query.rung)
        and (query.pareto is None or (row["number"] in its["pareto"]) is query.pareto)
        and (query.min_parameters is None or row["parameters"] >= query.min_parameters)
        and (query.max_parameters is None or row["parameters"] <= query.max_parameters)
    ]
    if query.sort != "rank":
        sign = -1 if query.sort == "score" else 1
        rows.sort(key=lambda row: (row[query.sort] is None, 0 if row[query.sort] is None else sign * row[query.sort], row["number"]))
    return rows[::-1] if query.descending else rows


numbers = st.floats(0, 2, allow_nan=False).map(lambda value: round(value, 1))


@st.composite
def a_board(draw: st.DrawFn) -> Json:
    """Ranked rows first, then by rung and KL, as `rank` orders them; over one or two budgets."""

    def rows(first: int, number: int) -> Json:
        its = [
            board_row(
                first + step,
                rank=step + 1 if (is_ranked := draw(st.booleans())) else None,
                rung=3 if is_ranked else draw(st.integers(0, 2)),
                score=draw(numbers) if is_ranked else draw(st.none() | numbers),
                kl=draw(st.none() | numbers),
                parameters=draw(st.integers(1000, 1009)),
                state=draw(st.sampled_from(["completed", "stopped", "waiting"])),
            )
            for step in range(number)
        ]
        ranked = [row for row in its if row["rank"] is not None]
        others = sorted((row for row in its if row["rank"] is None), key=lambda row: (-row["rung"], row["kl"] is None, row["kl"] or 0.0, row["number"]))
        return {"rows": ranked + others, "pareto": [row["number"] for row in ranked[::3]], "winner": None}

    first = rows(0, draw(st.integers(0, 12)))
    return {**first, "more_budgets": [rows(100, draw(st.integers(0, 5)))]} if draw(st.booleans()) else first


@given(versions=st.lists(a_board(), min_size=1, max_size=3), limit=st.integers(1, 5))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_pages_of_every_version_are_the_board_that_was_stored(store: Store, new_search: NewSearch, versions: list[Json], limit: int) -> None:
    search, stored = new_search(), []
    for board in versions:
        store.save_board(search.id, board, fence=None)
        stored.append((version_of(store, search), board))
        assert store.whole_board(search.id) == board

    for version, board in stored:
        for query in QUERIES:
            if query.budget == 0 or "more_budgets" in board:
                assert pages(store, search, query=query, version=version, limit=limit) == expected(board, query)
        assert store.get_board_head(search.id, version=version)["of_rows"]["num_rows"] == len(board["rows"])


def test_pages_are_of_one_version_while_others_are_written(store: Store, new_search: NewSearch) -> None:
    search, stop = new_search(), threading.Event()

    def board(turn: int) -> Json:
        rows = [
            board_row(number, rank=place + 1, score=1 - place / 100, turn=turn) for place, number in enumerate((7 * step + turn) % 50 for step in range(50))
        ]
        return {"rows": rows, "pareto": [], "winner": None}

    def write() -> None:
        turn = 0
        while not stop.is_set():
            store.save_board(search.id, board(turn := turn + 1), fence=None)

    store.save_board(search.id, board(0), fence=None)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen: set[int] = set()
        while len(seen) < 5:
            version = version_of(store, search)
            rows = pages(store, search, query=BoardQuery(), version=version, limit=3)
            turns = {row["turn"] for row in rows}
            assert len(turns) == 1
            assert rows == board(turns.pop())["rows"]
            seen.add(version)
    finally:
        stop.set()
        writer.join()


def test_only_rows_that_changed_are_written(store: Store, new_search: NewSearch) -> None:
    search = new_search()
    rows = [board_row(number, rank=None, rung=0, kl=float(number)) for number in range(30)]
    store.save_board(search.id, {"rows": rows, "pareto": []}, fence=None)
    rows[3] = {**rows[3], "state": "stopped"}
    new = board_row(99, rank=None, rung=1, kl=0.1)  # before all others
    store.save_board(search.id, {"rows": [new, *rows[:-1]], "pareto": []}, fence=None)

    with store.read() as connection:
        counted = connection.execute(select(board_rows.c.since, func.count()).group_by(board_rows.c.since).order_by(board_rows.c.since)).all()
    assert [number for _, number in counted] == [30, 2]
    assert [row["number"] for row in pages(store, search, query=BoardQuery(), version=version_of(store, search), limit=50)] == [99, *range(29)]


def test_a_version_is_kept_for_a_while_and_then_says_that_it_is_gone(store: Store, new_search: NewSearch) -> None:
    search, other = new_search(), new_search()
    versions = []
    for turn in range(3):
        for one in (search, other):
            store.save_board(one.id, {"rows": [board_row(0, turn=turn), board_row(1)], "pareto": []}, fence=None)
        versions.append(version_of(store, search))
    with store.write(fence=None) as connection:  # the first two were written long ago: the second was the newest one for all that time
        long_ago = utc_now() - timedelta(seconds=KEPT_SECONDS + 1)
        old = board_heads.c.search_id == search.id, board_heads.c.version.in_(versions[:2])
        connection.execute(update(board_heads).where(*old).values(created_at=long_ago))

    store.save_board(search.id, {"rows": [board_row(0, turn=3), board_row(1)], "pareto": []}, fence=None)

    with pytest.raises(Outdated, match="expected a version that is still kept"):
        store.leaderboard_page(search.id, version=versions[0], query=BoardQuery(), limit=2)
    with pytest.raises(Outdated):
        store.get_board_head(search.id, version=versions[0])
    for turn in (1, 2):
        assert store.leaderboard_page(search.id, version=versions[turn], query=BoardQuery(), limit=1).rows[0]["turn"] == turn
    with store.read() as connection:
        assert connection.execute(select(func.count()).where(board_rows.c.search_id == search.id, board_rows.c.number == 0)).scalar_one() == 3
        assert connection.execute(select(func.count()).where(board_rows.c.search_id == other.id, board_rows.c.number == 0)).scalar_one() == 3


def test_a_board_of_no_search_is_refused(store: Store) -> None:
    with pytest.raises(NotFound):
        store.save_board("srch_none", {"rows": []}, fence=None)
    assert store.whole_board("srch_none") is None


def test_a_sample_of_a_long_board_has_the_best_the_front_and_some_of_everything(store: Store, new_search: NewSearch) -> None:
    search = new_search()
    rows = [board_row(number, rank=number + 1 if number < 40 else None, rung=2 if number < 40 else 0, kl=float(number)) for number in range(400)]
    store.save_board(search.id, {"rows": rows, "pareto": [0, 39], "winner": None}, fence=None)

    found = [row["number"] for row in store.board_sample(search.id, version=version_of(store, search), budget=0, most=20)]

    assert found == sorted({*range(20), 39, *range(0, 400, 20)})


def test_shapes_of_both_boards_are_found_in_the_order_of_the_first(store: Store, new_search: NewSearch, new_trial: Callable[..., Any]) -> None:
    first, second = new_search(), new_search()
    for search, layers in ((first, (5, 6, 7)), (second, (8, 7, 5))):
        for number, depth in enumerate(layers):
            new_trial(search, number, shape=board_row(0)["shape"] | {"num_hidden_layers": depth})
    rows = [board_row(number, rank=3 - number) for number in range(3)]
    store.save_board(first.id, {"rows": rows[::-1], "pareto": []}, fence=None)
    store.save_board(second.id, {"rows": [board_row(number) for number in range(3)], "pareto": []}, fence=None)

    shared = store.shared_shapes(first.id, second.id, limit=10)

    assert [(one["number"], other["number"]) for one, other in shared] == [(2, 1), (0, 2)]
    assert len(store.shared_shapes(first.id, second.id, limit=1)) == 1
    assert store.shared_shapes(first.id, new_search().id, limit=10) == []


@pytest.fixture
def big(store: Store, new_search: NewSearch) -> SearchRecord:
    """A search of 2,000 trials beside a small one, with the statistics that a running database has."""
    fill(store, new_search().id, num_trials=100)
    search = new_search()
    fill(store, search.id, num_trials=2000)
    with store.write(fence=None) as connection:
        connection.execute(text("ANALYZE"))
    return store.get_search(search.id)


def plans(store: Store, ask: Callable[[], object]) -> list[str]:
    """How the database carries out what `ask` asks."""
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(store._engine, "before_cursor_execute", note)
    ask()
    event.remove(store._engine, "before_cursor_execute", note)
    explain = "EXPLAIN QUERY PLAN " if store.is_sqlite else "EXPLAIN "
    with store.read() as connection:
        return [
            "\n".join(str(row[-1]) for row in connection.exec_driver_sql(explain + statement, parameters))
            for statement, parameters in asked
            if statement.startswith("SELECT")
        ]


def test_every_order_is_read_from_its_index_and_never_sorted(store: Store, big: SearchRecord) -> None:
    version = version_of(store, big)
    for query in (query for query in QUERIES if query == BoardQuery(sort=query.sort, descending=query.descending)):
        first = store.leaderboard_page(big.id, version=version, query=query, limit=100)
        for after, filtered in ((None, query), (first.end, query), (first.end, replace(query, state=TrialState.STOPPED))):
            ask = partial(store.leaderboard_page, big.id, version=version, query=filtered, after=after, limit=100)
            assert_indexed(plans(store, ask)[0], f"ix_board_rows_{query.sort}")


def test_other_reads_of_a_long_search_use_an_index(store: Store, big: SearchRecord) -> None:
    version = version_of(store, big)
    ordered = {
        partial(store.list_events, big.id, after=3000, limit=100): "events",
        partial(store.board_rows, big.id, version=version, numbers=[1, 2, 3]): "board_rows",
        partial(store.page_trials, big.id, after=(500,), limit=100): "trials",
        partial(store.list_points, big.id, trial=5): "points",
    }
    for ask, table in ordered.items():
        assert_indexed(plans(store, ask)[0], f"sqlite_autoindex_{table}_1", f"pk_{table}")
    for order in ("parameters", "-parameters"):
        assert_indexed(plans(store, partial(store.page_trials, big.id, order=order, after=(60_000, 5), limit=100))[0], "ix_trials_search_id_parameters_number")
    # A trial's few rows may be sorted, but no others read.
    (rungs,) = plans(store, partial(store.list_rungs, big.id, trial=5, with_documents=False))
    assert "search_id=? AND trial=?" in rungs or "trial = 5" in rungs.split("Filter")[0]
    (attempts,) = plans(store, partial(store.list_attempts, big.id, trial=5))
    assert "ix_attempts_search_id_trial" in attempts
    running = partial(store.list_trials, big.id, states=[TrialState.RUNNING, TrialState.WAITING], without_result=True)
    assert "ix_trials_search_id_rung_number" in plans(store, running)[0]
    assert_indexed(plans(store, partial(store.page_trials, big.id, state=TrialState.FAILED, limit=100))[0], "ix_trials_search_id_state_number")


def assert_indexed(plan: str, *names: str) -> None:
    """By one of these, in the order that it has."""
    assert any(name in plan for name in names), plan
    assert "Sort" not in plan
    assert "TEMP B-TREE" not in plan


def test_a_write_that_fails_half_way_leaves_the_board_as_it_was(store: Store, new_search: NewSearch, monkeypatch: pytest.MonkeyPatch) -> None:
    search, board = new_search(), {"rows": [board_row(number) for number in range(5)], "pareto": []}
    store.save_board(search.id, board, fence=None)
    before = store.get_search(search.id)

    def fail(*_: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(boards, "_forget", fail)
    with pytest.raises(RuntimeError, match="killed"):
        store.save_board(search.id, {"rows": [board_row(1, state="stopped")], "pareto": []}, fence=None)

    assert store.get_search(search.id) == before
    assert store.whole_board(search.id) == board
