from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from api.auth import FAILURES_AT_ONCE
from api.login import _own_path
from tests.api.conftest import Service
from tests.api.test_problems import assert_problem

PAGE = {"Accept": "text/html"}


@pytest.fixture
def secret(service: Service) -> str:
    return service.store.create_key(project="default", name="", scopes=["read", "submit"])[1]


@pytest.fixture
def browser(service: Service, secret: str) -> TestClient:
    return TestClient(service.client.app, base_url="http://127.0.0.1", headers=PAGE, follow_redirects=False)


def test_a_page_leads_to_the_login_and_back(service: Service, browser: TestClient, secret: str) -> None:
    path = f"/searches/{service.submit().id}?budget=0"

    sent = browser.get(path)
    assert (sent.status_code, sent.headers["location"]) == (303, "/login?next=" + quote(path, safe=""))
    form = browser.get(sent.headers["location"])
    assert f'value="{path}"' in form.text
    done = browser.post("/login", data={"key": f" {secret}\n", "next": path})

    assert (done.status_code, done.headers["location"]) == (303, path)
    page = browser.get(path)
    assert page.status_code == 200
    assert "Log out" in page.text


def test_the_api_itself_is_a_401_for_a_browser_too(browser: TestClient) -> None:
    assert_problem(browser.get("/v1/searches"), "unauthorized")


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(service: Service, browser: TestClient, secret: str) -> None:
    plain = browser.post("/login", data={"key": secret}).headers["set-cookie"]
    https = TestClient(service.client.app, base_url="https://127.0.0.1", follow_redirects=False)
    secure = https.post("/login", data={"key": secret}).headers["set-cookie"]

    assert plain.startswith("nas_session=")
    assert secure.startswith("__Host-nas_session=")
    assert {part.strip().lower() for part in plain.split(";")[1:]} == {"httponly", "samesite=strict", "path=/", "max-age=43200"}
    assert {part.strip().lower() for part in secure.split(";")[1:]} == {"httponly", "samesite=strict", "path=/", "max-age=43200", "secure"}
    assert secret not in plain + secure


def test_logging_out_ends_the_session_itself_and_not_only_the_cookie(browser: TestClient, secret: str) -> None:
    browser.post("/login", data={"key": secret})
    token = browser.cookies["nas_session"]
    assert browser.get("/").status_code == 200

    done = browser.post("/logout")

    assert (done.status_code, done.headers["location"]) == (303, "/login")
    assert 'nas_session=""' in done.headers["set-cookie"]
    assert browser.get("/", headers={"Cookie": f"nas_session={token}"}).status_code == 303


def test_a_page_is_not_kept_for_the_back_button_after_logging_out(browser: TestClient, secret: str) -> None:
    browser.post("/login", data={"key": secret})

    assert browser.get("/").headers["cache-control"] == "no-store"
    assert browser.get("/docs").headers["cache-control"] == "no-store"


def test_a_wrong_key_begins_no_session_and_is_not_repeated(browser: TestClient) -> None:
    wrong = "nas_000000000000_" + "Z" * 43

    answer = browser.post("/login", data={"key": wrong})

    assert answer.status_code == 401
    assert "not one of this service" in answer.text
    assert "set-cookie" not in answer.headers
    assert wrong not in answer.text


def test_whoever_tries_too_many_keys_waits(browser: TestClient) -> None:
    answers = [browser.post("/login", data={"key": "wrong"}) for _ in range(int(FAILURES_AT_ONCE) + 1)]

    assert [answer.status_code for answer in answers] == [401] * int(FAILURES_AT_ONCE) + [429]
    assert int(answers[-1].headers["retry-after"]) >= 1


@pytest.mark.parametrize("body", [b"", b"key", b"\xff\xfe", b"key=" + b"x" * 10_000, b"&".join(b"a=%d" % index for index in range(100)), b"key=%ff%00"])
def test_a_form_that_is_none_is_a_wrong_key(browser: TestClient, body: bytes) -> None:
    assert browser.post("/login", content=body).status_code == 401


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
@pytest.mark.parametrize("path", ["/login", "/logout"])
def test_another_site_can_neither_log_in_nor_out(browser: TestClient, secret: str, path: str, origin: str) -> None:
    browser.post("/login", data={"key": secret})

    answer = browser.post(path, data={"key": secret}, headers={"Origin": origin})

    assert answer.status_code == 403
    assert browser.get("/").status_code == 200


@pytest.mark.parametrize(
    "next",
    [
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "/\t/evil.example",
        "/%0a//evil.example\n",
        "javascript:alert(1)",
        "",
        "evil",
        "/ /evil",
        "/é",
    ],
)
def test_after_the_login_nobody_is_led_elsewhere(browser: TestClient, secret: str, next: str) -> None:
    answer = browser.post("/login", data={"key": secret, "next": next})

    assert answer.headers["location"] == "/"
    assert 'value="/"' in browser.get("/login", params={"next": next}).text


@given(st.text(max_size=40))
def test_any_next_is_a_path_of_this_service(text: str) -> None:
    path = _own_path(text)

    assert re.fullmatch(r"/([^/\\\s].*)?", path)


def test_in_single_user_mode_there_is_nothing_to_log_out_of(service: Service) -> None:
    page = service.client.get("/", headers=PAGE)

    assert page.status_code == 200
    assert "Log out" not in page.text


def test_a_session_of_one_project_is_not_let_into_another(service: Service, browser: TestClient) -> None:
    service.store.create_project("theirs")
    browser.post("/login", data={"key": service.store.create_key(project="theirs", name="", scopes=["read"])[1]})
    search = service.submit()

    assert browser.get(f"/searches/{search.id}").status_code == 404
    assert search.id not in browser.get("/").text
    assert browser.post(f"/v1/searches/{search.id}/cancel").status_code == 403  # no scope `submit`
