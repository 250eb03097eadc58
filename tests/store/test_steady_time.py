"""How long a search has worked and waited, on SQLite, whose only clock is the host's: the calendar may be set at any moment, and counts for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from nas.store.records import SearchRecord, SearchState
from nas.store.store import Store

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


@dataclass
class Host:
    """A machine with a calendar that somebody may set, and a boot of which it counts the seconds."""

    calendar: datetime = NOON
    boot: str | None = "first"
    since_boot: float = 5000.0

    def pass_by(self, seconds: float) -> None:
        self.calendar += timedelta(seconds=seconds)
        self.since_boot += seconds

    def reboot(self, *, down_seconds: float) -> None:
        self.calendar += timedelta(seconds=down_seconds)
        self.boot, self.since_boot = "second", 1.0


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr("nas.store.database.utc_now", lambda: host.calendar)
    monkeypatch.setattr("nas.store.database.read_boot_id", lambda: host.boot)
    monkeypatch.setattr("nas.store.database.seconds_since_boot", lambda: host.since_boot)
    return host


@pytest.fixture
def store(sqlite_url: str) -> Iterator[Store]:
    store = Store.open(sqlite_url)
    yield store
    store.close()


def working(store: Store) -> SearchRecord:
    search = store.create_search(spec={}, inputs={}, plan={}, label="")
    return store.change_search(search.id, to=SearchState.SEARCHING, expected=[SearchState.QUEUED], fence=None)


@pytest.mark.parametrize("jump_days", [-30, 30])
def test_a_jump_of_the_calendar_is_no_time_at_work(store: Store, sqlite_url: str, host: Host, jump_days: int) -> None:
    search = working(store)
    host.pass_by(10.0)
    host.calendar += timedelta(days=jump_days)
    host.pass_by(20.0)
    other = Store.open(sqlite_url)  # of a controller that was started since

    for reader in (store, other):
        times = reader.times_of(search.id)
        assert (times.at_work_seconds, times.in_state_seconds) == pytest.approx((30.0, 30.0))
    store.request_pause(search.id)
    paused = other.change_search(search.id, to=SearchState.PAUSED, expected=[SearchState.PAUSING], fence=None)
    other.close()
    assert paused.active_seconds == pytest.approx(30.0)


@pytest.mark.parametrize("jump_days", [-30, 30])
def test_a_jump_of_the_calendar_is_no_wait_in_the_queue(store: Store, host: Host, jump_days: int) -> None:
    search = store.create_search(spec={}, inputs={}, plan={}, label="")
    host.calendar += timedelta(days=jump_days)
    host.pass_by(7.0)

    assert store.times_of(search.id).in_state_seconds == pytest.approx(7.0)
    assert store.read_figures().oldest_queued_seconds == pytest.approx(7.0)


def test_over_a_reboot_the_calendar_tells_and_a_jump_after_it_does_not(store: Store, host: Host) -> None:
    search = working(store)
    host.pass_by(10.0)
    host.reboot(down_seconds=60.0)
    assert store.times_of(search.id).at_work_seconds == pytest.approx(70.0)

    working(store)  # the first write of this boot
    host.calendar += timedelta(days=300)
    host.pass_by(5.0)

    assert store.times_of(search.id).at_work_seconds == pytest.approx(75.0)


def test_a_calendar_that_was_set_back_while_the_machine_was_down_takes_nothing_away(store: Store, host: Host) -> None:
    search = working(store)
    host.reboot(down_seconds=-1e6)

    assert store.times_of(search.id).at_work_seconds == 0.0


def test_without_a_name_for_the_boot_the_calendar_is_all_there_is(store: Store, host: Host) -> None:
    host.boot = None
    search = working(store)
    host.pass_by(10.0)

    assert store.times_of(search.id).at_work_seconds == pytest.approx(10.0)
