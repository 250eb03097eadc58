from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from nas.errors import Conflict, NotFound
from nas.store.records import SearchRecord, SearchState
from nas.store.store import Store
from tests.store.store_values import board_row

NewSearch = Callable[..., SearchRecord]
S = SearchState
TERMINAL = [S.SUCCEEDED, S.FAILED, S.CANCELLED]


def bring_to(store: Store, search: SearchRecord, state: SearchState) -> SearchRecord:
    if state is S.QUEUED:
        return search
    return store.change_search(search.id, to=state, expected=[S.QUEUED], fence=None)


def test_a_new_search_is_queued_and_its_event_says_so(store: Store, new_search: NewSearch) -> None:
    search = new_search(label="mine", spec={"teacher": "t", "seed": 1})

    assert (search.state, search.label, search.spec, search.board, search.version) == (S.QUEUED, "mine", {"teacher": "t", "seed": 1}, None, 1)
    assert store.get_search(search.id) == search
    assert [(event.sequence, event.type, event.data) for event in store.list_events(search.id)] == [(1, "search.created", {"label": "mine"})]


@pytest.mark.parametrize("search_id", ["srch_none", "", "\0", "\ud800", "x" * 10_000])
def test_an_unknown_search_is_not_found_whatever_the_text(store: Store, search_id: str) -> None:
    with pytest.raises(NotFound, match="search: expected the id of one"):
        store.get_search(search_id)
    with pytest.raises(NotFound):
        store.request_cancel(search_id)
    with pytest.raises(NotFound):
        store.add_event(search_id, "x", {})


def test_a_label_that_a_database_cannot_hold_is_kept_readable(store: Store, new_search: NewSearch) -> None:
    assert new_search(label="a\0b\ud800c é 😀").label == "a\ufffdb\ufffdc é 😀"


def test_ids_sort_by_the_time_of_submission(new_search: NewSearch) -> None:
    ids = [new_search().id for _ in range(20)]

    assert ids == sorted(ids)


class TestChangeSearch:
    def test_it_moves_only_from_an_expected_state(self, store: Store, new_search: NewSearch) -> None:
        search = new_search()

        with pytest.raises(Conflict, match=f"search {search.id}: expected state preparing or searching, got queued"):
            store.change_search(search.id, to=S.CONFIRMING, expected={S.SEARCHING, S.PREPARING}, fence=None)
        assert store.get_search(search.id) == search

    def test_times_error_and_events_follow_the_states(self, store: Store, new_search: NewSearch) -> None:
        search = new_search()
        preparing = store.change_search(search.id, to=S.PREPARING, expected=[S.QUEUED], fence=None)
        searching = store.change_search(search.id, to=S.SEARCHING, expected=[S.PREPARING], fence=None, data={"trials": 3})
        failed = store.change_search(search.id, to=S.FAILED, expected=[S.SEARCHING], fence=None, error={"reason": "oom"})

        assert preparing.started_at is not None
        assert preparing.finished_at is None
        assert searching.started_at == failed.started_at == preparing.started_at
        assert failed.finished_at is not None
        assert failed.finished_at >= preparing.started_at >= search.created_at
        assert failed.error == {"reason": "oom"}
        assert [(event.type, event.data) for event in store.list_events(search.id, after=1)] == [
            ("search.preparing", {}),
            ("search.searching", {"trials": 3}),
            ("search.failed", {"error": {"reason": "oom"}}),
        ]

    @pytest.mark.parametrize("state", TERMINAL)
    def test_a_terminal_state_is_never_left(self, store: Store, new_search: NewSearch, state: SearchState) -> None:
        search = bring_to(store, new_search(), state)

        with pytest.raises(Conflict):
            store.change_search(search.id, to=S.SEARCHING, expected=list(SearchState), fence=None)

    def test_of_two_changes_at_the_same_time_one_is_made(self, store: Store, new_search: NewSearch) -> None:
        search = new_search()

        def change(to: SearchState) -> bool:
            try:
                store.change_search(search.id, to=to, expected=[S.QUEUED], fence=None)
            except Conflict:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(change, [S.PREPARING, S.FAILED] * 4)) == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (S.QUEUED, S.CANCELLED),
        (S.PREPARING, S.CANCELLING),
        (S.SEARCHING, S.CANCELLING),
        (S.CONFIRMING, S.CANCELLING),
        (S.CANCELLING, S.CANCELLING),
        *[(state, None) for state in TERMINAL],
    ],
)
def test_cancel_in_every_state(store: Store, new_search: NewSearch, before: SearchState, after: SearchState | None) -> None:
    search = bring_to(store, new_search(), before)

    if after is None:
        with pytest.raises(Conflict, match=f"expected one that has not finished, got state {before}"):
            store.request_cancel(search.id)
        assert store.get_search(search.id) == search
        return
    cancelled = store.request_cancel(search.id)
    assert cancelled.state is after
    assert (cancelled.finished_at is not None) == after.is_terminal
    assert cancelled.version == search.version + (after is not before)


def test_board_prepared_and_winner_are_kept_with_their_events(store: Store, new_search: NewSearch) -> None:
    search = new_search()
    store.save_prepared(search.id, {"layers": [1, 2]}, fence=None)
    store.save_board(search.id, {"rows": [board_row(0, score=0.5)]}, fence=None, data={"rows": 1})
    store.save_winner(search.id, {"bundle": "w.tar", "bundle_sha256": "ab"}, fence=None)
    search = store.get_search(search.id)

    assert (store.get_prepared(search.id), search.winner) == ({"layers": [1, 2]}, {"bundle": "w.tar", "bundle_sha256": "ab"})
    assert store.whole_board(search.id) == {"rows": [board_row(0, score=0.5)]}
    assert search.version == 4
    assert [(event.type, event.data) for event in store.list_events(search.id, after=1)] == [
        ("search.prepared", {}),
        ("leaderboard.changed", {"rows": 1}),
        ("search.winner", {"trial": None, "budget": 0}),
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_its_path(store: Store, new_search: NewSearch, value: float) -> None:
    search = new_search()

    with pytest.raises(ValueError, match=r"rows\.0\.score: expected a finite number, got (nan|-?inf)"):
        store.save_board(search.id, {"rows": [board_row(0, score=value)]}, fence=None)
    assert store.get_search(search.id) == search


class TestLists:
    def test_pages_stay_stable_while_searches_arrive(self, store: Store, new_search: NewSearch) -> None:
        there = [new_search().id for _ in range(7)]
        seen = [search.id for search in store.list_searches(limit=3)]
        while page := store.list_searches(limit=3, after=seen[-1]):
            new_search()
            seen += [search.id for search in page]

        assert seen == there[::-1]

    def test_lists_by_state_and_of_the_active(self, store: Store, new_search: NewSearch) -> None:
        searches = {state: bring_to(store, new_search(), state) for state in SearchState}

        for state, search in searches.items():
            assert store.list_searches(state=state) == [search]
        active = {search_id: found.state for search_id, found in store.active_searches().items()}
        assert active == {search.id: search.state for search in searches.values() if not (search.state.is_terminal or search.state is S.PAUSED)}


class TestEvents:
    def test_they_are_gap_free_under_concurrent_writers(self, store: Store, new_search: NewSearch) -> None:
        first, second = new_search(), new_search()

        def write(writer: int) -> list[int]:
            search = (first, second)[writer % 2]
            return [store.add_event(search.id, "test.event", {"writer": writer, "n": n}).sequence for n in range(12)]

        with ThreadPoolExecutor(8) as pool:
            written = list(pool.map(write, range(8)))

        for search, of_search in ((first, written[0::2]), (second, written[1::2])):
            events = store.list_events(search.id)
            assert [event.sequence for event in events] == list(range(1, 1 + 1 + 4 * 12))
            assert sorted(itertools.chain.from_iterable(of_search)) == list(range(2, 2 + 4 * 12))
            assert all(sequences == sorted(sequences) for sequences in of_search)

    def test_a_reader_never_sees_a_later_event_before_an_earlier_one(self, store: Store, new_search: NewSearch) -> None:
        search = new_search()

        def write(_: int) -> None:
            for n in range(15):
                store.add_event(search.id, "test.event", {"n": n})

        seen: list[int] = []
        with ThreadPoolExecutor(4) as pool:
            writers = [pool.submit(write, n) for n in range(4)]
            while not all(writer.done() for writer in writers) or len(seen) < 61:
                seen += [event.sequence for event in store.list_events(search.id, after=seen[-1] if seen else 0, limit=5)]

        assert seen == list(range(1, 62))
