"""Full distillations in the store, on both databases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nas.errors import Conflict, NotFound, QuotaExceeded
from nas.store.access import Quotas
from nas.store.records import AttemptState, PointRecord, SearchRecord, SearchState, TrialRecord
from nas.store.store import Store

NewSearch = Callable[..., SearchRecord]
NewTrial = Callable[..., TrialRecord]
RESULT = {"tokens": 100, "file": "searches/x/model.tar", "sha256": "a" * 64}


@pytest.fixture
def search(store: Store, new_search: NewSearch, new_trial: NewTrial) -> SearchRecord:
    found = new_search()
    new_trial(found, 3)
    return store.change_search(found.id, to=SearchState.SUCCEEDED, expected=list(SearchState), fence=None)


def distil(store: Store, search: SearchRecord, **changes: Any) -> SearchRecord:
    named = {"search_id": search.id, "trial": 3, "spec": {"trial": 3}, "inputs": {}, "tokens": 100, "label": "", "project": search.project}
    return store.create_distillation(**{**named, **changes})


def test_it_has_a_life_of_its_own_in_which_its_search_does_not_change(store: Store, search: SearchRecord) -> None:
    made = distil(store, search)
    store.change_search(made.id, to=SearchState.RUNNING, expected=[SearchState.QUEUED], fence=None)
    attempt = store.start_attempt(made.id, stage="distil", trial=3, rung=None, fence=None)
    store.add_points([PointRecord(search_id=made.id, trial=3, rung=0, tokens=50, loss=1.0, learning_rate=1e-3, tokens_per_second=9.0)])
    for _ in range(2):  # a crash between the result and the attempt's end
        store.save_distilled(made.id, RESULT, fence=None)
    store.finish_attempt(attempt.id, state=AttemptState.SUCCEEDED, reason=None, fence=None, log="a line")
    done = store.change_search(made.id, to=SearchState.SUCCEEDED, expected=[SearchState.RUNNING], fence=None)

    assert (done.winner, done.distils, done.kind) == (RESULT, search.id, "distillation")
    artifact = store.find_artifact("a" * 64, project=search.project)
    assert artifact is not None
    assert artifact.search_id == made.id
    assert {event.type.split(".")[0] for event in store.list_events(made.id)} == {"distillation", "attempt"}
    assert store.get_search(search.id) == search


def test_lists_and_counts_of_searches_leave_it_out_and_its_controller_sees_it(store: Store, search: SearchRecord) -> None:
    made = distil(store, search)

    assert [found.id for found in store.list_searches()] == [search.id]
    assert [found.id for found in store.latest_searches(project=search.project, limit=5)] == [search.id]
    assert store.read_figures().searches[SearchState.QUEUED] == 0
    assert list(store.active_searches()) == [made.id]
    assert store.search_ids() == {search.id, made.id}
    with pytest.raises(NotFound):
        store.get_search(made.id, project=search.project)


@pytest.mark.parametrize("changes", [{"trial": 4}, {"search_id": "srch_0"}, {"project": "none"}])
def test_of_what_is_not_there_nothing_is_stored(store: Store, search: SearchRecord, changes: dict[str, Any]) -> None:
    with pytest.raises(NotFound):
        distil(store, search, **changes)

    assert store.search_ids() == {search.id}


def test_it_is_charged_as_a_search_and_by_its_tokens(store: Store, search: SearchRecord) -> None:
    store.create_project("small", quotas=Quotas(max_active_searches=1, max_tokens_per_day=150))
    made = distil(store, search, project="small")
    with pytest.raises(QuotaExceeded, match="max_active_searches"):
        distil(store, search, project="small")
    store.request_cancel(made.id)
    with pytest.raises(QuotaExceeded, match="max_tokens_per_day"):
        distil(store, search, project="small")


def test_a_search_is_not_deleted_before_its_distillations_end_nor_do_they_go_with_it(store: Store, search: SearchRecord) -> None:
    made = distil(store, search)
    with pytest.raises(Conflict, match=f"whose student {made.id} distils"):
        store.delete_search(search.id)
    store.request_cancel(made.id)
    store.delete_search(search.id)

    assert store.get_distillation(made.id).distils == search.id
    store.delete_search(made.id)
    assert store.search_ids() == set()


def test_only_a_search_that_has_succeeded_is_distilled(store: Store, new_search: NewSearch, new_trial: NewTrial) -> None:
    search = new_search()
    new_trial(search, 3)

    with pytest.raises(Conflict, match="expected the state succeeded, got queued"):
        distil(store, search)
