from __future__ import annotations

import json
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from api.app import create_app
from nas.tracing import without_secrets
from tests.api.conftest import Service


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(service: Service, exporter: InMemorySpanExporter) -> TestClient:
    """The application, its spans in memory."""
    provider = TracerProvider()
    provider.add_span_processor(without_secrets())
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = create_app(store=service.store, settings=service.settings, tracer_provider=provider)
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


def test_a_search_keeps_the_trace_of_the_request_that_submitted_it(service: Service, traced: TestClient, exporter: InMemorySpanExporter) -> None:
    answer = traced.post("/v1/searches", content=json.dumps(service.spec()), headers={"Content-Type": "application/json"})

    assert answer.status_code == 201
    (span,) = exporter.get_finished_spans()
    assert span.context is not None
    assert span.name == "POST /v1/searches"
    traceparent = service.store.get_search(answer.json()["id"]).traceparent
    assert traceparent is not None
    assert f"{span.context.trace_id:032x}-{span.context.span_id:016x}" in traceparent


def test_an_untraced_submit_leaves_none(service: Service) -> None:
    answer = service.client.post("/v1/searches", content=json.dumps(service.spec()), headers={"Content-Type": "application/json"})

    assert service.store.get_search(answer.json()["id"]).traceparent is None


def test_no_span_holds_the_message_of_an_exception_or_a_secret_of_a_query(
    service: Service, traced: TestClient, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("postgresql://nas:hunter2hunter2@db/nas")

    monkeypatch.setattr(type(service.store), "list_teachers", fail)
    assert traced.get("/v1/teachers?key=hunter2hunter2&limit=1").status_code == 500

    spans = exporter.get_finished_spans()
    assert len(spans) == 1
    assert "hunter2" not in "".join(span.to_json() for span in spans)
    assert "limit=1" in spans[0].to_json()


def test_probes_are_not_traced(traced: TestClient, exporter: InMemorySpanExporter) -> None:
    for path in ("/healthz", "/readyz", "/metrics"):
        traced.get(path)

    assert exporter.get_finished_spans() == ()
