"""A controller's own figures for Prometheus, and whether it is alive, on a port of its own (NAS_METRICS_PORT).

What every process can read from the store is shown by the API (`api/metrics.py`); here is what only the controller that does
the work knows. Not through the store: a figure that is scraped every few seconds would be a write every few seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, PlatformCollector, ProcessCollector, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

logger = logging.getLogger(__name__)

ALIVE_SECONDS = 60.0
"""A controller whose loop has not come round for so long hangs: it is to be started again."""
_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

REGISTRY = CollectorRegistry()
for _collector in (ProcessCollector, PlatformCollector, GCCollector):
    _collector(registry=REGISTRY)

ATTEMPTS_ENDED = Counter("nas_attempts_ended", "Attempts that ended, by stage, state and reason.", ("stage", "state", "reason"), registry=REGISTRY)
DEVICE_SECONDS = Counter("nas_device_seconds", "Seconds of attempts times their devices (GPUs, or CPU cores).", ("stage",), registry=REGISTRY)
DISPATCH_SECONDS = Histogram("nas_dispatch_seconds", "From handing a step to the executor to its first sign of life.", buckets=_BUCKETS, registry=REGISTRY)
TICK_SECONDS = Histogram("nas_tick_seconds", "One round of the controller, waiting left out.", buckets=_BUCKETS, registry=REGISTRY)
TAKEOVERS = Counter("nas_takeovers", "Searches taken over whose last controller left steps running.", registry=REGISTRY)
LEASES_LOST = Counter("nas_leases_lost", "Leases of this controller that it did not renew in time, and another one has.", registry=REGISTRY)
TOKENS_PER_SECOND = Gauge("nas_tokens_per_second", "Trained tokens per second of all steps that run, as they last said.", registry=REGISTRY)
RUNNING_STEPS = Gauge("nas_running_steps", "Steps in flight, waiting ones included, by stage.", ("stage",), registry=REGISTRY)
HELD_SEARCHES = Gauge("nas_held_searches", "Searches that this controller leads.", registry=REGISTRY)

STAGES = ("prepare", "rung", "confirm", "bundle")


def note_running(steps: Iterable[tuple[str, float]], *, num_searches: int) -> None:
    """What is in flight now.

    Args:
        steps: stage and tokens per second (0 where it has said none) of each.
    """
    counts, tokens = dict.fromkeys(STAGES, 0), 0.0
    for stage, tokens_per_second in steps:
        counts[stage] = counts.get(stage, 0) + 1
        tokens += tokens_per_second
    for stage, count in counts.items():
        RUNNING_STEPS.labels(stage=stage).set(count)
    TOKENS_PER_SECOND.set(tokens)
    HELD_SEARCHES.set(num_searches)


class Pulse:
    """When the controller's loop came round last."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = clock()

    def beat(self) -> None:
        self._at = self._clock()

    def is_alive(self) -> bool:
        return self._clock() - self._at < ALIVE_SECONDS


def serve_metrics(host: str, port: int, *, pulse: Pulse) -> WSGIServer:
    """Serve `/metrics` and `/healthz` from a thread of this process; `shutdown()` of the answer ends it.

    Raises:
        OSError: the port is taken, or the address is none of this machine's.
    """
    metrics = make_wsgi_app(REGISTRY)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                return metrics(environ, start_response)  # type: ignore[no-any-return]
            case "/healthz" if pulse.is_alive():
                status, text = "200 OK", b"alive\n"
            case "/healthz":
                status, text = "503 Service Unavailable", b"the controller's loop hangs\n"
            case _:
                status, text = "404 Not Found", b"/metrics and /healthz are here\n"
        start_response(status, [("Content-Type", "text/plain")])
        return [text]

    server = make_server(host, port, answer, ThreadingWSGIServer, handler_class=_QuietHandler)
    threading.Thread(target=server.serve_forever, daemon=True, name="metrics").start()
    logger.info("metrics at http://%s:%d/metrics", host, server.server_port, extra={"action": "serve_metrics"})
    return server


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is nothing to tell."""
