"""What users ask of a search that is there, on both databases."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select

from nas.errors import Conflict, NotFound, PreconditionFailed
from nas.store.records import AttemptRecord, AttemptState, PointRecord, SearchRecord, SearchState, TrialRecord, TrialState
from nas.store.store import Store
from nas.store.tables import metadata

NewSearch = Callable[..., SearchRecord]
NewTrial = Callable[..., TrialRecord]
FinishRung = Callable[..., AttemptRecord]
S = SearchState
WORKING = [S.PREPARING, S.SEARCHING, S.CONFIRMING]
SPEC = {"teacher": "t", "sampler": {"name": "tpe", "max_trials": 8}, "resources": {"max_parallel_trials": 2}}


def bring_to(store: Store, search: SearchRecord, state: SearchState) -> SearchRecord:
    """Through SEARCHING, so that it was at work."""
    path = [S.SEARCHING] if state is S.SEARCHING else [S.SEARCHING, state]
    for to in path:
        search = store.change_search(search.id, to=to, expected=list(S), fence=None)
    return search


def types(store: Store, search: SearchRecord) -> list[str]:
    return [event.type for event in store.list_events(search.id)]


# -- pause, resume, cancel ----------------------------------------------------------------------------------------------------


def test_a_search_that_was_never_begun_is_paused_and_cancelled_at_once(store: Store, new_search: NewSearch) -> None:
    assert store.request_pause(new_search().id).state is S.PAUSED
    assert store.request_cancel(new_search().id).state is S.CANCELLED
    assert store.request_cancel(store.request_pause(new_search().id).id).state is S.CANCELLED


@pytest.mark.parametrize("state", WORKING)
def test_a_search_at_work_pauses_until_its_controller_says_so(store: Store, new_search: NewSearch, state: SearchState) -> None:
    search = bring_to(store, new_search(), state)

    assert store.request_pause(search.id).state is S.PAUSING
    version = store.get_search(search.id).version
    assert store.request_pause(search.id).version == version
    assert store.change_search(search.id, to=S.PAUSED, expected=[S.PAUSING], fence=None).state is S.PAUSED
    assert store.request_pause(search.id).state is S.PAUSED


@pytest.mark.parametrize("state", [S.PAUSING, S.PAUSED])
def test_a_paused_search_is_queued_again_and_its_reason_goes(store: Store, new_search: NewSearch, state: SearchState) -> None:
    search = bring_to(store, new_search(), S.SEARCHING)
    store.change_search(search.id, to=state, expected=[S.SEARCHING], fence=None, error={"reason": "disk_full", "message": "0 bytes"})
    assert store.get_search(search.id).error == {"reason": "disk_full", "message": "0 bytes"}

    resumed = store.request_resume(search.id)

    assert (resumed.state, resumed.error) == (S.QUEUED, None)
    assert types(store, search)[-1] == "search.resumed"
    assert store.request_resume(search.id).version == resumed.version


def test_a_resumed_search_has_work_to_give_back_when_it_is_paused_or_cancelled_again(store: Store, new_search: NewSearch) -> None:
    for request, state in ((store.request_pause, S.PAUSING), (store.request_cancel, S.CANCELLING)):
        search = bring_to(store, new_search(), S.PAUSED)
        store.request_resume(search.id)
        assert request(search.id).state is state


def test_a_paused_search_that_was_begun_is_cancelled_by_its_controller(store: Store, new_search: NewSearch) -> None:
    search = bring_to(store, new_search(), S.PAUSED)
    assert search.id not in store.active_searches()

    assert store.request_cancel(search.id).state is S.CANCELLING
    assert store.active_searches()[search.id].state is S.CANCELLING


@pytest.mark.parametrize("name", ["request_pause", "request_resume", "request_cancel", "update_search", "retry_trial"])
@pytest.mark.parametrize("state", [S.SUCCEEDED, S.FAILED, S.CANCELLED])
def test_an_ended_search_takes_no_request(store: Store, new_search: NewSearch, name: str, state: SearchState) -> None:
    search = bring_to(store, new_search(), state)

    with pytest.raises(Conflict, match=f"expected one that has not finished, got state {state}"):
        _ask(store, name, search.id)
    assert store.get_search(search.id) == search


@pytest.mark.parametrize("name", ["request_pause", "request_resume", "retry_trial"])
def test_a_cancel_is_never_taken_back(store: Store, new_search: NewSearch, name: str) -> None:
    search = bring_to(store, new_search(), S.CANCELLING)

    with pytest.raises(Conflict, match="expected one that is not being cancelled"):
        _ask(store, name, search.id)


@pytest.mark.parametrize("name", ["request_pause", "request_resume", "request_cancel", "update_search", "retry_trial", "delete_search"])
@pytest.mark.parametrize("search_id", ["srch_none", "\0"])
def test_a_request_for_an_unknown_search_is_not_found(store: Store, name: str, search_id: str) -> None:
    with pytest.raises(NotFound, match="search: expected the id of one"):
        _ask(store, name, search_id)


def _ask(store: Store, name: str, search_id: str) -> object:
    more = {"update_search": {"version": None}, "retry_trial": {"number": 0}}.get(name, {})
    return getattr(store, name)(search_id, **more)


def test_time_at_work_is_that_of_neither_queue_nor_pause(store: Store, new_search: NewSearch) -> None:
    search = new_search()
    assert (search.active_seconds, search.active_since) == (0.0, None)
    working = bring_to(store, search, S.SEARCHING)
    assert working.active_since is not None
    assert working.state_since is not None

    pausing = store.request_pause(search.id)
    paused = store.change_search(search.id, to=S.PAUSED, expected=[S.PAUSING], fence=None)
    assert pausing.active_since == working.active_since
    assert paused.active_since is None
    assert paused.state_since is not None
    assert paused.active_seconds == pytest.approx((paused.state_since - working.active_since).total_seconds())

    store.request_resume(search.id)
    again = bring_to(store, store.get_search(search.id), S.SEARCHING)
    assert again.started_at == working.started_at
    assert again.active_seconds == paused.active_seconds
    assert again.active_since is not None
    assert again.active_since >= paused.state_since


# -- retry -------------------------------------------------------------------------------------------------------------------


def a_failed_trial(store: Store, search: SearchRecord, new_trial: NewTrial) -> TrialRecord:
    trial = new_trial(search, 0)
    for _ in range(2):
        attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=None)
        store.finish_attempt(attempt.id, state=AttemptState.FAILED, reason="error: boom", fence=None)
    return store.change_trial(search.id, trial.number, to=TrialState.FAILED, failure={"reason": "error"}, fence=None)


@pytest.mark.parametrize("state", [S.SEARCHING, S.PAUSED, S.PAUSING])
def test_a_retried_trial_waits_again_and_its_failures_no_longer_count(store: Store, new_search: NewSearch, new_trial: NewTrial, state: SearchState) -> None:
    search = new_search()
    a_failed_trial(store, search, new_trial)
    before = bring_to(store, search, state)

    trial = store.retry_trial(search.id, 0)

    assert (trial.state, trial.failure, trial.rung) == (TrialState.WAITING, None, None)
    assert [attempt.counts for attempt in store.list_attempts(search.id)] == [False, False]
    assert store.get_search(search.id).num_requests == before.num_requests + 1
    assert store.list_events(search.id)[-1].data == {"trial": 0, "failure": {"reason": "error"}}
    attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=None)
    store.finish_attempt(attempt.id, state=AttemptState.FAILED, reason="error: again", fence=None)
    assert [attempt.counts for attempt in store.list_attempts(search.id)] == [False, False, True]


def test_only_a_failed_trial_is_retried_and_of_two_at_once_one_is(store: Store, new_search: NewSearch, new_trial: NewTrial) -> None:
    search = bring_to(store, new_search(), S.SEARCHING)
    a_failed_trial(store, search, new_trial)

    def retry(_: int) -> bool:
        try:
            store.retry_trial(search.id, 0)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(retry, range(4))) == 1
    assert types(store, search).count("trial.retried") == 1
    with pytest.raises(NotFound):
        store.retry_trial(search.id, 1)


def test_a_trial_is_not_retried_while_finalists_are_confirmed_or_bundled(store: Store, new_search: NewSearch, new_trial: NewTrial) -> None:
    confirming, bundling, won = new_search(), new_search(), new_search()
    for search in (confirming, bundling, won):
        a_failed_trial(store, search, new_trial)
    bring_to(store, confirming, S.CONFIRMING)
    bring_to(store, bundling, S.PAUSED)
    store.start_attempt(bundling.id, stage="bundle", trial=0, rung=None, fence=None)
    bring_to(store, won, S.PAUSED)
    store.save_winner(won.id, {"trial": 0}, fence=None)

    for search in (confirming, bundling, won):
        with pytest.raises(Conflict, match="got one that confirms its finalists"):
            store.retry_trial(search.id, 0)
        with pytest.raises(Conflict, match="got one that confirms its finalists"):
            store.update_search(search.id, version=None, max_trials=99)


# -- extend ------------------------------------------------------------------------------------------------------------------


def test_an_extended_search_has_its_new_limits_and_the_rest_of_its_spec(store: Store, new_search: NewSearch) -> None:
    search = bring_to(store, new_search(spec=SPEC), S.SEARCHING)

    updated = store.update_search(search.id, version=search.version, max_trials=20, max_parallel_trials=4, labels={"team": "a"})

    assert updated.spec == {
        "teacher": "t",
        "sampler": {"name": "tpe", "max_trials": 20},
        "resources": {"max_parallel_trials": 4},
        "labels": {"team": "a"},
    }
    assert updated.labels == {"team": "a"}
    assert updated.num_requests == 1
    event = store.list_events(search.id)[-1]
    assert (event.type, event.data) == ("search.updated", {"max_trials": 20, "max_parallel_trials": 4, "labels": {"team": "a"}})


def test_an_update_of_an_older_version_is_refused_and_one_that_changes_nothing_writes_nothing(store: Store, new_search: NewSearch) -> None:
    search = new_search(spec=SPEC)
    updated = store.update_search(search.id, version=search.version, max_trials=9)

    with pytest.raises(PreconditionFailed, match=f"expected version {updated.version}, got {search.version}"):
        store.update_search(search.id, version=search.version, max_trials=10)
    assert store.update_search(search.id, version=updated.version, max_trials=9, labels={}) == updated


def test_max_trials_does_not_go_below_what_one_budget_has_proposed(store: Store, new_search: NewSearch, new_trial: NewTrial) -> None:
    search = new_search(spec=SPEC)
    for number, budget in enumerate((0, 0, 1)):
        new_trial(search, number, budget=budget)
    new_trial(search, 3, origin="control")

    with pytest.raises(Conflict, match="expected at least the 2 shapes that are proposed already, got 1"):
        store.update_search(search.id, version=None, max_trials=1)
    assert store.update_search(search.id, version=None, max_trials=2).spec["sampler"]["max_trials"] == 2


# -- labels ------------------------------------------------------------------------------------------------------------------


def test_searches_are_listed_by_all_the_labels_that_are_asked_for(store: Store, new_search: NewSearch) -> None:
    both = new_search(labels={"team": "a", "run/kind": 'it\'s "one" é'})
    team = new_search(labels={"team": "a"})
    other = new_search(labels={"team": "A"})
    none = new_search()

    def found(**labels: str) -> list[str]:
        return [search.id for search in store.list_searches(labels=labels)]

    assert found() == [none.id, other.id, team.id, both.id]
    assert found(team="a") == [team.id, both.id]
    assert found(**{"team": "a", "run/kind": 'it\'s "one" é'}) == [both.id]
    assert found(team="b") == found(nothing="a") == []
    assert store.get_search(both.id).labels == {"team": "a", "run/kind": 'it\'s "one" é'}


# -- delete ------------------------------------------------------------------------------------------------------------------


def test_a_deleted_search_leaves_no_row_and_other_searches_are_as_they_were(
    store: Store, new_search: NewSearch, new_trial: NewTrial, finish_rung: FinishRung
) -> None:
    searches = [new_search() for _ in range(2)]
    for search in searches:
        finish_rung(new_trial(search, 0), 0)
        store.add_points([PointRecord(search_id=search.id, trial=0, rung=0, tokens=1, loss=1.0, learning_rate=1.0, tokens_per_second=1.0)])
        store.save_board(search.id, {"rows": []}, fence=None)
        bring_to(store, search, S.SUCCEEDED)
    gone, kept = searches
    before = (store.get_search(kept.id), store.list_trials(kept.id), store.list_events(kept.id))

    store.delete_search(gone.id)

    with pytest.raises(NotFound):
        store.get_search(gone.id)
    with store.read() as connection:
        for table in metadata.sorted_tables:
            if "search_id" in table.c:
                assert connection.execute(select(func.count()).select_from(table).where(table.c.search_id == gone.id)).scalar() == 0, table.name
    assert (store.get_search(kept.id), store.list_trials(kept.id), store.list_events(kept.id)) == before


def test_a_search_is_not_deleted_before_it_has_ended_nor_while_another_builds_on_it(store: Store, new_search: NewSearch) -> None:
    search = new_search()
    with pytest.raises(Conflict, match="expected one that has ended, got state queued"):
        store.delete_search(search.id)
    bring_to(store, search, S.SUCCEEDED)
    heir = new_search(spec={"teacher": "t", "warm_start_from": [search.id]})
    with pytest.raises(Conflict, match=f"got one that {heir.id} starts from"):
        store.delete_search(search.id)

    store.request_cancel(heir.id)
    pupil = new_search(spec={"teacher": search.id})
    with pytest.raises(Conflict, match=f"got one whose winner is the teacher of {pupil.id}"):
        store.delete_search(search.id)
    store.request_cancel(pupil.id)
    store.delete_search(search.id)
    assert {found.id for found in store.list_searches()} == {heir.id, pupil.id}


def test_every_table_that_hangs_from_a_search_says_so(store: Store) -> None:
    """What `delete_search` goes by."""
    reaches = {"searches"}
    for table in metadata.sorted_tables:
        if any(key.elements[0].column.table.name in reaches for key in table.foreign_key_constraints):
            assert "search_id" in table.c, table.name
            reaches.add(table.name)
    assert {"trials", "attempts", "events"} <= reaches
