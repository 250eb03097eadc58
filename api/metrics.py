"""What Prometheus reads at /metrics: this process's requests, and what the store says of the whole service.

Figures of the store are the same from every API process (take the max of them); those of a controller's own (tokens, device
seconds, ticks) are on its port (`workers/metrics.py`), since no other process knows them.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nas.errors import StoreUnavailable
from nas.settings import Settings
from nas.store.figures import ServiceFigures
from nas.store.store import Store

STORE_SECONDS = 5.0
"""The store is asked at most once in so long, however often somebody scrapes."""
_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class RequestMetrics:
    """Counts and times of the requests of this process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("method", "route")
        self.requests = Counter("nas_http_requests", "Answered requests, by route template.", (*labels, "status"), registry=registry)
        self.seconds = Histogram("nas_http_request_seconds", "Time to a whole answer, streams left out.", labels, buckets=_LATENCY_BUCKETS, registry=registry)
        self.streams = Gauge("nas_http_event_streams", "Event streams that are open.", registry=registry)


class StoreMetrics(Collector):
    """Reads the store when it is scraped; while the store does not answer, only that is told."""

    def __init__(self, store: Store, *, settings: Settings) -> None:
        self._store, self._folder = store, settings.data_folder
        self._lock = threading.Lock()
        self._read_at: float | None = None
        self._figures: tuple[ServiceFigures, int] | None = None

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked of the store only because the registry was built."""
        return []

    def collect(self) -> Iterable[Metric]:
        found = self._read()
        yield GaugeMetricFamily("nas_store_up", "1 while the database answers.", value=0.0 if found is None else 1.0)
        if self._folder.is_dir():
            yield GaugeMetricFamily("nas_disk_free_bytes", "Free bytes of the disk that holds the data folder.", value=shutil.disk_usage(self._folder).free)
        if found is not None:
            yield from _families(*found)

    def _read(self) -> tuple[ServiceFigures, int] | None:
        with self._lock:
            if self._read_at is None or time.monotonic() - self._read_at >= STORE_SECONDS:
                try:
                    self._figures = self._store.read_figures(), len(self._store.list_controllers())
                except StoreUnavailable:
                    self._figures = None
                self._read_at = time.monotonic()
            return self._figures


def _families(figures: ServiceFigures, num_controllers: int) -> Iterable[Metric]:
    yield GaugeMetricFamily("nas_controllers", "Controllers that live.", value=num_controllers)
    yield GaugeMetricFamily("nas_oldest_queued_seconds", "Since the search that waits longest was queued.", value=figures.oldest_queued_seconds)
    searches = GaugeMetricFamily("nas_searches", "Searches by state; those queued wait for a controller.", labels=("state",))
    for state, count in figures.searches.items():
        searches.add_metric((state,), count)
    trials = GaugeMetricFamily("nas_trials", "Trials of searches that have not ended, by state.", labels=("state",))
    for trial_state, count in figures.trials.items():
        trials.add_metric((trial_state,), count)
    attempts = GaugeMetricFamily("nas_attempts", "Attempts of searches that have not ended, by stage, state and reason.", labels=("stage", "state", "reason"))
    for (stage, attempt_state, reason), count in figures.attempts.items():
        attempts.add_metric((stage, attempt_state, reason), count)
    yield from (searches, trials, attempts)
