"""Traces by OpenTelemetry: from the request that submitted a search to the steps that carry it out.

Off, and free, unless OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) says where spans go; the other
variables of OpenTelemetry hold as its SDK reads them. Spans name routes and types of errors, never an error's message.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, StatusCode, TracerProvider

from nas.errors import InvalidSpec, Problem
from nas.logs import find_secrets, redact

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
FLUSH_MILLISECONDS = 2000
"""A worker's process may be ended right after its step; what cannot be sent in this time is not sent."""

_lock = threading.Lock()


def set_up_tracing(environment: Mapping[str, str], *, service_name: str) -> None:
    """Send this process's spans where the environment says; nothing where it says nothing, or when it was done before.

    Args:
        service_name: what the spans are of, unless OTEL_SERVICE_NAME says otherwise.
    Raises:
        InvalidSpec: an endpoint is given, and the libraries to send spans with are not installed.
    """
    name = next((name for name in ENDPOINTS if environment.get(name)), None)
    if name is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider as SdkProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        expected = "the libraries that send spans (pip install 'nas[telemetry]')"
        raise InvalidSpec(Problem(field=name, expected=expected, got=f"an installation without {error.name}")) from error
    with _lock:
        if isinstance(trace.get_tracer_provider(), SdkProvider):
            return
        provider = SdkProvider(resource=Resource.create({"service.name": environment.get("OTEL_SERVICE_NAME") or service_name}))
        provider.add_span_processor(without_secrets())
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)


def without_secrets() -> SpanProcessor:
    """What masks secrets in the attributes with which a span begins: a query may hold anything. To be added before what exports."""
    from opentelemetry.sdk.trace import SpanProcessor

    class Mask(SpanProcessor):
        def on_start(self, span: Span, parent_context: Context | None = None) -> None:
            known = find_secrets(os.environ)
            for name, value in (span.attributes or {}).items():
                if isinstance(value, str) and (masked := redact(f"?{value}" if name == "url.query" else value, secrets=known)) != value:
                    span.set_attribute(name, masked.removeprefix("?") if name == "url.query" else masked)

        def on_end(self, span: ReadableSpan) -> None:
            """Nothing: what is set later is ours."""

    return Mask()


def current_traceparent() -> str | None:
    """The span at work in the form of the W3C header; None where nothing is traced."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent")


@contextmanager
def step_span(
    name: str, *, traceparent: str | None, attributes: Mapping[str, str | int | None], provider: TracerProvider | None = None
) -> Iterator[trace.Span]:
    """A span in the trace of the request that submitted the search, sent when it ends. Without a traceparent or an exporter it costs nothing."""
    provider = provider or trace.get_tracer_provider()
    if traceparent is None:
        yield trace.INVALID_SPAN
        return
    parent = propagate.extract({"traceparent": traceparent})
    known = {f"nas.{key}": value for key, value in attributes.items() if value is not None}
    tracer = provider.get_tracer("nas")
    try:
        with tracer.start_as_current_span(
            name, context=parent, kind=SpanKind.CONSUMER, attributes=known, record_exception=False, set_status_on_exception=False
        ) as span:
            yield span
    finally:
        if (flush := getattr(provider, "force_flush", None)) is not None:
            flush(FLUSH_MILLISECONDS)


def note_end(span: trace.Span, *, reason: str | None) -> None:
    """How a step ended: None with success."""
    span.set_attribute("nas.outcome", reason or "succeeded")
    if reason is not None:
        span.set_status(StatusCode.ERROR, reason)
