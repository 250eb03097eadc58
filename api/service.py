"""What operators and their machines ask of this process: is it alive, is it ready, which version is it, and its metrics."""

from __future__ import annotations

import logging
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import anyio
from fastapi import APIRouter, FastAPI, Request
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from api.metrics import RequestMetrics, StoreMetrics
from api.openapi import problems
from api.problems import problem_response
from api.schemas.service import Health, Readiness, VersionAnswer
from nas.errors import StoreUnavailable
from nas.settings import Settings
from nas.store.store import Store

logger = logging.getLogger(__name__)

READY_SECONDS = 1.0
"""A store that takes longer to answer is not ready."""
LIBRARIES = ("fastapi", "sqlalchemy", "optuna", "ray", "torch", "transformers", "lm-eval")

router = APIRouter(tags=["service"])


def install(app: FastAPI, *, store: Store, settings: Settings) -> RequestMetrics:
    """Add the routes and this process's registry of metrics; returns what counts its requests."""
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    registry.register(StoreMetrics(store, settings=settings))
    app.state.registry = registry
    # One look at the store at a time: probes of a store that hangs must not take every thread that there is.
    app.state.probe = anyio.CapacityLimiter(1)
    app.include_router(router)
    return RequestMetrics(registry)


@router.get("/healthz", operation_id="get_health", summary="Is the process alive?")
async def read_health() -> Health:
    """Answers as long as the process does, whatever the store is at."""
    return Health(status="ok")


@router.get("/readyz", operation_id="get_readiness", summary="Can it serve?", response_model=Readiness, responses=problems(503))
async def read_readiness(request: Request) -> object:
    """Ready when the store answers in time with the schema of this version. `degraded`: no controller lives, so searches can be submitted but wait."""
    store: Store = request.app.state.store

    def look() -> tuple[str | None, str, int]:
        found, expected = store.schema_revisions()
        return found, expected, len(store.list_controllers()) if found == expected else 0

    answer: tuple[str | None, str, int] | None = None
    with anyio.move_on_after(READY_SECONDS):
        try:
            answer = await anyio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=request.app.state.probe)
        except StoreUnavailable as error:
            logger.warning("the store does not answer", exc_info=error)
    if answer is None:
        return problem_response(request, "not-ready", detail="the store does not answer")
    found, expected, num_controllers = answer
    if found != expected:
        return problem_response(request, "not-ready", detail=f"database schema: expected revision {expected}, got {found or 'none'}; run `nas migrate`")
    return Readiness(status="ready" if num_controllers else "degraded", schema_revision=expected, controllers=num_controllers)


@router.get("/version", operation_id="get_version", summary="Which version is it?", responses=problems(503))
def read_version(request: Request) -> VersionAnswer:
    """Of the service, its schema and the libraries that are installed beside this process."""
    store: Store = request.app.state.store
    found, _ = store.schema_revisions()
    return VersionAnswer(
        version=version("nas"),
        commit=os.environ.get("NAS_COMMIT") or None,
        python=platform.python_version(),
        schema_revision=found,
        libraries={name: number for name in LIBRARIES if (number := _installed(name))},
    )


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@router.get("/metrics", operation_id="get_metrics", summary="Metrics for Prometheus", response_class=Response, include_in_schema=False)
def read_metrics(request: Request) -> Response:
    """Requests of this process and figures of the whole service, in Prometheus' text format."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)
