"""The web application: REST routes, pages, problems and the checks on every request. It opens no store and starts no server."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request

from api import login, openapi, pages, routes
from api.auth import Authentication, FailedKeys
from api.feed import Feed
from api.guard import Guard, allowed_hosts, is_single_user
from api.problems import install_problem_handlers, problem_response
from api.requests import RequestId
from api.schemas.common import Health
from nas.settings import Settings
from nas.store.store import Store

logger = logging.getLogger(__name__)

API_VERSION = "1.0"
"""Of the REST interface under /v1: it grows, and keeps what it has."""


def create_app(*, store: Store, settings: Settings) -> FastAPI:
    """The application over an open store. Whether it needs keys, and which host names it answers to, follows from the settings."""
    app = FastAPI(
        title="nas",
        summary="Neural architecture search for compressed language models",
        description=openapi.DESCRIPTION,
        version=API_VERSION,
        openapi_tags=openapi.TAGS,
        # Both load their scripts from a CDN; `pages.py` has one that works offline.
        docs_url=None,
        redoc_url=None,
    )
    app.state.store, app.state.settings, app.state.feed = store, settings, Feed(store)
    app.state.failed_keys = FailedKeys()
    install_problem_handlers(app)
    app.include_router(routes.router)
    app.add_api_route(
        "/healthz", read_health, tags=["service"], operation_id="get_health", summary="Is the process alive?", response_model=Health, methods=["GET"]
    )
    app.add_api_route(
        "/readyz",
        read_readiness,
        tags=["service"],
        operation_id="get_readiness",
        summary="Does the store answer?",
        response_model=Health,
        methods=["GET"],
        responses=openapi.problems(503),
    )
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
    app.add_middleware(Guard, hosts=allowed_hosts(settings))
    app.add_middleware(RequestId)
    app.openapi = openapi.openapi_of(app)  # type: ignore[method-assign]
    return app


def read_health() -> Health:
    """Answers as long as the process does."""
    return Health(status="ok")


def read_readiness(request: Request) -> object:
    """Ready when the store answers a query."""
    try:
        request.app.state.store.active_states()
    except Exception as error:  # whatever the database throws means the same here: not ready
        logger.warning("the store does not answer", exc_info=error)
        return problem_response(request, "not-ready", detail="the store does not answer")
    return Health(status="ready")
