"""Full distillations over HTTP: what is taken, what is refused before anything is stored, and how one is followed to its file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nas.store.records import SearchRecord, SearchState
from tests.api.conftest import Service

JSON = {"Content-Type": "application/json"}
URL = "/v1/distillations"


@pytest.fixture
def search(service: Service) -> SearchRecord:
    return service.succeed(service.confirmed_search())


def post(service: Service, body: dict[str, Any], **headers: str) -> Any:
    return service.client.post(URL, content=json.dumps(body), headers={**JSON, **headers})


def test_a_submit_answers_with_the_complete_recipe_and_where_it_is(service: Service, search: SearchRecord) -> None:
    answer = post(service, {"search_id": search.id, "recipe": {"tokens": 5000, "learning_rate": 1e-4}, "label": "full"})

    made = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (201, f"{URL}/{made['id']}")
    assert (made["search"], made["trial"], made["state"], made["label"]) == (search.id, 1, "queued", "full")
    recipe = made["recipe"]
    assert (recipe["tokens"], recipe["learning_rate"], recipe["batch_size"], recipe["sequence_length"]) == (5000, 1e-4, 2, 128)
    assert service.client.get(answer.headers["location"]).json()["id"] == made["id"]


def test_without_a_recipe_it_is_the_bundle_s(service: Service, search: SearchRecord) -> None:
    assert post(service, {"search_id": search.id}).json()["recipe"]["tokens"] == 10 * 4000


def test_the_same_key_makes_one_distillation(service: Service, search: SearchRecord) -> None:
    first, again = (post(service, {"search_id": search.id}, **{"Idempotency-Key": "k"}) for _ in range(2))

    assert (first.json()["id"], again.headers["idempotency-replayed"]) == (again.json()["id"], "true")
    assert len(service.client.get(URL).json()["data"]) == 1


def test_the_same_request_is_answered_when_its_search_is_gone(service: Service, search: SearchRecord) -> None:
    first = post(service, {"search_id": search.id}, **{"Idempotency-Key": "k"}).json()
    service.store.request_cancel(first["id"])
    service.store.delete_search(search.id)

    again = post(service, {"search_id": search.id}, **{"Idempotency-Key": "k"})

    assert (again.status_code, again.json()["id"], again.json()["state"]) == (201, first["id"], "cancelled")
    assert post(service, {"search_id": search.id}).status_code == 422


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "search_id"),
        ({"search_id": "dist_1"}, "search_id"),
        ({"search_id": "srch_0"}, "search_id"),
        ({"trial": 77}, "trial"),
        ({"trial": True}, "trial"),
        ({"budget": 1}, "budget"),
        ({"recipe": {"tokens": "many"}}, "recipe.tokens"),
        ({"recipe": {"decay_share": 1}}, "recipe.decay_share"),
        ({"recipe": {"sequence_length": 1024}}, "recipe.sequence_length"),
        ({"recipe": {"steps": 1}}, "recipe.steps"),
        ({"recipe": {"tokens": 10**18}}, "recipe.tokens"),
        ({"recipe": {"tokens": -1}}, "recipe.tokens"),
        ({"recipe": {"tokens": 2 * 2 * 128 - 1}}, "recipe.tokens"),
        ({"recipe": {"batch_size": 1_000_000}}, "recipe.tokens"),
        ({"recipe": {"warmup_tokens": 40_001}}, "recipe.warmup_tokens"),
        ({"recipe": {"learning_rate": 1e308}}, "recipe.learning_rate"),
        ({"label": "a\u001b[31m"}, "label"),
        ({"label": "two\nlines"}, "label"),
        ({"resources": {"gpus": 8}}, "resources.gpus"),
        ({"limits": {"max_attempts": 0}}, "limits.max_attempts"),
        ({"teacher": "other"}, "teacher"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_stored(service: Service, search: SearchRecord, body: dict[str, Any], field: str) -> None:
    answer = post(service, {"search_id": search.id, **body} if body else {})

    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert service.client.get(URL).json()["data"] == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400", "-1e400"])
def test_what_is_no_number_is_named_in_json_that_is_none(service: Service, search: SearchRecord, number: str) -> None:
    for name in ("tokens", "learning_rate"):
        answer = service.client.post(URL, content=f'{{"search_id": "{search.id}", "recipe": {{"{name}": {number}}}}}', headers=JSON)

        assert (answer.status_code, [error["field"] for error in answer.json()["errors"]]) == (422, [f"recipe.{name}"])


def test_whole_steps_are_charged(service: Service, search: SearchRecord) -> None:
    before = service.store.get_project("default")[1].tokens_today

    post(service, {"search_id": search.id, "recipe": {"tokens": 5000}})  # steps of 2 x 128

    assert service.store.get_project("default")[1].tokens_today - before == 20 * 256


def test_a_search_that_has_not_succeeded_has_nothing_to_distil(service: Service) -> None:
    answer = post(service, {"search_id": service.submit().id})

    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/conflict")


def test_lists_are_of_one_search_in_one_state_and_never_of_searches(service: Service, search: SearchRecord) -> None:
    made = [service.distil(search).id for _ in range(3)]
    service.store.request_cancel(made[0])
    get = service.client.get

    assert [one["id"] for one in get(URL, params={"search": search.id, "state": "queued"}).json()["data"]] == made[:0:-1]
    page = get(URL, params={"limit": 2}).json()
    assert [one["id"] for one in get(URL, params={"after": page["next_cursor"]}).json()["data"]] == made[:1]
    assert [one["id"] for one in get("/v1/searches").json()["data"]] == [search.id]
    assert get(URL, params={"state": "paused"}).status_code == 422
    assert get(f"/v1/searches/{made[0]}").status_code == get(f"{URL}/{search.id}").status_code == 404


def test_a_finished_one_has_its_curve_its_log_and_its_file(service: Service, search: SearchRecord) -> None:
    done = service.finish_distillation(service.distil(search))
    get, url = service.client.get, f"{URL}/{done.id}"

    detail = get(url)
    found = detail.json()
    assert (found["state"], found["tokens_done"], [point["tokens"] for point in found["points"]]) == ("succeeded", 2000, [1000, 2000])
    assert found["result"]["held_out_after"]["kl"] == 0.1
    assert [attempt["stage"] for attempt in found["attempts"]] == ["distil"]
    assert get(url, headers={"If-None-Match": detail.headers["etag"]}).status_code == 304
    assert get(f"{url}/log").text == "a line\n"
    file = get(found["result"]["file_url"])
    assert (file.content, file.headers["etag"]) == (b"a model" * 1000, f'"{found["result"]["sha256"]}"')
    part = get(f"{url}/file", headers={"Range": "bytes=2-6"})
    assert (part.status_code, part.content) == (206, b"model")
    assert "secret" not in detail.text
    with service.client.stream("GET", f"{url}/events/stream") as stream:
        assert b"distillation.succeeded" in stream.read()


def test_cancelled_twice_is_no_error_and_finished_is(service: Service, search: SearchRecord) -> None:
    running, done = service.distil(search), service.finish_distillation(service.distil(search))
    service.move(running, SearchState.RUNNING)
    act = service.client.post

    assert [act(f"{URL}/{running.id}/cancel").json()["state"] for _ in range(2)] == ["cancelling", "cancelling"]
    cancelled = act(f"{URL}/{done.id}/cancel")
    assert (cancelled.status_code, cancelled.json()["detail"]) == (409, f"distillation {done.id}: expected one that has not finished, got state succeeded")
    assert service.client.get(f"{URL}/{running.id}/file").status_code == 409
    assert service.client.delete(f"{URL}/{running.id}").status_code == 409
    assert service.client.delete(f"/v1/searches/{search.id}").status_code == 409
    assert service.client.delete(f"{URL}/{done.id}").status_code == 204
    assert service.client.get(f"{URL}/{done.id}").status_code == 404


def test_a_search_cannot_start_from_a_distillation(service: Service, search: SearchRecord) -> None:
    body = json.dumps(service.spec(warm_start_from=[service.distil(search).id]))
    answer = service.client.post("/v1/searches", content=body, headers=JSON)

    assert (answer.status_code, answer.json()["errors"][0]["expected"]) == (422, "the id of a search")


def test_the_pages_show_it(service: Service, search: SearchRecord) -> None:
    waiting, done = service.distil(search, label="<b>full</b>"), service.finish_distillation(service.distil(search))
    get = service.client.get

    listed = get(f"/searches/{search.id}").text
    assert f'href="/distillations/{waiting.id}">&lt;b&gt;full&lt;/b&gt;' in listed
    page = get(f"/distillations/{done.id}")
    assert page.status_code == 200
    assert f'href="{URL}/{done.id}/file"' in page.text
    assert "state-succeeded" in page.text
    assert 'data-refresh-seconds="2"' in get(f"/distillations/{waiting.id}").text
    assert get("/distillations/dist_0").status_code == 404
