"""Addresses, host names and other sites' pages. What holds of one request's Host in single-user mode is in test_problems.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from api.auth import needed_scope
from api.guard import allowed_hosts, check_exposure, is_loopback, is_single_user
from nas.errors import InvalidSpec
from nas.settings import Settings
from nas.store.records import SearchState
from tests.api.conftest import Service
from tests.api.test_problems import assert_problem


def settings(**variables: str) -> Settings:
    return Settings.from_environment({"NAS_DATA": "/tmp/never-made", **variables})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_a_loopback_address_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    check_exposure(settings(NAS_HOST=host), has_keys=False)
    assert is_single_user(settings(NAS_HOST=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org"])
def test_any_other_address_is_refused_without_keys(host: str) -> None:
    assert not is_single_user(settings(NAS_HOST=host))
    with pytest.raises(InvalidSpec, match=r"NAS_HOST: expected .* no API key; make one with `nas keys create`, got"):
        check_exposure(settings(NAS_HOST=host, NAS_ALLOWED_HOSTS="nas.example.org"), has_keys=False)


def test_a_service_behind_a_proxy_on_loopback_needs_keys_too() -> None:
    exposed = settings(NAS_ALLOWED_HOSTS="nas.example.org")

    assert not is_single_user(exposed)
    with pytest.raises(InvalidSpec, match="NAS_ALLOWED_HOSTS"):
        check_exposure(exposed, has_keys=False)
    check_exposure(exposed, has_keys=True)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_service_on_every_address_must_know_its_names(host: str) -> None:
    with pytest.raises(InvalidSpec, match="NAS_ALLOWED_HOSTS: expected the names"):
        check_exposure(settings(NAS_HOST=host), has_keys=True)


def test_the_api_itself_does_not_start_where_others_reach_it_without_keys(tmp_path: Path) -> None:
    environment = {**os.environ, "NAS_DATA": str(tmp_path), "NAS_HOST": "0.0.0.0"}

    done = subprocess.run([sys.executable, "-m", "api"], env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 2  # `nas serve` does not try again
    assert "NAS_HOST: expected a service that only this machine reaches" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_answers_to_loopback_names_its_own_address_and_those_it_is_told() -> None:
    assert allowed_hosts(settings()) == {"127.0.0.1", "localhost", "::1"}
    assert allowed_hosts(settings(NAS_HOST="10.0.0.1")) == {"127.0.0.1", "localhost", "::1", "10.0.0.1"}
    assert allowed_hosts(settings(NAS_HOST="0.0.0.0", NAS_ALLOWED_HOSTS="NAS.example.org")) == {"127.0.0.1", "localhost", "::1", "nas.example.org"}


@pytest.mark.parametrize("names", ["nas.example.org:8400", "*", "https://nas.example.org", "a b", "-a", "nas_example"])
def test_what_is_no_host_name_is_refused(names: str) -> None:
    with pytest.raises(InvalidSpec, match="NAS_ALLOWED_HOSTS"):
        settings(NAS_ALLOWED_HOSTS=names)


@pytest.mark.parametrize("host", ["evil.example", "10.0.0.2", "nas.example.org.evil.example", ""])
def test_with_keys_another_host_name_is_refused_too_even_with_the_right_key(service: Service, host: str, tmp_path: Path) -> None:
    _, secret = service.store.create_key(project="default", name="", scopes=["read"])
    remote = settings(NAS_HOST="0.0.0.0", NAS_ALLOWED_HOSTS="nas.example.org")
    client = TestClient(create_app(store=service.store, settings=remote), base_url="http://nas.example.org")
    headers = {"Authorization": f"Bearer {secret}"}

    assert client.get("/v1/teachers", headers=headers).status_code == 200
    assert_problem(client.get("/v1/teachers", headers={**headers, "Host": host}), "bad-request")


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_a_probe_may_ask_by_any_address(service: Service, path: str) -> None:
    assert service.client.get(path, headers={"Host": "10.1.2.3:8400"}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:9999", "http://127.0.0.1.evil.example", "http://127.0.0.1@evil.example", "x"]
)
def test_a_request_from_another_origin_changes_nothing(service: Service, origin: str) -> None:
    search = service.submit()

    answer = service.client.post(f"/v1/searches/{search.id}/cancel", headers={"Origin": origin})

    assert answer.status_code == 403
    assert_problem(answer, "cross-site")
    assert service.store.get_search(search.id).state is SearchState.QUEUED


@pytest.mark.parametrize("origin", ["http://127.0.0.1", "https://127.0.0.1"])  # a proxy may have ended TLS
def test_the_services_own_pages_may_change_something(service: Service, origin: str) -> None:
    search = service.submit()

    assert service.client.post(f"/v1/searches/{search.id}/cancel", headers={"Origin": origin}).status_code == 202


def test_prometheus_may_ask_by_any_address_with_a_key_and_on_loopback_only_by_its_name(service: Service) -> None:
    remote = TestClient(create_app(store=service.store, settings=settings(NAS_HOST="10.0.0.1")), base_url="http://10.1.2.3")

    assert service.client.get("/metrics", headers={"Host": "evil.example"}).status_code == 400
    assert remote.get("/metrics").status_code == 401
    _, secret = service.store.create_key(project="default", name="prometheus", scopes=["admin"])
    assert remote.get("/metrics", headers={"Authorization": f"Bearer {secret}"}).status_code == 200


def test_every_answer_has_the_security_headers(service: Service) -> None:
    for path in ("/", "/v1/teachers", "/v1/nothing", "/login", "/static/style.css"):
        headers = service.client.get(path).headers
        assert "script-src" not in headers["content-security-policy"]  # scripts fall back to default-src 'self': nothing inline
        assert headers["content-security-policy"].startswith("default-src 'self'; ")
        assert "unsafe" not in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_only_pages_with_figures_let_a_style_in(service: Service) -> None:
    policy = service.client.get(f"/searches/{service.submit().id}").headers["content-security-policy"]

    assert re.findall(r"[\w-]+-src [^;]*unsafe[^;]*", policy) == ["style-src 'self' 'unsafe-inline'"]


def test_cookies_of_others_are_not_even_read(service: Service) -> None:
    """Python before 3.11.10 takes seconds to take such a one out of its quotes, for every request and before any key is asked for."""
    began = time.process_time()
    answer = service.client.get("/healthz", headers={"Cookie": 'a="' + "\\" * 60_000 + '"; nas_session="' + "\\" * 60_000 + '"'})

    assert answer.status_code == 200
    assert time.process_time() - began < 2


def test_the_session_is_found_among_cookies_of_others(service: Service) -> None:
    key, _ = service.store.create_key(project="default", name="", scopes=["read"])
    session = service.store.begin_session(key, seconds=60)

    for cookies in (f"nas_session={session}", f'theme="dark"; nas_session={session}; other=1', f"x;nas_session={session}"):
        assert service.client.get("/v1/searches", headers={"Cookie": cookies}).status_code == 200
    assert service.client.get("/v1/searches", headers={"Cookie": f"not_nas_session={session}"}).status_code == 401


def test_what_a_path_needs_is_asked_of_the_path_that_is_served() -> None:
    assert needed_scope("GET", "/metrics") == "admin"
    assert needed_scope("HEAD", "/metrics") == "admin"
    assert needed_scope("POST", "/logout\t") == "submit"
