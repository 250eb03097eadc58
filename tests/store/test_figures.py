from __future__ import annotations

from collections.abc import Callable

import pytest

from nas.store.records import AttemptState, SearchRecord, SearchState, TrialRecord, TrialState
from nas.store.store import Store


def test_an_empty_store_counts_nothing(store: Store) -> None:
    figures = store.read_figures()

    assert set(figures.searches.values()) == set(figures.trials.values()) == {0}
    assert figures.attempts == {}
    assert figures.oldest_queued_seconds == 0.0


def test_what_open_searches_hold_is_counted_by_state_and_reason(
    store: Store, new_search: Callable[..., SearchRecord], new_trial: Callable[..., TrialRecord]
) -> None:
    search, other = new_search(), new_search()
    for owner in (search, other):
        new_trial(owner, 0)
    for reason in ("timeout: 3 s: over", "timeout: 4 s", "gone", None):
        attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=None)
        store.finish_attempt(attempt.id, state=AttemptState.FAILED, reason=reason, fence=None)
    store.start_attempt(search.id, stage="prepare", trial=None, rung=None, fence=None)
    store.request_cancel(other.id)

    figures = store.read_figures()

    assert (figures.searches[SearchState.QUEUED], figures.searches[SearchState.CANCELLED]) == (1, 1)
    assert (figures.trials[TrialState.WAITING], sum(figures.trials.values())) == (1, 1)
    failed = {reason: count for (stage, state, reason), count in figures.attempts.items() if (stage, state) == ("rung", AttemptState.FAILED)}
    assert failed == {"timeout": 2, "gone": 1, "": 1}
    assert figures.attempts["prepare", AttemptState.RUNNING, ""] == 1


def test_the_longest_wait_is_by_the_search_that_was_queued_first(
    store: Store, new_search: Callable[..., SearchRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = new_search()
    new_search()
    begin = store.get_search(first.id).updated_at
    monkeypatch.setattr(type(store), "steady_time", lambda *_, **__: begin.replace(year=begin.year + 1))

    assert 364 * 86400 < store.read_figures().oldest_queued_seconds < 367 * 86400
