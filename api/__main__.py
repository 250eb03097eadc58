"""`python -m api`: read the settings, open the store, serve. It listens on loopback only, since there are no API keys yet."""

from __future__ import annotations

import ipaddress
import logging
import os
import sys
import threading
from collections.abc import Mapping

import uvicorn

from api.app import create_app
from nas.errors import InvalidSpec, Problem
from nas.logs import set_up_logging
from nas.settings import Settings
from nas.store.store import Store

logger = logging.getLogger("api")

PARENT_POLL_SECONDS = 0.5
SHUTDOWN_SECONDS = 2
"""Open event streams end by themselves only with their search; a server that is told to stop waits this long for them."""


def main() -> int:
    try:
        settings = Settings.from_environment(os.environ)
        allow_remote = remote_is_allowed(os.environ, host=settings.host)
        parent = read_parent(os.environ)
    except InvalidSpec as error:
        print(f"nas api: {error}", file=sys.stderr)
        return 2
    set_up_logging(environment=os.environ, format=settings.log_format, level=settings.log_level)
    logging.getLogger("uvicorn.error").addFilter(is_worth_telling)
    if allow_remote:
        logger.warning("NAS_ALLOW_REMOTE=1: anybody who reaches %s:%d can submit and cancel searches; there are no API keys", settings.host, settings.port)
    store = Store.open_for_service(settings.database_url, migrate=settings.migrate)
    app = create_app(store=store, settings=settings, allow_remote=allow_remote)
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=SHUTDOWN_SECONDS
    )
    server = uvicorn.Server(config)
    if parent is not None:
        threading.Thread(target=stop_with_parent, args=(server,), kwargs={"parent": parent}, daemon=True).start()
    try:
        server.run()
    finally:
        store.close()
    return 0 if server.started else 1


def is_worth_telling(record: logging.LogRecord) -> bool:
    """Whether uvicorn's message is one: open event streams are cut at every stop, which it calls an error."""
    return "timeout graceful shutdown exceeded" not in record.getMessage()


def remote_is_allowed(environment: Mapping[str, str], *, host: str) -> bool:
    """Whether the operator has opened the service to other machines.

    Raises:
        InvalidSpec: the host is not loopback, and they have not.
    """
    if environment.get("NAS_ALLOW_REMOTE") == "1":
        return True
    if not is_loopback(host):
        expected = "a loopback address (there are no API keys yet; NAS_ALLOW_REMOTE=1 serves other machines all the same)"
        raise InvalidSpec(Problem(field="NAS_HOST", expected=expected, got=host))
    return False


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
