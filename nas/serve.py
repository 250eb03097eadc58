"""`nas serve`: the API and the controller as child processes of one supervisor. It imports neither.

A child that dies is started again, later each time; when the supervisor is asked to stop, or is killed, both end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

from nas.errors import InvalidSpec, Problem
from nas.settings import Settings

logger = logging.getLogger(__name__)

CHILDREN = ("api", "workers")
FIRST_DELAY_SECONDS = 0.5
MAX_DELAY_SECONDS = 30.0
STEADY_SECONDS = 60.0
"""A child that ran for so long is started again without delay when it dies."""
GRACE_SECONDS = 15.0
REFUSED = 2
"""Exit code of a child whose settings are wrong; starting it again would not help."""


@dataclass(slots=True)
class _Child:
    module: str
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    delay: float = 0.0
    due: float = 0.0


def check_port(settings: Settings) -> None:
    """Whether the API can listen where it is told to; its own failure would only be seen as a child that dies again and again.

    Raises:
        InvalidSpec: another program listens there, or the address is none of this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise InvalidSpec(Problem(field="NAS_HOST, NAS_PORT", expected="an address that nobody else listens on", got=f"{where} ({error.strerror})")) from error


def serve() -> int:
    """Run until a signal; returns the exit code."""
    stopping: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: stopping.append(number))
    children = [_Child(module) for module in CHILDREN]
    try:
        while not stopping:
            for child in children:
                if (code := _tend(child)) is not None:
                    return code
            time.sleep(0.1)
    finally:
        _stop(children)
    return 0


def _tend(child: _Child) -> int | None:
    """Start a child that should run and does not. An exit code when the service cannot go on."""
    now = time.monotonic()
    if child.process is not None:
        code = child.process.poll()
        if code is None:
            return None
        if code == REFUSED:
            return REFUSED
        _kill_group(child.process)  # what a killed controller leaves behind, Ray's agents among it
        ran = now - child.started
        child.delay = FIRST_DELAY_SECONDS if ran > STEADY_SECONDS else min(MAX_DELAY_SECONDS, 2 * child.delay or FIRST_DELAY_SECONDS)
        child.due = now + child.delay
        child.process = None
        logger.warning(
            "%s ended with code %s, starting it again in %.1f s", child.module, code, child.delay, extra={"action": "restart", "child": child.module}
        )
    if now >= child.due:
        environment = {**os.environ, "NAS_PARENT_PID": str(os.getpid())}
        # A session of its own: Ctrl-C reaches the supervisor alone, which then stops the children in order.
        child.process = subprocess.Popen([sys.executable, "-m", child.module], env=environment, start_new_session=True)
        child.started = now
    return None


def _stop(children: list[_Child]) -> None:
    for child in children:
        if child.process is not None and child.process.poll() is None:
            child.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        if child.process is None:
            continue
        try:
            child.process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning("%s did not stop, killing it", child.module, extra={"action": "kill", "child": child.module})
            _kill_group(child.process)
            child.process.wait()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a child's session once the child itself is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
