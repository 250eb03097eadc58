from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.exc import DBAPIError

from nas.errors import Fenced, StoreUnavailable
from nas.store.machines import ControllerRecord, Fence
from nas.store.records import AttemptState, PointRecord, SearchRecord, SearchState, TrialState, utc_now
from nas.store.searches import write_event
from nas.store.store import Store
from nas.store.tables import controllers, leadership, leases

NAME = "srch_1"


def controller(owner: str) -> ControllerRecord:
    return ControllerRecord(owner=owner, host="here", pid=1, version="1.0", started_at=utc_now())


def claim(store: Store, owner: str, *, name: str = NAME, seconds: float = 60.0) -> Fence:
    fence = store.claim(name, owner=owner, seconds=seconds)
    assert fence is not None
    return fence


def test_a_live_lease_keeps_others_out_of_this_name_only(store: Store) -> None:
    claim(store, "a")

    assert store.claim(NAME, owner="b", seconds=60) is None
    assert claim(store, "b", name="srch_2").name == "srch_2"
    assert [(lease.name, lease.owner) for lease in store.list_leases()] == [("srch_1", "a"), ("srch_2", "b")]


def test_an_expired_lease_is_claimed_with_a_greater_token(store: Store) -> None:
    first = claim(store, "a", seconds=0.05)
    time.sleep(0.1)
    assert store.list_leases() == []
    second = claim(store, "b")

    assert second.token > first.token
    assert store.renew(controller("a"), seconds=60) == []
    assert store.renew(controller("b"), seconds=60) == [second]


def test_renewing_holds_all_leases_of_a_controller_longer_and_no_others(store: Store) -> None:
    mine = [claim(store, "a", name=name, seconds=0.3) for name in ("srch_1", "srch_2")]
    claim(store, "b", name="srch_3", seconds=0.3)

    assert sorted(store.renew(controller("a"), seconds=60), key=lambda fence: fence.name) == mine
    time.sleep(0.4)
    assert [lease.name for lease in store.list_leases()] == ["srch_1", "srch_2"]
    assert store.claim("srch_1", owner="b", seconds=60) is None


def test_an_expired_lease_that_nobody_claimed_is_renewed(store: Store) -> None:
    fence = claim(store, "a", seconds=0.05)
    time.sleep(0.1)

    assert store.renew(controller("a"), seconds=60) == [fence]
    assert store.claim(NAME, owner="b", seconds=60) is None


def test_a_released_lease_is_free_at_once_and_its_token_is_worthless(store: Store, new_search: Callable[..., SearchRecord]) -> None:
    search = new_search()
    fence = claim(store, "a")
    store.release(fence)

    with pytest.raises(Fenced):
        store.add_event(search.id, "x", {}, fence=fence)
    later = claim(store, "b")
    store.release(fence)
    assert store.renew(controller("b"), seconds=60) == [later]


def test_an_owner_that_claims_again_fences_its_former_self(store: Store, new_search: Callable[..., SearchRecord]) -> None:
    search = new_search()
    first, second = claim(store, "a", name=search.id), claim(store, "a", name=search.id)

    assert second.token > first.token
    with pytest.raises(Fenced):
        store.add_event(search.id, "x", {}, fence=first)


def test_a_lease_that_was_never_claimed_gives_no_right_to_write(store: Store, new_search: Callable[..., SearchRecord]) -> None:
    search = new_search()

    with pytest.raises(Fenced, match=f"lease {search.id}: expected token None, got 0"):
        store.add_event(search.id, "x", {}, fence=Fence(name=search.id, token=0))


def test_of_claimers_at_the_same_time_one_wins(url: str) -> None:
    stores = [Store.open(url) for _ in range(6)]
    try:
        with ThreadPoolExecutor(6) as pool:
            fences = list(pool.map(lambda n: stores[n].claim(NAME, owner=f"owner {n}", seconds=60), range(6)))
    finally:
        for store in stores:
            store.close()

    assert sum(fence is not None for fence in fences) == 1


def test_controllers_live_as_long_as_they_renew(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(store, "_now", lambda connection: clock[0])
    a, b = controller("a"), controller("b")
    store.renew(a, seconds=10)
    store.renew(b, seconds=60)
    assert store.list_controllers() == [a, b]
    clock[0] += 10

    assert store.list_controllers() == [b]
    store.renew(replace(b, version="1.1"), seconds=60)
    assert store.list_controllers() == [replace(b, version="1.1")]


def test_a_controller_that_leaves_holds_nothing(store: Store) -> None:
    claim(store, "a")
    claim(store, "b", name="srch_2")
    store.renew(controller("a"), seconds=60)
    store.leave("a")

    assert store.list_controllers() == []
    assert [lease.name for lease in store.list_leases()] == ["srch_2"]
    assert claim(store, "b").token > 1


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_jump_of_the_hosts_calendar_changes_no_lease(store: Store, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    claim(store, "a")
    real, now = time.time, utc_now()
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    monkeypatch.setattr("nas.store.leases.utc_now", lambda: now + timedelta(seconds=jump))

    assert store.claim(NAME, owner="b", seconds=60) is None
    assert [lease.owner for lease in store.list_leases()] == ["a"]


@pytest.mark.parametrize("table", [leases, controllers])
def test_after_a_reboot_nobody_waits_for_those_before(store: Store, table: Any) -> None:
    """The clock begins anew then: what was written before lies far in its future."""
    claim(store, "a")
    store.renew(controller("a"), seconds=60)
    with store.write(fence=None) as connection:
        connection.execute(update(table).values(expires_at_seconds=table.c.expires_at_seconds + 1e6))

    assert store.list_controllers() == [] or table is leases
    assert table is controllers or claim(store, "b").token == 2


def test_a_stale_fence_writes_nothing(store: Store, new_search: Callable[..., SearchRecord], new_trial: Callable[..., object]) -> None:
    search = new_search()
    new_trial(search, 0)
    stale = claim(store, "a", name=search.id)
    attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=stale)
    current = claim(store, "a", name=search.id)
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
        lambda: store.lose_running_attempts(search.id, fence=stale),
        lambda: store.record_rung(attempt.id, fence=stale, **rung),
        lambda: store.add_points([point], fence=stale),
        lambda: store.save_confirmation(None, search_id=search.id, trial=0, confirmation={"verified": False}, fence=stale),
    ]
    for write in writes:
        with pytest.raises(Fenced, match=f"lease {search.id}: expected token {current.token}, got {stale.token}"):
            write()

    assert store.get_search(search.id) == before
    store.record_rung(attempt.id, fence=current, **rung)


def test_nobody_claims_before_a_fenced_write_has_ended(url: str, new_search: Callable[..., SearchRecord]) -> None:
    search = new_search()
    writer, claimer = Store.open(url), Store.open(url)
    fence = claim(writer, "a", seconds=0.01)
    time.sleep(0.05)
    try:
        with ThreadPoolExecutor(1) as pool:
            with writer.write(fence=fence):
                claimed = pool.submit(claimer.claim, NAME, owner="b", seconds=60)
                time.sleep(0.2)
                # SQLite waits for the writer; PostgreSQL says no, and serves others.
                claimed_inside = claimed.result() if claimed.done() else None
            claimed_after = claimed.result() or claimer.claim(NAME, owner="b", seconds=60)
        assert claimed_inside is None
        assert claimed_after == Fence(name=NAME, token=fence.token + 1)
        with pytest.raises(Fenced):
            writer.add_event(search.id, "x", {}, fence=fence)
    finally:
        writer.close()
        claimer.close()


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_process_that_hangs_inside_a_write_keeps_nobody_from_its_lease_for_long(
    url: str, new_search: Callable[..., SearchRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a signal, or gone with its machine: PostgreSQL never hears of it. (A lock of SQLite ends with its process alone.)"""
    search = new_search()
    monkeypatch.setattr("nas.store.database._IDLE_SECONDS", 0.3)
    hanging, other = Store.open(url), Store.open(url)
    try:
        fence = claim(hanging, "a", name=search.id, seconds=0.1)
        write = hanging.write(fence=fence)
        connection = write.__enter__()
        write_event(connection, search.id, "x", {})
        renewed = time.monotonic()
        other.renew(controller("b"), seconds=60)
        assert time.monotonic() - renewed < 0.3, "who waits for a hanging process loses its own leases"
        time.sleep(0.6)
        other.add_event(search.id, "y", {}, fence=claim(other, "b", name=search.id))
        with pytest.raises(DBAPIError) as ended:
            write_event(connection, search.id, "z", {})
        with pytest.raises(StoreUnavailable):
            write.__exit__(type(ended.value), ended.value, ended.value.__traceback__)
        assert [event.type for event in other.list_events(search.id)] == ["search.created", "y"]
    finally:
        hanging.close()
        other.close()


def test_searches_are_shared_only_when_no_single_leader_of_an_older_version_is_left(store: Store) -> None:
    def lead(*, owner: str | None, seconds: float) -> None:
        with store.write(fence=None) as connection:
            connection.execute(update(leadership).values(owner=owner, token=7, expires_at=utc_now() + timedelta(seconds=seconds)))

    lead(owner="old", seconds=60)
    assert not store.retire_leadership()
    lead(owner="old", seconds=-1)
    assert store.retire_leadership()
    assert store.retire_leadership()

    with store.read() as connection:
        row = connection.execute(leadership.select()).one()
    assert row.token > 7, "the old one could still write"
    assert row.expires_at > utc_now() + timedelta(days=10_000), "an old one could lead again"
