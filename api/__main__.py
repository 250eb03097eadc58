"""`python -m api`: read the settings, open the store, serve. Where others can reach it, only with API keys."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Mapping

import uvicorn

from api.app import create_app
from api.guard import check_exposure
from api.server import make_server
from nas.compress.heap import use_few_arenas
from nas.errors import InvalidSpec, Problem
from nas.logs import set_up_logging
from nas.settings import Settings
from nas.store.store import Store
from nas.tracing import set_up_tracing

logger = logging.getLogger("api")

PARENT_POLL_SECONDS = 0.5


def main() -> int:
    use_few_arenas()
    try:
        settings = Settings.from_environment(os.environ)
        parent = read_parent(os.environ)
        set_up_logging(environment=os.environ, format=settings.log_format, level=settings.log_level)
        logging.getLogger("uvicorn.error").addFilter(is_worth_telling)
        set_up_tracing(os.environ, service_name="nas-api")
        store = Store.open_for_service(settings.database_url, migrate=settings.migrate)
        check_exposure(settings, has_keys=store.has_keys())
    except InvalidSpec as error:
        print(f"nas api: {error}", file=sys.stderr)
        return 2
    app = create_app(store=store, settings=settings)
    server = make_server(app, host=settings.host, port=settings.port)
    if parent is not None:
        threading.Thread(target=stop_with_parent, args=(server,), kwargs={"parent": parent}, daemon=True).start()
    try:
        server.run()
    finally:
        store.close()
    return 0 if server.started else 1


def is_worth_telling(record: logging.LogRecord) -> bool:
    """Whether uvicorn's message is one: it calls the cut of open event streams at a stop an error, and what a request raised is told already."""
    return not any(known in record.getMessage() for known in ("timeout graceful shutdown exceeded", "Exception in ASGI application"))


def read_parent(environment: Mapping[str, str]) -> int | None:
    """The process with which this one ends; None if it stands alone."""
    text = environment.get("NAS_PARENT_PID")
    if not text:
        return None
    if not text.isdecimal():
        raise InvalidSpec(Problem(field="NAS_PARENT_PID", expected="a process id", got=text))
    return int(text)


def stop_with_parent(server: uvicorn.Server, *, parent: int) -> None:
    """Ends the server once its parent is gone: a child whose parent was killed belongs to another process."""
    wait = threading.Event()
    while os.getppid() == parent:
        wait.wait(PARENT_POLL_SECONDS)
    logger.warning("the parent process %d is gone; stopping", parent)
    server.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
