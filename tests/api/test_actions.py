"""What acts on a search that is there: once for each Idempotency-Key, on the version that was decided on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from nas.store.records import SearchRecord, SearchState
from tests.api.test_problems import assert_problem

if TYPE_CHECKING:
    from tests.api.conftest import Service


def act(service: Service, search: SearchRecord, action: str, **headers: str) -> httpx2.Response:
    return service.client.post(f"/v1/searches/{search.id}/{action}", headers={name.replace("_", "-"): value for name, value in headers.items()})


def change(service: Service, search: SearchRecord, body: Any, **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return service.client.patch(f"/v1/searches/{search.id}", json=body, headers=named)


def test_a_search_is_paused_resumed_and_cancelled(service: Service) -> None:
    search = service.submit()
    service.move(search, SearchState.SEARCHING)

    states = [(answer := act(service, search, action)).status_code and answer.json()["state"] for action in ("pause", "pause", "resume", "resume", "cancel")]

    assert states == ["pausing", "pausing", "queued", "queued", "cancelling"]
    refused = act(service, search, "pause")
    assert refused.status_code == 409
    assert_problem(refused, "conflict")


def test_an_action_that_is_sent_again_acts_once(service: Service) -> None:
    search = service.submit()

    first = act(service, search, "pause", idempotency_key="a")
    act(service, search, "resume", idempotency_key="b")
    again = act(service, search, "pause", idempotency_key="a")

    assert (first.status_code, first.json()["state"]) == (202, "paused")
    assert (again.status_code, again.json()["state"]) == (202, "queued")
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert_problem(act(service, search, "cancel", idempotency_key="a"), "idempotency-key-reused")


def test_of_many_submits_with_one_key_at_once_one_search_is_made(service: Service) -> None:
    def submit(_: int) -> tuple[int, str]:
        answer = service.client.post("/v1/searches", json=service.spec(), headers={"Idempotency-Key": "k"})
        return answer.status_code, answer.json()["id"]

    with ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(submit, range(16)))

    assert answers == {(201, service.store.list_searches()[0].id)}
    assert len(service.store.list_searches()) == 1


def test_a_search_that_is_refused_may_be_sent_again_under_the_same_key(service: Service) -> None:
    headers = {"Idempotency-Key": "k"}
    refused = service.client.post("/v1/searches", json=service.spec(teacher="nobody"), headers=headers)
    taken = service.client.post("/v1/searches", json=service.spec(), headers=headers)

    assert (refused.status_code, taken.status_code) == (422, 201)


def test_a_search_is_changed_on_the_version_that_was_decided_on(service: Service) -> None:
    search = service.submit()
    etag = service.client.get(f"/v1/searches/{search.id}").headers["etag"]

    changed = change(service, search, {"max_trials": 30, "max_parallel_trials": 3, "labels": {"team": "edge"}}, if_match=etag)
    late = change(service, search, {"max_trials": 40}, if_match=etag)
    blind = change(service, search, {"max_trials": 40})
    anyway = change(service, search, {"max_trials": 50}, if_match="*")

    assert changed.status_code == 200
    assert (changed.json()["spec"]["sampler"]["max_trials"], changed.json()["spec"]["resources"]["max_parallel_trials"]) == (30, 3)
    assert changed.json()["labels"] == {"team": "edge"}
    assert changed.headers["etag"] == f'"{changed.json()["version"]}"' != etag
    assert (late.status_code, blind.status_code) == (412, 428)
    assert_problem(late, "precondition-failed")
    assert_problem(blind, "precondition-required")
    assert anyway.json()["spec"]["sampler"]["max_trials"] == 50


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"max_trials": "30"}, "max_trials"),
        ({"max_trials": True}, "max_trials"),
        ({"max_trials": 30.0}, "max_trials"),
        ({"max_trials": 0}, "max_trials"),
        ({"max_parallel_trials": 10**30}, "max_parallel_trials"),
        ({"labels": {"a b": "c"}}, "labels.a b.[key]"),
        ({"labels": ["a"]}, "labels"),
        ({"seed": 1}, "seed"),
        ([], "(body)"),
    ],
)
def test_a_wrong_change_is_told_by_its_field(service: Service, body: Any, field: str) -> None:
    search = service.submit()

    answer = change(service, search, body, if_match="*")

    assert answer.status_code == 422
    assert_problem(answer, "invalid-spec", field=field)
    assert service.store.get_search(search.id) == search


def test_who_has_the_version_gets_no_body(service: Service) -> None:
    search = service.submit()
    url = f"/v1/searches/{search.id}"
    etag = service.client.get(url).headers["etag"]

    unchanged = service.client.get(url, headers={"If-None-Match": etag})
    act(service, search, "pause")
    changed = service.client.get(url, headers={"If-None-Match": etag})

    assert (unchanged.status_code, unchanged.content, unchanged.headers["etag"]) == (304, b"", etag)
    assert changed.status_code == 200


def test_only_a_search_that_has_ended_is_deleted(service: Service) -> None:
    search = service.submit()
    url = f"/v1/searches/{search.id}"

    early = service.client.delete(url)
    act(service, search, "cancel")
    done = service.client.delete(url)

    assert early.status_code == 409
    assert_problem(early, "conflict")
    assert (done.status_code, done.content) == (204, b"")
    assert {service.client.get(url).status_code, service.client.delete(url).status_code} == {404}
