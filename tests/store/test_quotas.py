from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from nas.errors import QuotaExceeded
from nas.estimate import planned_work
from nas.spec import dump_spec, parse_spec
from nas.store import quotas
from nas.store.quotas import Quotas, Usage
from nas.store.records import AttemptRecord, AttemptState, SearchRecord, SearchState, TrialRecord, utc_now
from nas.store.store import Store


@pytest.fixture
def project(store: Store) -> str:
    return store.create_project("team-a").name


def submit(store: Store, project: str, *, trials: int = 10, tokens: int = 100, **values: Any) -> SearchRecord:
    plan = {"max_trials": trials, "max_distillation_tokens": tokens}
    return store.create_search(spec={}, inputs={}, plan=plan, label="", project=project, **values)


def usage(store: Store, project: str) -> Usage:
    return next(used for record, used in store.list_projects() if record.name == project)


@pytest.mark.parametrize("tokens", [2**61, 2**62, 2**63, 10**30])
def test_no_number_of_tokens_is_too_large_to_be_counted(store: Store, project: str, tokens: int) -> None:
    for _ in range(4):
        submit(store, project, tokens=tokens)

    assert usage(store, project).tokens_today == quotas.MAX_COUNTED
    store.set_quotas(project, Quotas(max_tokens_per_day=2**53))
    with pytest.raises(QuotaExceeded):
        submit(store, project, tokens=1)


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


def a_spec(max_trials: int) -> dict[str, Any]:
    spec = {"teacher": "t", "corpus": {"parts": [{"name": "c"}]}, "tasks": [{"name": "a"}], "budget": {"max_fraction": 0.5}}
    return dump_spec(parse_spec(json.dumps({**spec, "sampler": {"max_trials": max_trials}, "controls": {"num_random": 2}})))


def extendable(store: Store, project: str, *, max_trials: int) -> SearchRecord:
    """A search whose plan says what its budget searches."""
    spec = a_spec(max_trials)
    budget = {"legal_shapes": 1000, "anchors": {"uniform": {}}, "searched": max_trials, "forced": 1}
    plan = {**budget, "budgets": [budget], **planned_work(parse_spec(json.dumps(spec)), budgets=[budget])}
    return store.create_search(spec=spec, inputs={}, plan=plan, label="", project=project)


def test_an_extended_search_has_the_plan_of_one_that_began_so(store: Store, project: str) -> None:
    search, other = extendable(store, project, max_trials=10), extendable(store, project, max_trials=25)

    updated = store.update_search(search.id, version=None, max_trials=25)

    assert updated.plan == other.plan
    assert updated.plan["max_trials"] == 27
    assert usage(store, project).active_trials == 2 * 27
    assert usage(store, project).tokens_today == 2 * other.plan["max_distillation_tokens"]


def test_a_search_is_not_extended_beyond_a_quota_but_narrowed_at_any_time(store: Store, project: str) -> None:
    search = extendable(store, project, max_trials=10)
    store.set_quotas(project, Quotas(max_active_searches=0, max_active_trials=20))

    with pytest.raises(QuotaExceeded, match="max_active_trials of project team-a: expected at most 20, got 12 in use and 9 more"):
        store.update_search(search.id, version=None, max_trials=19)
    assert store.get_search(search.id) == search

    assert store.update_search(search.id, version=None, max_trials=18).plan["max_trials"] == 20
    assert store.update_search(search.id, version=None, max_trials=5).plan["max_trials"] == 7
    assert store.update_search(search.id, version=None, labels={"a": "b"}).labels == {"a": "b"}


def test_device_time_counts_when_a_step_ends_and_deleting_the_search_gives_none_back(
    store: Store, project: str, new_trial: Callable[..., TrialRecord], finish_rung: Callable[..., AttemptRecord]
) -> None:
    search = submit(store, project)
    store.set_quotas(project, Quotas(max_device_seconds_per_day=100))
    trial = new_trial(search, 0)
    finish_rung(trial, 0, device_seconds=60.0)
    submit(store, project)  # below the quota, whatever it will take
    for state, seconds in ((AttemptState.FAILED, 30.0), (AttemptState.LOST, None), (AttemptState.CANCELLED, 15.5)):
        attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=1, fence=None)
        store.finish_attempt(attempt.id, state=state, reason="", fence=None, device_seconds=seconds)
    attempt = store.start_attempt(search.id, stage="confirm", trial=0, rung=None, fence=None)
    store.save_confirmation(attempt.id, search_id=search.id, trial=0, confirmation={"verified": True}, fence=None, device_seconds=4.0)
    assert usage(store, project).device_seconds_today == 109.5

    with pytest.raises(QuotaExceeded, match="max_device_seconds_per_day of project team-a: expected at most 100, got 110 in use") as refusal:
        submit(store, project)
    assert refusal.value.retry_after_seconds is not None
    store.change_search(search.id, to=SearchState.FAILED, expected=[SearchState.QUEUED], fence=None)
    store.delete_search(search.id)

    assert usage(store, project).device_seconds_today == 109.5
    with pytest.raises(QuotaExceeded, match="max_device_seconds_per_day"):
        submit(store, project)
