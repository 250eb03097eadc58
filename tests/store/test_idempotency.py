from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select

from nas.errors import Conflict, IdempotencyKeyReused, NotFound, QuotaExceeded
from nas.store.idempotency import KEPT_HOURS
from nas.store.quotas import Quotas
from nas.store.records import OnceRequest, SearchRecord, SearchState, utc_now
from nas.store.store import Store
from nas.store.tables import idempotency_keys


def a_request(**changes: str) -> OnceRequest:
    return OnceRequest(**{"project": "default", "key": "k", "operation": "POST /v1/searches", "body_digest": "d", **changes})


def create(store: Store, request: OnceRequest | None, **values: Any) -> tuple[SearchRecord, bool]:
    row: dict[str, Any] = {"spec": {}, "inputs": {}, "plan": {}, "label": "", **values}
    return store.once(request, lambda: store.create_search(**row), search_of=lambda search: search.id, again=store.get_search)


def test_the_same_request_again_gives_what_the_first_one_made_as_it_is_now(store: Store) -> None:
    made, is_new = create(store, a_request())
    store.request_cancel(made.id)

    again, is_new_again = create(store, a_request())

    assert (is_new, is_new_again) == (True, False)
    assert (again.id, again.state) == (made.id, SearchState.CANCELLED)
    assert len(store.list_searches()) == 1


def test_what_came_before_is_found_without_acting(store: Store) -> None:
    assert store.find_done(a_request()) is None
    made, _ = create(store, a_request())

    assert store.find_done(a_request()) == made.id
    assert store.find_done(a_request(key="other")) is None


def test_without_a_name_every_request_is_a_new_one(store: Store) -> None:
    assert store.find_done(None) is None
    assert create(store, None)[0].id != create(store, None)[0].id


@pytest.mark.parametrize("changes", [{"body_digest": "e"}, {"operation": "POST /v1/searches/srch_1/cancel"}])
def test_the_key_of_another_request_is_refused(store: Store, changes: dict[str, str]) -> None:
    create(store, a_request())

    for ask in (lambda request: create(store, request), store.find_done):
        with pytest.raises(IdempotencyKeyReused, match="'k'"):
            ask(a_request(**changes))

    assert len(store.list_searches()) == 1


def test_a_key_is_the_projects_own(store: Store) -> None:
    projects = ("default", "team-a", "team-b")
    for name in projects[1:]:
        store.create_project(name)

    made = [create(store, a_request(project=name, body_digest=name), project=name)[0].id for name in projects]
    again = [create(store, a_request(project=name, body_digest=name), project=name)[0].id for name in projects]

    assert again == made
    assert len(set(made)) == 3


def test_of_requests_at_the_same_time_one_acts(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: create(store, a_request()), range(16)))

    assert len({search.id for search, _ in answers}) == 1
    assert sum(is_new for _, is_new in answers) == 1


def test_one_that_comes_while_the_first_is_at_work_waits_for_it(store: Store) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work() -> SearchRecord:
        made = store.create_search(spec={}, inputs={}, plan={}, label="")
        begun.set()
        assert go_on.wait(10.0)
        return made

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(store.once, a_request(), work, search_of=lambda search: search.id, again=store.get_search)
        assert begun.wait(10.0)
        second = pool.submit(create, store, a_request())
        with pytest.raises(TimeoutError):
            second.result(timeout=0.3)
        go_on.set()

        assert (first.result()[1], second.result()) == (True, (first.result()[0], False))


def test_an_effect_that_fails_leaves_the_key_free_and_nothing_behind(store: Store) -> None:
    def fail() -> SearchRecord:
        store.create_search(spec={}, inputs={}, plan={}, label="")
        raise Conflict("no")

    with pytest.raises(Conflict):
        store.once(a_request(), fail, search_of=lambda search: search.id, again=store.get_search)

    assert store.list_searches() == []
    assert create(store, a_request())[1]


def test_what_a_quota_refuses_may_be_asked_again_and_what_was_made_is_answered_whatever_the_quota(store: Store) -> None:
    store.create_project("team", quotas=Quotas(max_active_searches=1))
    first, _ = create(store, a_request(project="team"), project="team")

    with pytest.raises(QuotaExceeded):
        create(store, a_request(project="team", key="other"), project="team")
    assert create(store, a_request(project="team"), project="team") == (first, False)
    store.request_cancel(first.id)
    assert create(store, a_request(project="team", key="other"), project="team")[1]


def test_a_key_is_forgotten_after_a_day_and_with_its_search(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = create(store, a_request())
    later = utc_now() + timedelta(hours=KEPT_HOURS, seconds=1)
    assert store.find_done(a_request()) == first.id
    monkeypatch.setattr(store, "steady_time", lambda _, **__: later)

    assert store.find_done(a_request()) is None
    second, is_new = create(store, a_request(body_digest="e"))
    store.request_cancel(second.id)
    store.delete_search(second.id)

    assert is_new
    assert second.id != first.id
    assert num_keys(store) == 0


def num_keys(store: Store) -> int:
    with store.read() as connection:
        return connection.execute(select(func.count()).select_from(idempotency_keys)).scalar_one()


def test_old_keys_are_removed_and_those_that_count_stay(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    create(store, a_request(key="old"))
    create(store, a_request(key="older"))
    now = utc_now() + timedelta(hours=KEPT_HOURS, seconds=1)
    monkeypatch.setattr(store, "steady_time", lambda _, **__: now)
    kept, _ = create(store, a_request(key="new"))

    assert (store.drop_old_keys(), store.drop_old_keys()) == (2, 0)
    assert num_keys(store) == 1
    assert create(store, a_request(key="new")) == (kept, False)


def test_of_requests_at_the_same_time_with_a_key_that_is_too_old_one_acts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = create(store, a_request())
    now = utc_now() + timedelta(hours=KEPT_HOURS, seconds=1)
    monkeypatch.setattr(store, "steady_time", lambda _, **__: now)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: create(store, a_request(body_digest="e")), range(16)))

    assert sum(is_new for _, is_new in answers) == 1
    assert {search.id for search, _ in answers} - {first.id} == {answers[0][0].id}


def test_inside_of_one_transaction_a_thread_reads_what_it_wrote_and_others_do_not(store: Store, new_search: Callable[..., SearchRecord]) -> None:
    with store.together():
        search = new_search()
        assert store.get_search(search.id) == search
        with ThreadPoolExecutor(1) as other, pytest.raises(NotFound):
            other.submit(store.get_search, search.id).result()

    assert store.get_search(search.id) == search
