from __future__ import annotations

from collections.abc import Callable

import pytest

from nas.store.records import AttemptRecord, AttemptState, SearchRecord, TrialRecord
from nas.store.store import Store
from tests.store.store_values import result


@pytest.fixture
def attempt(store: Store, new_search: Callable[..., SearchRecord], new_trial: Callable[..., TrialRecord]) -> AttemptRecord:
    """A running rung of a first trial."""
    search = new_search()
    new_trial(search, 0)
    return store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=None)


def kept(store: Store, attempt: AttemptRecord) -> str | None:
    log = store.read_log(attempt.id)
    assert log is None or log.search_id == attempt.search_id
    return None if log is None else log.text


def test_an_attempt_has_no_log_until_one_is_kept(store: Store, attempt: AttemptRecord) -> None:
    assert kept(store, attempt) is None
    assert store.read_log("att_unknown") is None


def test_a_later_log_takes_the_place_of_an_earlier_one(store: Store, attempt: AttemptRecord) -> None:
    store.save_logs(attempt.search_id, {attempt.id: "one"}, fence=None)
    store.save_logs(attempt.search_id, {attempt.id: "one\ntwo \0 \ud800"}, fence=None)

    assert kept(store, attempt) == "one\ntwo \ufffd \ufffd"


def test_an_attempts_log_is_kept_with_its_end(store: Store, attempt: AttemptRecord) -> None:
    store.save_logs(attempt.search_id, {attempt.id: "began"}, fence=None)
    store.finish_attempt(attempt.id, state=AttemptState.FAILED, reason="diverged: nan", log="began\nended", fence=None)

    assert kept(store, attempt) == "began\nended"


def test_an_end_without_a_log_leaves_what_was_kept(store: Store, attempt: AttemptRecord) -> None:
    store.save_logs(attempt.search_id, {attempt.id: "began"}, fence=None)
    store.finish_attempt(attempt.id, state=AttemptState.LOST, reason="gone", fence=None)

    assert kept(store, attempt) == "began"


def test_a_rung_and_a_confirmation_keep_their_logs(store: Store, attempt: AttemptRecord) -> None:
    store.record_rung(attempt.id, search_id=attempt.search_id, trial=0, rung=0, result=result(tokens=0), trial_state="waiting", log="a rung", fence=None)
    second = store.start_attempt(attempt.search_id, stage="confirm", trial=0, rung=None, fence=None)
    store.save_confirmation(second.id, search_id=attempt.search_id, trial=0, confirmation={"verified": True}, log="a confirmation", fence=None)

    assert (kept(store, attempt), kept(store, second)) == ("a rung", "a confirmation")
