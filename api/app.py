"""The web application: REST routes, pages, problems and the checks on every request. It opens no store and starts no server."""

from __future__ import annotations

from fastapi import FastAPI
from opentelemetry.trace import TracerProvider

from api import login, openapi, pages, routes, service
from api.auth import Authentication, FailedKeys
from api.feed import Feed
from api.guard import Guard, allowed_hosts, any_host_paths, is_single_user
from api.observer import Observer, is_probe
from api.problems import install_problem_handlers
from api.requests import RequestId
from api.threads import with_few_threads
from nas.settings import Settings
from nas.store.store import Store

API_VERSION = "1.0"
"""Of the REST interface under /v1: it grows, and keeps what it has."""


def create_app(*, store: Store, settings: Settings, tracer_provider: TracerProvider | None = None) -> FastAPI:
    """The application over an open store. Whether it needs keys, and which host names it answers to, follows from the settings.

    Args:
        tracer_provider: where its spans go; None: to the process's own (`nas/tracing.py`), if it has one.
    """
    app = FastAPI(
        lifespan=with_few_threads,
        title="nas",
        summary="Neural architecture search for compressed language models",
        description=openapi.DESCRIPTION,
        version=API_VERSION,
        openapi_tags=openapi.TAGS,
        # Both load their scripts from a CDN; `pages.py` has one that works offline.
        docs_url=None,
        redoc_url=None,
        # A span for each request. Metrics are Prometheus', and FastAPI's logs would hold the messages of exceptions.
        telemetry={"tracer_provider": tracer_provider, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False, "exclude": is_probe},
    )
    app.state.store, app.state.settings, app.state.feed = store, settings, Feed(store)
    app.state.failed_keys = FailedKeys()
    install_problem_handlers(app)
    app.include_router(routes.router)
    request_metrics = service.install(app, store=store, settings=settings)
    pages.install(app)
    login.install(app)
    # The one that is added last sees a request first.
    app.add_middleware(
        Authentication,
        store=store,
        single_user=is_single_user(settings),
        requests_per_second=settings.requests_per_second,
        failed_keys=app.state.failed_keys,
    )
    app.add_middleware(Guard, hosts=allowed_hosts(settings), any_host=any_host_paths(settings))
    app.add_middleware(Observer, metrics=request_metrics)
    app.add_middleware(RequestId)
    app.openapi = openapi.openapi_of(app)  # type: ignore[method-assign]
    return app
