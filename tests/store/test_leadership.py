from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from nas.errors import Fenced
from nas.store.records import AttemptState, PointRecord, SearchRecord, SearchState, TrialState
from nas.store.store import Store


def test_a_live_lease_keeps_others_out(store: Store) -> None:
    token = store.claim_leadership("a", seconds=60)

    assert token is not None
    assert store.claim_leadership("b", seconds=60) is None


def test_an_expired_lease_is_claimed_with_a_greater_token(store: Store) -> None:
    first = store.claim_leadership("a", seconds=0.05)
    time.sleep(0.1)
    second = store.claim_leadership("b", seconds=60)

    assert first is not None
    assert second is not None
    assert second > first
    assert not store.renew_leadership(first, seconds=60)
    assert store.renew_leadership(second, seconds=60)


def test_a_renewed_lease_lives_on(store: Store) -> None:
    token = store.claim_leadership("a", seconds=0.05)

    assert token is not None
    assert store.renew_leadership(token, seconds=60)
    time.sleep(0.1)
    assert store.claim_leadership("b", seconds=60) is None


def test_a_released_lease_is_free_at_once_and_its_token_is_worthless(store: Store, new_search: Callable[..., SearchRecord]) -> None:
    search = new_search()
    token = store.claim_leadership("a", seconds=60)
    assert token is not None
    store.release_leadership(token)

    with pytest.raises(Fenced):
        store.add_event(search.id, "x", {}, fence=token)
    later = store.claim_leadership("b", seconds=60)
    assert later is not None
    store.release_leadership(token)
    assert store.renew_leadership(later, seconds=60)


def test_an_owner_that_claims_again_fences_its_former_self(store: Store) -> None:
    first, second = store.claim_leadership("a", seconds=60), store.claim_leadership("a", seconds=60)

    assert first is not None
    assert second is not None
    assert second > first
    assert not store.renew_leadership(first, seconds=60)


def test_of_claimers_at_the_same_time_one_leads(url: str) -> None:
    stores = [Store.open(url) for _ in range(6)]
    try:
        with ThreadPoolExecutor(6) as pool:
            tokens = list(pool.map(lambda n: stores[n].claim_leadership(f"owner {n}", seconds=60), range(6)))
    finally:
        for store in stores:
            store.close()

    assert sum(token is not None for token in tokens) == 1


def test_a_stale_fence_writes_nothing(store: Store, new_search: Callable[..., SearchRecord], new_trial: Callable[..., object]) -> None:
    search = new_search()
    new_trial(search, 0)
    stale = store.claim_leadership("a", seconds=60)
    attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=stale)
    current = store.claim_leadership("a", seconds=60)
    before = store.get_search(search.id)
    point = PointRecord(search_id=search.id, trial=0, rung=0, tokens=1, loss=1.0, learning_rate=1.0, tokens_per_second=1.0)
    rung = {"search_id": search.id, "trial": 0, "rung": 0, "result": {}, "trial_state": TrialState.WAITING}

    writes: list[Callable[[], object]] = [
        lambda: store.change_search(search.id, to=SearchState.PREPARING, expected=[SearchState.QUEUED], fence=stale),
        lambda: store.save_prepared(search.id, {}, fence=stale),
        lambda: store.save_board(search.id, {}, fence=stale),
        lambda: store.save_winner(search.id, {}, fence=stale),
        lambda: store.add_event(search.id, "x", {}, fence=stale),
        lambda: new_trial(search, 1, fence=stale),
        lambda: store.change_trial(search.id, 0, to=TrialState.FAILED, fence=stale),
        lambda: store.start_attempt(search.id, stage="prepare", trial=None, rung=None, fence=stale),
        lambda: store.finish_attempt(attempt.id, state=AttemptState.FAILED, reason=None, fence=stale),
        lambda: store.lose_running_attempts(fence=stale),
        lambda: store.record_rung(attempt.id, fence=stale, **rung),
        lambda: store.add_points([point], fence=stale),
        lambda: store.save_confirmation(None, search_id=search.id, trial=0, confirmation={"verified": False}, fence=stale),
    ]
    for write in writes:
        with pytest.raises(Fenced, match=f"leadership token: expected {current}, got {stale}"):
            write()

    assert store.get_search(search.id) == before
    store.record_rung(attempt.id, fence=current, **rung)


def test_nobody_leads_before_a_fenced_write_has_ended(url: str, new_search: Callable[..., SearchRecord]) -> None:
    search = new_search()
    writer, claimer = Store.open(url), Store.open(url)
    token = writer.claim_leadership("a", seconds=0.01)
    assert token is not None
    time.sleep(0.05)
    try:
        with ThreadPoolExecutor(1) as pool:
            with writer.write(fence=token):
                claim = pool.submit(claimer.claim_leadership, "b", seconds=60)
                time.sleep(0.2)
                claimed_inside = claim.done()
            assert claim.result() == token + 1
        assert not claimed_inside
        with pytest.raises(Fenced):
            writer.add_event(search.id, "x", {}, fence=token)
    finally:
        writer.close()
        claimer.close()
