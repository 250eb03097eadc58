"""Bundles that were asked for, on both databases."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nas.errors import Conflict, Fenced, NotFound, QuotaExceeded
from nas.store.quotas import Quotas
from nas.store.records import BundleState, SearchRecord, SearchState, TrialRecord
from nas.store.store import Store

NewSearch = Callable[..., SearchRecord]
NewTrial = Callable[..., TrialRecord]
ERROR = {"reason": "error", "message": "so it is"}
PACKED = {"path": "searches/x/bundles/3/t/bundle.tar", "sha256": "a" * 64, "num_bytes": 10}


@pytest.fixture
def search(store: Store, new_search: NewSearch, new_trial: NewTrial) -> SearchRecord:
    found = new_search()
    for number in (3, 4):
        new_trial(found, number)
    return store.change_search(found.id, to=SearchState.SUCCEEDED, expected=list(SearchState), fence=None)


def test_it_is_packed_once_and_found_by_its_digest(store: Store, search: SearchRecord) -> None:
    assert store.find_bundle(search.id, 3) is None
    assert store.request_bundle(search.id, 3).state is BundleState.WAITING
    store.save_bundle(search.id, 3, **PACKED, device_seconds=2.0, fence=None)

    again = store.request_bundle(search.id, 3)

    assert (again.state, again.path, again.sha256, again.num_bytes) == (BundleState.PACKED, *PACKED.values())
    assert store.waiting_bundles(limit=9) == []
    artifact = store.find_artifact("a" * 64, project=search.project)
    assert artifact is not None
    assert (artifact.search_id, artifact.path) == (search.id, PACKED["path"])
    assert store.get_project(search.project)[1].device_seconds_today == 2.0
    assert store.get_search(search.id) == search, "the search that has ended has changed"


def test_the_first_that_was_asked_for_comes_first(store: Store, search: SearchRecord) -> None:
    for number in (4, 3, 4):
        store.request_bundle(search.id, number)

    assert [wanted.trial for wanted in store.waiting_bundles(limit=9)] == [4, 3]
    assert [wanted.trial for wanted in store.waiting_bundles(limit=1)] == [4]


def test_it_fails_after_as_many_tries_as_it_may_and_is_tried_again_when_asked_for_again(store: Store, search: SearchRecord) -> None:
    store.request_bundle(search.id, 3)
    states = []
    for _ in range(2):
        store.fail_bundle(search.id, 3, error=ERROR, max_failures=2, device_seconds=0.0, fence=None)
        found = store.find_bundle(search.id, 3)
        assert found is not None
        states.append((found.state, found.num_failures, found.error))

    assert states == [(BundleState.WAITING, 1, ERROR), (BundleState.FAILED, 2, ERROR)]
    again = store.request_bundle(search.id, 3)
    assert (again.state, again.num_failures, again.error, again.finished_at) == (BundleState.WAITING, 0, None, None)


def test_only_of_a_search_that_has_ended_and_a_trial_that_there_is(store: Store, search: SearchRecord, new_search: NewSearch, new_trial: NewTrial) -> None:
    running = new_search()
    new_trial(running, 0)

    with pytest.raises(Conflict, match=f"search {running.id}: expected one that has ended, got state queued"):
        store.request_bundle(running.id, 0)
    with pytest.raises(NotFound):
        store.request_bundle(search.id, 5)
    with pytest.raises(NotFound):
        store.request_bundle("srch_0", 0)
    assert store.waiting_bundles(limit=9) == []


def test_a_project_that_has_used_up_its_device_seconds_asks_for_no_other(store: Store, search: SearchRecord) -> None:
    waiting = store.request_bundle(search.id, 3)
    store.set_quotas(search.project, Quotas(max_device_seconds_per_day=0))

    with pytest.raises(QuotaExceeded, match="max_device_seconds_per_day"):
        store.request_bundle(search.id, 4)
    assert store.request_bundle(search.id, 3) == waiting
    store.fail_bundle(search.id, 3, error=ERROR, max_failures=1, device_seconds=0.0, fence=None)
    with pytest.raises(QuotaExceeded):
        store.request_bundle(search.id, 3)
    assert store.waiting_bundles(limit=9) == []


def test_it_goes_with_its_search_and_what_comes_later_is_nobody_s(store: Store, search: SearchRecord) -> None:
    store.request_bundle(search.id, 3)
    store.delete_search(search.id)

    store.save_bundle(search.id, 3, **PACKED, device_seconds=1.0, fence=None)
    store.fail_bundle(search.id, 3, error=ERROR, max_failures=1, device_seconds=1.0, fence=None)

    assert store.find_bundle(search.id, 3) is None
    assert store.find_artifact("a" * 64, project=search.project) is None


def test_a_controller_that_lost_its_lease_writes_nothing(store: Store, search: SearchRecord) -> None:
    store.request_bundle(search.id, 3)
    stale = store.claim("probes", owner="old", seconds=60.0)
    assert stale is not None
    store.release(stale)

    with pytest.raises(Fenced):
        store.save_bundle(search.id, 3, **PACKED, device_seconds=0.0, fence=stale)
    with pytest.raises(Fenced):
        store.fail_bundle(search.id, 3, error=ERROR, max_failures=1, device_seconds=0.0, fence=stale)
    assert [wanted.num_failures for wanted in store.waiting_bundles(limit=9)] == [0]
