from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from starlette.testclient import TestClient

from api.app import create_app
from api.problems import MEDIA_TYPE, PROBLEM_TYPES
from nas.errors import FilesUnavailable
from nas.store.records import SearchState
from nas.store.store import Store

if TYPE_CHECKING:
    from tests.api.conftest import Service


def assert_problem(answer: httpx2.Response, code: str, *, field: str | None = None, expected: str = "", got: str = "") -> dict[str, Any]:
    """Every error of the API has this shape; `field` names one of its errors."""
    assert answer.headers["content-type"] == MEDIA_TYPE
    body = answer.json()
    assert body["type"] == f"/problems/{code}"
    assert body["status"] == answer.status_code
    assert body["title"] == PROBLEM_TYPES[code].title
    assert body["detail"]
    assert body["instance"] == answer.request.url.path
    assert body["request_id"] == answer.headers["x-request-id"]
    assert set(body) <= {
        "type",
        "title",
        "status",
        "detail",
        "instance",
        "request_id",
        "errors",
        *(("quota", "limit", "used") if code == "quota-exceeded" else ()),
    }
    if field is not None:
        errors = [error for error in body["errors"] if error["field"] == field]
        assert errors, body["errors"]
        assert set(errors[0]) == {"field", "expected", "got"}
        assert expected in errors[0]["expected"]
        assert got in errors[0]["got"]
    return body


def submit(service: Service, body: object) -> httpx2.Response:
    return submit_to(service.client, body)


def submit_to(client: TestClient, body: object) -> httpx2.Response:
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return client.post("/v1/searches", content=content, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(
    ("changes", "code", "field", "expected", "got"),
    [
        ({"teacher": "nobody"}, "invalid-spec", "teacher", "tiny", "nobody"),
        ({"corpus": {"parts": [{"name": "nothing"}]}}, "invalid-spec", "corpus.parts.0.name", "stories", "nothing"),
        ({"tasks": [{"name": "nothing"}]}, "invalid-spec", "tasks.0.name", "pairs", "nothing"),
        ({"tasks": [{"name": "pairs", "metric": "f1"}]}, "invalid-spec", "tasks.0.metric", "acc", "f1"),
        ({"budget": {"max_parameters": 10}}, "budget-infeasible", "budget.max_parameters", "smallest legal shape", "10"),
        ({"budget": {"max_parameters": 10**9}}, "invalid-spec", "budget.max_parameters", "below the teacher's", "1000000000"),
        ({"budget": {"max_fraction": "0.5"}}, "invalid-spec", "budget.max_fraction", "number", "0.5"),
        ({"space": {"hidden_size": {"min": 64, "max": 32}}}, "invalid-spec", "space.hidden_size", "min at most max=32", ""),
        ({"space": {"hidden_size": {"max": 4096}}}, "invalid-spec", "space.hidden_size.max", "at most the teacher's 64", "4096"),
        ({"colour": "blue"}, "invalid-spec", "colour", "no such field", "blue"),
        ({"seed": True}, "invalid-spec", "seed", "integer", "true"),
        ({"label": "x" * 201}, "invalid-spec", "label", "", ""),
    ],
)
def test_a_wrong_spec_is_a_problem_that_names_field_expected_and_got(
    service: Service, changes: dict[str, Any], code: str, field: str, expected: str, got: str
) -> None:
    answer = submit(service, service.spec(**changes))

    assert answer.status_code == 422
    assert_problem(answer, code, field=field, expected=expected, got=got)
    assert service.store.list_searches() == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"teacher": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"])
def test_a_body_that_is_no_spec_is_refused(service: Service, body: bytes) -> None:
    answer = submit(service, body)

    assert answer.status_code == 422
    assert assert_problem(answer, "invalid-spec")["errors"]


@pytest.mark.parametrize("number", ["1e400", "-1e400", "Infinity", "-Infinity", "NaN"])
def test_a_number_that_is_not_finite_is_refused(service: Service, number: str) -> None:
    answer = submit(service, json.dumps(service.spec()).replace("0.6", number))

    assert answer.status_code == 422
    assert_problem(answer, "invalid-spec", field="budget.max_fraction")


def test_a_label_that_is_no_text_is_refused(service: Service) -> None:
    answer = submit(service, json.dumps(service.spec(label="x")).replace('"x"', r'"\ud800"'))

    assert answer.status_code == 422
    assert_problem(answer, "invalid-spec")


def test_a_body_over_one_mebibyte_is_refused(service: Service) -> None:
    answer = submit(service, json.dumps(service.spec(label="x" * 2**20)))

    assert answer.status_code == 413
    assert_problem(answer, "body-too-large")


def test_a_body_must_be_sent_as_json(service: Service) -> None:
    answer = service.client.post("/v1/searches", content=json.dumps(service.spec()), headers={"Content-Type": "text/plain"})

    assert answer.status_code == 415
    assert_problem(answer, "unsupported-media-type")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/nothing",
        "/v1/searches/srch_0",
        "/v1/searches/%00",
        "/v1/searches/' or 1=1",
        "/v1/searches/srch_0/trials",
        "/v1/searches/srch_0/events/stream",
        "/v1/searches/srch_0/winner/bundle",
        "/problems/nothing",
        "/static/../app.py",
        "/nothing",
    ],
)
def test_what_does_not_exist_is_a_404(service: Service, path: str) -> None:
    answer = service.client.get(path)

    assert answer.status_code == 404
    assert_problem(answer, "not-found")


def test_an_unknown_trial_is_a_404(service: Service) -> None:
    assert_problem(service.client.get(f"/v1/searches/{service.submit().id}/trials/7"), "not-found")


def test_another_method_is_a_405_with_allow(service: Service) -> None:
    answers = [service.client.put(path) for path in ("/v1/teachers", "/v1/searches", "/v1/searches/srch_0")]

    assert [answer.status_code for answer in answers] == [405] * 3
    assert [answer.headers["allow"] for answer in answers] == ["GET", "GET, POST", "DELETE, GET, PATCH"]
    for answer in answers:
        assert_problem(answer, "method-not-allowed")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=many", "limit"),
        ("state=asleep", "state"),
        ("after=1;drop", "after"),
        ("label=a", "label.0"),
        ("created_after=today", "created_after"),
        ("created_before=2026-01-01T00:00:00", "created_before"),
    ],
)
def test_a_wrong_query_parameter_is_named(service: Service, query: str, field: str) -> None:
    answer = service.client.get(f"/v1/searches?{query}")

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field
    assert_problem(answer, "invalid-request", field=field)


@pytest.mark.parametrize("path", ["trials/x", "trials/-1", f"trials/{2**31}", f"events?after={2**63}", "leaderboard?format=xml"])
def test_a_wrong_parameter_of_a_search_is_a_422(service: Service, path: str) -> None:
    answer = service.client.get(f"/v1/searches/{service.submit().id}/{path}")

    assert answer.status_code == 422
    assert_problem(answer, "invalid-request")


def test_cancelling_a_finished_search_is_a_conflict(service: Service) -> None:
    search = service.submit()
    service.move(search, SearchState.SEARCHING)
    service.move(search, SearchState.SUCCEEDED)

    answer = service.client.post(f"/v1/searches/{search.id}/cancel")

    assert answer.status_code == 409
    assert_problem(answer, "conflict")


def test_an_idempotency_key_with_another_body_is_refused(service: Service) -> None:
    headers = {"Content-Type": "application/json", "Idempotency-Key": "k1"}
    service.client.post("/v1/searches", content=json.dumps(service.spec()), headers=headers)

    answer = service.client.post("/v1/searches", content=json.dumps(service.spec(seed=1)), headers=headers)

    assert answer.status_code == 422
    assert_problem(answer, "idempotency-key-reused")


@pytest.mark.parametrize("body", [b'{"force": true}', b"null", b"x", b"\xff"])
def test_an_action_takes_no_body(service: Service, body: bytes) -> None:
    search = service.submit()

    answer = service.client.post(f"/v1/searches/{search.id}/cancel", content=body)

    assert answer.status_code == 422
    assert_problem(answer, "invalid-request", field="body", expected="no body")
    assert service.store.get_search(search.id).state is SearchState.QUEUED


@pytest.mark.parametrize("path", ["", "/cancel"])
def test_no_route_reads_more_than_a_mebibyte(service: Service, path: str) -> None:
    search = service.submit()
    method = "POST" if path else "PATCH"

    answer = service.client.request(method, f"/v1/searches/{search.id}{path}", content=b" " * (2**20 + 1), headers={"Content-Type": "application/json"})

    assert answer.status_code == 413
    assert_problem(answer, "body-too-large")


def test_a_bug_is_a_500_that_tells_nothing_of_the_inside(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("secret /srv/password")

    monkeypatch.setattr(service.store, "list_teachers", fail)

    answer = service.client.get("/v1/teachers")

    assert answer.status_code == 500
    assert_problem(answer, "internal-error")
    assert "secret" not in answer.text


def test_files_that_are_out_of_reach_are_a_503_that_tells_nothing_of_their_place(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FilesUnavailable("s3://secret-bucket/x: expected an answer, got EndpointConnectionError")

    monkeypatch.setattr(Store, "list_searches", refuse)

    answer = service.client.get("/v1/searches")

    body = assert_problem(answer, "not-ready")
    assert answer.headers["retry-after"]
    assert "secret" not in str(body)


def test_a_database_that_is_away_is_a_503_that_says_when_to_try_again(service: Service) -> None:
    store = Store.open("postgresql://nobody:secret@127.0.0.1:1/nothing")
    client = TestClient(create_app(store=store, settings=service.settings), base_url="http://127.0.0.1", raise_server_exceptions=False)

    answers = [client.get("/v1/searches"), submit_to(client, service.spec()), client.post("/v1/searches/srch_0/cancel")]

    for answer in answers:
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert_problem(answer, "not-ready")
        assert "secret" not in answer.text
    store.close()


@pytest.mark.parametrize(("given", "kept"), [("trace-1.a_B", True), ("a b", False), ("x" * 65, False), ('"', False), ("", False)])
def test_a_request_keeps_the_name_that_it_came_with_if_it_is_a_plain_one(service: Service, given: str, kept: bool) -> None:
    answer = service.client.get("/healthz", headers={"X-Request-Id": given})

    assert (answer.headers["x-request-id"] == given) == kept
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::1", "user@evil.example"])
def test_another_host_name_is_refused(service: Service, host: str) -> None:
    answer = service.client.get("/v1/teachers", headers={"Host": host})

    assert answer.status_code == 400
    assert_problem(answer, "bad-request")


@pytest.mark.parametrize("host", ["127.0.0.1:8400", "localhost", "[::1]:8400"])
def test_loopback_names_are_served(service: Service, host: str) -> None:
    assert service.client.get("/v1/teachers", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_sites_page_changes_nothing(service: Service, site: str) -> None:
    search = service.submit()

    answer = service.client.post(f"/v1/searches/{search.id}/cancel", headers={"Sec-Fetch-Site": site})

    assert answer.status_code == 403
    assert_problem(answer, "cross-site")
    assert service.store.get_search(search.id).state is SearchState.QUEUED


@pytest.mark.parametrize("code", sorted(PROBLEM_TYPES))
def test_every_kind_of_problem_has_a_page(service: Service, code: str) -> None:
    answer = service.client.get(f"/problems/{code}", headers={"Accept": "text/html"})

    assert answer.status_code == 200
    assert PROBLEM_TYPES[code].title in answer.text
