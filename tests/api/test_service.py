"""What operators and their machines ask: health, readiness, version, metrics; and what the log says of a request."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from nas.errors import StoreUnavailable
from nas.logs import make_formatter
from nas.store.database import VERSION_TABLE
from nas.store.machines import ControllerRecord
from nas.store.records import AttemptState, SearchState, utc_now
from tests.api.conftest import Service


@pytest.fixture
def log() -> Iterator[list[dict[str, Any]]]:
    """What the process says, as the JSON lines that it would write."""
    lines: list[dict[str, Any]] = []
    formatter = make_formatter("json", environment={})

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(formatter.format(record)))

    root, handler = logging.getLogger(), Keep()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield lines
    root.setLevel(level)
    root.removeHandler(handler)


def a_controller(service: Service) -> None:
    controller = ControllerRecord(owner="here:1", host="here", pid=1, version="0", started_at=utc_now())
    service.store.renew(controller, seconds=60.0)


def metrics(service: Service) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of /metrics, by its name and its labels."""
    answer = service.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in families for sample in family.samples}


def test_the_process_is_alive_whatever_the_store_is_at(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("read", "write", "schema_revisions"):
        monkeypatch.setattr(type(service.store), name, lambda *_, **__: pytest.fail("the store was asked"))

    assert service.client.get("/healthz").json() == {"status": "ok"}


def test_without_a_controller_it_serves_but_is_degraded(service: Service) -> None:
    before = service.client.get("/readyz")
    a_controller(service)
    after = service.client.get("/readyz")

    assert (before.status_code, before.json()["status"], before.json()["controllers"]) == (200, "degraded", 0)
    assert (after.status_code, after.json()["status"], after.json()["controllers"]) == (200, "ready", 1)


def test_it_is_not_ready_with_another_schema(service: Service) -> None:
    with service.store.write(fence=None) as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '0001'"))

    answer = service.client.get("/readyz")

    assert (answer.status_code, answer.json()["type"]) == (503, "/problems/not-ready")
    assert "got 0001" in answer.json()["detail"]


def test_a_store_that_hangs_or_is_away_is_not_ready_within_its_second(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.service.READY_SECONDS", 0.2)
    comes_back = threading.Event()
    monkeypatch.setattr(type(service.store), "schema_revisions", lambda _: comes_back.wait(60.0))
    try:
        answers = [service.client.get("/readyz") for _ in range(3)]
        assert not comes_back.is_set()
        assert {answer.status_code for answer in answers} == {503}
        assert "Retry-After" in answers[0].headers
    finally:
        comes_back.set()

    def refuse(_: Any) -> Any:
        raise StoreUnavailable("the store does not answer")

    monkeypatch.setattr(type(service.store), "schema_revisions", refuse)
    assert service.client.get("/readyz").status_code == 503


def test_the_version_names_the_schema_the_libraries_and_the_commit(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_COMMIT", "abc123")

    answer = service.client.get("/version").json()

    assert answer["commit"] == "abc123"
    assert answer["schema_revision"] == service.store.schema_revisions()[1]
    assert {"fastapi", "sqlalchemy"} <= answer["libraries"].keys()
    assert answer["version"]


def test_requests_are_counted_by_the_template_of_their_route(service: Service) -> None:
    search = service.submit()
    for _ in range(3):
        service.client.get(f"/v1/searches/{search.id}")
    service.client.get("/v1/searches/srch_unknown")
    service.client.get("/nothing/of/the/kind")
    service.client.request("BREW", "/v1/searches")

    found = metrics(service)

    route = ("route", "/v1/searches/{search_id}")
    assert found["nas_http_requests_total", (("method", "GET"), route, ("status", "200"))] == 3
    assert found["nas_http_requests_total", (("method", "GET"), route, ("status", "404"))] == 1
    assert found["nas_http_request_seconds_count", (("method", "GET"), route)] == 4
    assert found["nas_http_requests_total", (("method", "GET"), ("route", "(none)"), ("status", "404"))] == 1
    assert not any(search.id in str(key) or "BREW" in str(key) for key in found)


def test_an_event_stream_is_open_while_it_lasts_and_no_latency(service: Service) -> None:
    search = service.submit()
    service.store.request_cancel(search.id)

    service.client.get(f"/v1/searches/{search.id}/events/stream")

    found = metrics(service)
    assert found["nas_http_event_streams", ()] == 0
    assert not any(name == "nas_http_request_seconds_count" and "stream" in str(labels) for name, labels in found)
    assert any(name == "nas_http_requests_total" and "stream" in str(labels) for name, labels in found)


def test_the_metrics_tell_what_waits_runs_and_fails(service: Service) -> None:
    a_controller(service)
    service.submit()
    search = service.ranked_search()
    service.propose(search, 7)
    for reason, state in (("timeout: 30 s are over: stop", AttemptState.FAILED), ("the search ended", AttemptState.LOST), (None, AttemptState.RUNNING)):
        attempt = service.store.start_attempt(search.id, stage="rung", trial=7, rung=0, fence=None)
        if reason is not None:
            service.store.finish_attempt(attempt.id, state=state, reason=reason, fence=None)

    found = metrics(service)

    assert found["nas_store_up", ()] == 1
    assert found["nas_controllers", ()] == 1
    assert found["nas_searches", (("state", "queued"),)] == 1
    assert found["nas_searches", (("state", "searching"),)] == 1
    assert found["nas_trials", (("state", "running"),)] == 1
    assert found["nas_trials", (("state", "completed"),)] == 3
    assert found["nas_attempts", (("reason", "timeout"), ("stage", "rung"), ("state", "failed"))] == 1
    assert found["nas_attempts", (("reason", "the search ended"), ("stage", "rung"), ("state", "lost"))] == 1
    assert found["nas_attempts", (("reason", ""), ("stage", "rung"), ("state", "running"))] == 1
    assert 0 <= found["nas_oldest_queued_seconds", ()] < 60
    assert found["nas_disk_free_bytes", ()] > 0


def test_scrapes_do_not_ask_the_store_each_time_and_survive_its_absence(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.metrics.STORE_SECONDS", 60.0)
    asked: list[int] = []

    def refuse(_: Any) -> Any:
        asked.append(1)
        raise StoreUnavailable("the store does not answer")

    monkeypatch.setattr(type(service.store), "read_figures", refuse)

    found = [metrics(service) for _ in range(3)]

    assert len(asked) == 1
    assert all(one["nas_store_up", ()] == 0 for one in found)
    assert not any(name == "nas_searches" for name, _ in found[0])


def test_the_log_has_one_line_for_each_request_that_names_no_address_and_no_secret(service: Service, log: list[dict[str, Any]]) -> None:
    search = service.submit()
    key, secret = service.store.create_key(project="default", name="", scopes=["read"])
    log.clear()
    headers = {"X-Request-Id": "from-proxy", "Authorization": f"Bearer {secret}"}
    service.client.get(f"/v1/searches/{search.id}?key=hunter2hunter2", headers=headers)
    service.client.get("/healthz")

    (line,) = (line for line in log if line["logger"] == "api.access")

    assert {name: line[name] for name in ("method", "route", "status", "request_id", "level", "key")} == {
        "method": "GET",
        "route": "/v1/searches/{search_id}",
        "status": 200,
        "request_id": "from-proxy",
        "level": "info",
        "key": key.id,
    }
    assert line["ms"] > 0
    assert "hunter2" not in json.dumps(log)
    assert secret not in json.dumps(log)


def test_a_request_that_is_refused_is_told_without_what_it_showed(service: Service, log: list[dict[str, Any]]) -> None:
    _, secret = service.store.create_key(project="default", name="", scopes=["read"])
    wrong = secret[:-4] + "xxxx"

    assert service.client.get("/v1/searches", headers={"Authorization": f"Bearer {wrong}"}).status_code == 401

    assert any(line["logger"] == "api.access" and line["status"] == 401 for line in log)
    assert wrong.rpartition("_")[2] not in json.dumps(log)


def test_what_is_said_while_a_request_is_served_carries_its_name(service: Service, log: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        logging.getLogger("nas.store").warning("about to fail")
        raise RuntimeError("postgresql://nas:hunter2hunter2@db/nas")

    monkeypatch.setattr(type(service.store), "list_teachers", fail)
    answer = service.client.get("/v1/teachers", headers={"X-Request-Id": "req-7"})

    assert answer.status_code == 500
    said = {line["event"]: line for line in log if line["logger"].startswith(("nas", "api"))}
    assert said["about to fail"]["request_id"] == "req-7"
    assert said["the request failed"]["request_id"] == "req-7"
    assert "RuntimeError" in said["the request failed"]["exception"]
    assert said["GET /v1/teachers 500"]["level"] == "warning"
    assert "hunter2" not in json.dumps(log)


def test_searches_of_the_states_that_are_there_and_no_others_are_told(service: Service) -> None:
    assert {key[1][0][1] for key in metrics(service) if key[0] == "nas_searches"} == set(SearchState)
