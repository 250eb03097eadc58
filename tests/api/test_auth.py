from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from api.app import create_app
from api.auth import FAILURES_AT_ONCE, is_public, needed_scope
from api.principal import parse_bearer
from nas.errors import StoreUnavailable
from nas.settings import Settings
from nas.store.quotas import Quotas
from nas.store.records import SearchState, utc_now
from nas.store.store import Store
from tests.api.conftest import Service
from tests.api.test_problems import assert_problem
from tests.served import served

SCOPES = ("read", "submit", "admin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenants:
    """A service with two projects, and clients that hold a key of each."""

    service: Service
    ours: TestClient
    theirs: TestClient
    keys: dict[str, str]
    """Secrets by project."""


def client_with(service: Service, secret: str | None) -> TestClient:
    headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
    return TestClient(service.client.app, base_url="http://127.0.0.1", headers=headers, raise_server_exceptions=False)


def key_of(service: Service, project: str = "default", scopes: tuple[str, ...] = SCOPES, **values: Any) -> str:
    return service.store.create_key(project=project, name="a key", scopes=scopes, **values)[1]


@pytest.fixture
def tenants(service: Service) -> Tenants:
    service.store.create_project("theirs")
    keys = {project: key_of(service, project) for project in ("default", "theirs")}
    return Tenants(service=service, ours=client_with(service, keys["default"]), theirs=client_with(service, keys["theirs"]), keys=keys)


class TestBearer:
    @pytest.mark.parametrize(("header", "token"), [("Bearer abc", "abc"), ("bearer  a.b_c-d", "a.b_c-d"), ("BEARER x", "x")])
    def test_the_scheme_has_any_case_and_any_spaces(self, header: str, token: str) -> None:
        assert parse_bearer(header) == token

    @pytest.mark.parametrize(
        "header", ["", "Bearer", "Bearer ", "Basic abc", "Bearerabc", "Bearer a b", " Bearer a", "Bearer a ", "Bearer é", "Bearer a\n", "a"]
    )
    def test_anything_else_is_none(self, header: str) -> None:
        assert parse_bearer(header) is None

    @given(st.text())
    def test_any_text_is_read_without_an_error(self, text: str) -> None:
        token = parse_bearer(text)
        assert token is None or text.endswith(token)

    @given(st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), min_size=1), st.integers(1, 3))
    def test_any_visible_token_comes_out_as_it_went_in(self, token: str, spaces: int) -> None:
        assert parse_bearer("Bearer" + " " * spaces + token) == token


class TestSingleUser:
    def test_without_any_key_loopback_needs_none(self, service: Service) -> None:
        assert service.client.get("/v1/searches").status_code == 200

    def test_from_the_first_key_on_everybody_needs_one_for_ever(self, service: Service) -> None:
        key, secret = service.store.create_key(project="default", name="", scopes=["read"])

        assert_problem(service.client.get("/v1/searches"), "unauthorized")
        assert client_with(service, secret).get("/v1/searches").status_code == 200
        service.store.revoke_key(key.id)
        assert_problem(service.client.get("/v1/searches"), "unauthorized")

    def test_a_wrong_key_is_refused_there_too(self, service: Service) -> None:
        assert_problem(client_with(service, "nas_wrong").get("/v1/searches"), "unauthorized")

    def test_a_service_that_others_reach_always_needs_one(self, service: Service) -> None:
        for variables in ({"NAS_HOST": "0.0.0.0"}, {"NAS_ALLOWED_HOSTS": "nas.example.org"}):
            settings = Settings.from_environment({"NAS_DATA": "/tmp/never-made", **variables})
            client = TestClient(create_app(store=service.store, settings=settings), base_url="http://127.0.0.1")

            assert_problem(client.get("/v1/searches"), "unauthorized")


class TestKeys:
    @pytest.mark.parametrize("path", ["/v1/searches", "/v1/nothing", "/v1/searches/srch_0/events/stream", "/openapi.json", "/nothing", "/metrics"])
    def test_without_a_key_nothing_is_told_not_even_what_exists(self, tenants: Tenants, path: str) -> None:
        answer = tenants.service.client.get(path)

        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == 'Bearer realm="nas"'
        assert_problem(answer, "unauthorized")

    @pytest.mark.parametrize("path", ["/healthz", "/readyz", "/login", "/static/style.css", "/problems/unauthorized"])
    def test_what_shows_nothing_of_anybody_is_public(self, tenants: Tenants, path: str) -> None:
        assert tenants.service.client.get(path).status_code == 200

    @pytest.mark.parametrize("header", ["", "Basic bmFzOm5hcw==", "Bearer", "nas_1"])
    def test_another_kind_of_authorization_is_refused(self, tenants: Tenants, header: str) -> None:
        assert_problem(tenants.service.client.get("/v1/searches", headers={"Authorization": header}), "unauthorized")

    def test_two_keys_in_one_request_are_refused(self, tenants: Tenants) -> None:
        headers = [("Authorization", f"Bearer {secret}") for secret in tenants.keys.values()]

        assert_problem(tenants.service.client.get("/v1/searches", headers=headers), "unauthorized")

    def test_a_refused_key_is_told_why_only_if_the_secret_was_right(self, tenants: Tenants) -> None:
        store = tenants.service.store
        revoked, secret = store.create_key(project="default", name="", scopes=["read"])
        store.revoke_key(revoked.id)
        expired = key_of(tenants.service, expires_at=utc_now() - timedelta(seconds=1))

        answers = {name: client_with(tenants.service, text).get("/v1/searches") for name, text in (("a", secret), ("b", expired), ("c", secret[:-3] + "AAA"))}

        assert {name: answer.status_code for name, answer in answers.items()} == {"a": 401, "b": 401, "c": 401}
        assert all('error="invalid_token"' in answer.headers["www-authenticate"] for answer in answers.values())
        assert [answers[name].json()["detail"].split()[-1] for name in "abc"] == ["revoked", "expired", "service"]

    @pytest.mark.parametrize(
        ("method", "path", "scope"),
        [
            ("GET", "/v1/searches", "read"),
            ("HEAD", "/v1/searches", "read"),
            ("POST", "/v1/searches", "submit"),
            ("POST", "/v1/searches:preview", "read"),
            ("PATCH", "/v1/searches/srch_1", "submit"),
            ("DELETE", "/v1/searches/srch_1", "submit"),
            ("PUT", "/v1/what-may-come", "submit"),
            ("GET", "/metrics", "admin"),
            ("HEAD", "/metrics", "admin"),
            ("POST", "/logout", None),
        ],
    )
    def test_what_a_request_needs_follows_from_its_method(self, method: str, path: str, scope: str | None) -> None:
        assert needed_scope(method, path) == scope
        assert not is_public(path)

    @pytest.mark.parametrize(("scopes", "statuses"), [(("read",), (200, 403, 403)), (("submit",), (200, 202, 403)), (("admin",), (200, 202, 200))])
    def test_a_key_does_only_what_its_scopes_allow(self, tenants: Tenants, scopes: tuple[str, ...], statuses: tuple[int, ...]) -> None:
        search = tenants.service.submit()
        client = client_with(tenants.service, key_of(tenants.service, scopes=scopes))

        answers = client.get("/v1/searches"), client.post(f"/v1/searches/{search.id}/cancel"), client.get("/metrics")

        assert tuple(answer.status_code for answer in answers) == statuses
        for answer in answers:
            if answer.status_code == 403:
                assert scopes[0] in assert_problem(answer, "missing-scope")["detail"]
        assert (tenants.service.store.get_search(search.id).state is SearchState.QUEUED) == (statuses[1] == 403)

    def test_a_database_that_is_away_is_a_503_and_never_an_open_door(self, tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise StoreUnavailable("the database does not answer")

        for name in ("authenticate_key", "authenticate_session", "has_keys"):
            monkeypatch.setattr(tenants.service.store, name, fail)

        for client in (tenants.ours, tenants.service.client):
            assert_problem(client.get("/v1/searches"), "not-ready")

    def test_no_secret_is_ever_logged(self, tenants: Tenants, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        wrong = tenants.keys["default"][:-3] + "AAA"
        for secret in (*tenants.keys.values(), wrong, "nas_nothing"):
            client_with(tenants.service, secret).get("/v1/searches")
        tenants.service.client.post("/login", data={"key": wrong})

        told = caplog.text + " ".join(str(vars(record)) for record in caplog.records)

        assert "a key was refused" in told
        assert not any(secret.rsplit("_", 1)[1][:20] in told for secret in (*tenants.keys.values(), wrong))


class TestLimits:
    def test_a_key_that_asks_too_often_waits_and_others_do_not(self, service: Service) -> None:
        service.store.create_project("theirs")
        ours, theirs = key_of(service), key_of(service, "theirs")
        settings = Settings.from_environment({"NAS_DATA": str(service.settings.data_folder), "NAS_REQUESTS_PER_SECOND": "0.5"})
        client = TestClient(create_app(store=service.store, settings=settings), base_url="http://127.0.0.1")

        def ask(secret: str) -> httpx2.Response:
            return client.get("/v1/teachers", headers={"Authorization": f"Bearer {secret}"})

        assert ask(ours).status_code == 200
        refused = ask(ours)
        assert_problem(refused, "too-many-requests")
        assert refused.headers["retry-after"] == "2"
        assert ask(theirs).status_code == 200

    def test_an_address_with_wrong_keys_waits_but_a_right_key_is_never_held_up(self, tenants: Tenants) -> None:
        wrong = client_with(tenants.service, "nas_000000000000_" + "A" * 43)

        answers = [wrong.get("/v1/teachers") for _ in range(int(FAILURES_AT_ONCE) + 1)]

        assert [answer.status_code for answer in answers] == [401] * int(FAILURES_AT_ONCE) + [429]
        assert_problem(answers[-1], "too-many-requests")
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert tenants.ours.get("/v1/teachers").status_code == 200

    def test_a_quota_is_a_429_that_says_which_and_leaves_nothing(self, tenants: Tenants) -> None:
        store = tenants.service.store
        store.set_quotas("theirs", Quotas(max_active_searches=1))
        headers = {"Content-Type": "application/json"}
        body = json.dumps(tenants.service.spec())

        answers = [tenants.theirs.post("/v1/searches", content=body, headers=headers) for _ in range(2)]

        assert [answer.status_code for answer in answers] == [201, 429]
        problem = assert_problem(answers[1], "quota-exceeded")
        assert (problem["quota"], problem["limit"], problem["used"]) == ("max_active_searches", 1, 1)
        assert "retry-after" not in answers[1].headers
        assert len(store.list_searches()) == 1

    def test_a_quota_of_the_day_says_when_it_is_there_again(self, tenants: Tenants) -> None:
        plan = tenants.service.submit().plan
        tenants.service.store.set_quotas("theirs", Quotas(max_tokens_per_day=int(plan["max_distillation_tokens"])))
        headers = {"Content-Type": "application/json"}

        answers = [tenants.theirs.post("/v1/searches", content=json.dumps(tenants.service.spec()), headers=headers) for _ in range(2)]

        assert [answer.status_code for answer in answers] == [201, 429]
        assert 0 < int(answers[1].headers["retry-after"]) <= 86401


def test_a_key_is_told_its_project_its_scopes_and_what_is_left(tenants: Tenants) -> None:
    tenants.service.store.set_quotas("theirs", Quotas(max_active_searches=2))
    tenants.theirs.post("/v1/searches", content=json.dumps(tenants.service.spec()), headers={"Content-Type": "application/json"})
    tenants.service.submit()

    answer = tenants.theirs.get("/v1/project").json()

    assert (answer["name"], answer["scopes"]) == ("theirs", ["read", "submit", "admin"])
    assert tenants.keys["theirs"].startswith(answer["key_id"])
    assert (answer["quotas"]["max_active_searches"], answer["usage"]["active_searches"]) == (2, 1)
    assert tenants.service.client.get("/v1/project").status_code == 401


@pytest.fixture
def address(service: Service) -> Iterator[str]:
    """The application behind a real server: the test client cannot read a stream that does not end."""
    with served(service.client.app) as address:
        yield address


class TestOpenStreams:
    """An event stream ends within a second of its key; the streams of other keys go on."""

    def seconds_until_it_ends(self, url: str, headers: dict[str, str], end: Callable[[], object], *, at_most: float = 5.0) -> float | None:
        """How long a stream stays open after `end`; None if it outlives the test."""
        with httpx2.Client() as client, client.stream("GET", url, headers=headers, timeout=at_most) as answer:
            assert answer.status_code == 200
            chunks = answer.iter_raw()
            next(chunks)
            began = time.monotonic()
            end()
            try:
                for _ in chunks:
                    pass
            except httpx2.ReadTimeout:
                return None
            return time.monotonic() - began

    def test_a_revoked_keys_stream_ends(self, service: Service, address: str) -> None:
        key, secret = service.store.create_key(project="default", name="", scopes=["read"])
        url = f"{address}/v1/searches/{service.submit().id}/events/stream"
        headers = {"Authorization": f"Bearer {secret}"}

        took = self.seconds_until_it_ends(url, headers, lambda: service.store.revoke_key(key.id))

        assert took is not None
        assert took < 1.0
        assert httpx2.get(url, headers=headers).status_code == 401

    def test_an_expired_keys_stream_ends(self, service: Service, address: str) -> None:
        expires_at = utc_now() + timedelta(seconds=1.5)
        secret = key_of(service, scopes=("read",), expires_at=expires_at)
        url = f"{address}/v1/searches/{service.submit().id}/events/stream"

        took = self.seconds_until_it_ends(url, {"Authorization": f"Bearer {secret}"}, lambda: None)

        assert took is not None
        assert (utc_now() - expires_at).total_seconds() < 1.0

    def test_a_browsers_stream_ends_when_it_logs_out_and_another_browsers_does_not(self, service: Service, address: str) -> None:
        key, _ = service.store.create_key(project="default", name="", scopes=["read"])
        tokens = [service.store.begin_session(key, seconds=60) for _ in range(2)]
        url = f"{address}/v1/searches/{service.submit().id}/events/stream"

        took = self.seconds_until_it_ends(url, {"Cookie": f"nas_session={tokens[0]}"}, lambda: service.store.end_session(tokens[0]))
        other = self.seconds_until_it_ends(url, {"Cookie": f"nas_session={tokens[1]}"}, lambda: None, at_most=1.5)

        assert took is not None
        assert took < 1.0
        assert other is None

    def test_the_first_key_ends_the_streams_that_had_none(self, service: Service, address: str) -> None:
        url = f"{address}/v1/searches/{service.submit().id}/events/stream"

        took = self.seconds_until_it_ends(url, {}, lambda: key_of(service))

        assert took is not None
        assert took < 1.0

    def test_many_streams_of_one_key_cost_a_few_questions_a_second(self, service: Service, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
        secret = key_of(service)
        url = f"{address}/v1/searches/{service.submit().id}/events/stream"
        asked = []
        authenticate = service.store.authenticate_key
        monkeypatch.setattr(service.store, "authenticate_key", lambda text: asked.append(text) or authenticate(text))
        headers = {"Authorization": f"Bearer {secret}"}
        with httpx2.Client(headers=headers) as client:
            streams = [client.stream("GET", url) for _ in range(20)]
            answers = [stream.__enter__() for stream in streams]
            assert {answer.status_code for answer in answers} == {200}
            asked.clear()
            time.sleep(1.0)
            num_asked = len(asked)
            for stream in streams:
                stream.__exit__(None, None, None)

        assert 1 <= num_asked <= 6


def test_keys_and_sessions_outlive_a_restart(service: Service) -> None:
    key, secret = service.store.create_key(project="default", name="", scopes=["read"])
    token = service.store.begin_session(key, seconds=60)
    restarted = Store.open(service.settings.database_url)
    client = TestClient(create_app(store=restarted, settings=service.settings), base_url="http://127.0.0.1")

    assert client.get("/v1/searches", headers={"Authorization": f"Bearer {secret}"}).status_code == 200
    assert client.get("/v1/searches", headers={"Cookie": f"nas_session={token}"}).status_code == 200
    assert client.get("/v1/searches").status_code == 401
    restarted.close()
