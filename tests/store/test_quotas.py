from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from nas.errors import QuotaExceeded
from nas.store import quotas
from nas.store.quotas import Quotas, Usage
from nas.store.records import SearchRecord, SearchState, utc_now
from nas.store.store import Store


@pytest.fixture
def project(store: Store) -> str:
    return store.create_project("team-a").name


def submit(store: Store, project: str, *, trials: int = 10, tokens: int = 100, **values: Any) -> SearchRecord:
    plan = {"max_trials": trials, "max_distillation_tokens": tokens}
    return store.create_search(spec={}, inputs={}, plan=plan, label="", project=project, **values)


def usage(store: Store, project: str) -> Usage:
    return next(used for record, used in store.list_projects() if record.name == project)


@pytest.mark.parametrize(
    ("limits", "passing", "quota", "retries"),
    [
        (Quotas(max_active_searches=2), 2, "max_active_searches", False),
        (Quotas(max_active_trials=29), 2, "max_active_trials", False),
        (Quotas(max_active_trials=9), 0, "max_active_trials", False),
        (Quotas(max_tokens_per_day=300), 3, "max_tokens_per_day", True),
        (Quotas(max_tokens_per_day=99), 0, "max_tokens_per_day", False),
        (Quotas(max_device_seconds_per_day=0), 0, "max_device_seconds_per_day", False),
    ],
)
def test_what_is_over_a_quota_is_refused_and_leaves_nothing(store: Store, project: str, limits: Quotas, passing: int, quota: str, retries: bool) -> None:
    store.set_quotas(project, limits)
    made = [submit(store, project).id for _ in range(passing)]
    before = usage(store, project)

    with pytest.raises(QuotaExceeded, match=f"{quota} of project team-a: expected at most") as refusal:
        submit(store, project)

    assert refusal.value.quota == quota
    assert (refusal.value.retry_after_seconds is not None) is retries
    if retries:
        assert 0 < (refusal.value.retry_after_seconds or 0) <= 86401
    assert [search.id for search in store.list_searches(project=project)] == made[::-1]
    assert usage(store, project) == before


def test_another_project_does_not_count(store: Store, project: str) -> None:
    store.set_quotas(project, Quotas(max_active_searches=1, max_active_trials=10, max_tokens_per_day=100))
    for _ in range(3):
        submit(store, "default")

    assert submit(store, project).project == project


@pytest.mark.parametrize("state", [SearchState.SUCCEEDED, SearchState.FAILED, SearchState.CANCELLED])
def test_a_search_that_ended_makes_room_but_gives_no_tokens_back(store: Store, project: str, state: SearchState) -> None:
    store.set_quotas(project, Quotas(max_active_searches=1, max_active_trials=10, max_tokens_per_day=200))
    first = submit(store, project)
    store.change_search(first.id, to=state, expected=[SearchState.QUEUED], fence=None)
    second = submit(store, project)
    store.change_search(second.id, to=state, expected=[SearchState.QUEUED], fence=None)

    with pytest.raises(QuotaExceeded, match="max_tokens_per_day"):
        submit(store, project)
    assert usage(store, project) == Usage(active_searches=0, active_trials=0, tokens_today=200, device_seconds_today=0.0)


def test_a_new_day_has_tokens_again(store: Store, project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store.set_quotas(project, Quotas(max_tokens_per_day=100))
    submit(store, project)
    with pytest.raises(QuotaExceeded) as refusal:
        submit(store, project)

    after = timedelta(seconds=refusal.value.retry_after_seconds or 0)
    now = utc_now() + after
    monkeypatch.setattr(quotas, "utc_now", lambda: now)

    assert submit(store, project).project == project


def test_of_twenty_submits_at_once_under_a_limit_of_one_exactly_one_is_stored(store: Store, project: str) -> None:
    store.set_quotas(project, Quotas(max_active_searches=1))

    def one(_: int) -> str | None:
        try:
            return submit(store, project).id
        except QuotaExceeded:
            return None

    with ThreadPoolExecutor(20) as pool:
        made = [search_id for search_id in pool.map(one, range(20)) if search_id]

    assert [search.id for search in store.list_searches(project=project)] == made
    assert len(made) == 1
    assert usage(store, project).tokens_today == 100
