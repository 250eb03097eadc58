from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from nas.tracing import current_traceparent, note_end, set_up_tracing, step_span, without_secrets

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    """A process that exports into memory."""
    provider = TracerProvider()
    provider.add_span_processor(without_secrets())
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


def test_without_configuration_nothing_is_set_up_and_nothing_is_loaded() -> None:
    set_up = "import sys; from nas.tracing import set_up_tracing; set_up_tracing({}, service_name='x')"
    code = f"{set_up}; print(any('opentelemetry.sdk' in name for name in sys.modules))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"
    set_up_tracing({}, service_name="nas")
    assert not isinstance(trace.get_tracer_provider(), TracerProvider)
    assert current_traceparent() is None


def test_an_endpoint_sets_up_the_export_once_and_names_the_service() -> None:
    code = """
import os
from opentelemetry import trace
from nas.tracing import current_traceparent, set_up_tracing
set_up_tracing(os.environ, service_name="nas-api")
provider = trace.get_tracer_provider()
set_up_tracing(os.environ, service_name="nas-other")
print(provider.resource.attributes["service.name"], trace.get_tracer_provider() is provider)
with provider.get_tracer("x").start_as_current_span("y"):
    print(current_traceparent()[:3])
os._exit(0)
"""
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "PATH": "", "PYTHONPATH": ":".join(sys.path)}

    done = subprocess.run([sys.executable, "-u", "-c", code], capture_output=True, text=True, env=environment, check=True)

    assert done.stdout.split() == ["nas-api", "True", "00-"]


def test_a_step_belongs_to_the_trace_of_its_submit(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    with step_span("step rung", traceparent=TRACEPARENT, attributes={"search_id": "srch_1", "trial": 3, "rung": None}, provider=provider) as span:
        note_end(span, reason="diverged")

    (ended,) = exporter.get_finished_spans()
    assert ended.context is not None
    assert f"{ended.context.trace_id:032x}" in TRACEPARENT
    assert ended.parent is not None
    assert f"{ended.parent.span_id:016x}" in TRACEPARENT
    assert dict(ended.attributes or {}) == {"nas.search_id": "srch_1", "nas.trial": 3, "nas.outcome": "diverged"}
    assert not ended.status.is_ok


def test_a_step_without_a_trace_makes_no_span(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    with step_span("step rung", traceparent=None, attributes={}, provider=provider) as span:
        note_end(span, reason=None)

    assert exporter.get_finished_spans() == ()


def test_the_message_of_an_exception_is_in_no_span(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    with pytest.raises(RuntimeError), step_span("step rung", traceparent=TRACEPARENT, attributes={}, provider=provider):
        raise RuntimeError("postgresql://nas:hunter2hunter2@db/nas")

    assert "hunter2" not in "".join(span.to_json() for span in exporter.get_finished_spans())
