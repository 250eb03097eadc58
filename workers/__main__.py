"""`python -m workers`: the controller process. Settings come from the environment; it ends with its parent, if it was given one."""

from __future__ import annotations

import os
import secrets
import signal
import sys

from nas.errors import Conflict, InvalidSpec
from nas.logs import set_up_logging
from nas.settings import Settings
from nas.store.store import Store
from workers.controller import Controller
from workers.executor import Executor, LocalExecutor
from workers.metrics import serve_metrics
from workers.step import watch_parent

REFUSED = 2
"""Exit code for what another start would not mend; `nas serve` then stops."""


def main() -> int:
    try:
        settings = Settings.from_environment(os.environ)
        set_up_logging(environment=os.environ, format=settings.log_format, level=settings.log_level)
        settings.data_folder.mkdir(parents=True, exist_ok=True)
        if parent := os.environ.pop("NAS_PARENT_PID", None):
            watch_parent(int(parent), exit_process=_end_group)
        store = Store.open_for_service(settings.database_url, migrate=settings.migrate)
        executor = _make_executor(settings, store=store)
    except (InvalidSpec, Conflict) as error:
        print(f"nas workers: {error}", file=sys.stderr)
        return REFUSED
    controller = Controller(store=store, executor=executor, settings=settings)
    if settings.metrics_port is not None:
        try:
            serve_metrics(settings.host, settings.metrics_port, pulse=controller.pulse)
        except OSError as error:
            executor.close()
            print(f"nas workers: NAS_METRICS_PORT: expected a free port of {settings.host}, got {settings.metrics_port} ({error.strerror})", file=sys.stderr)
            return REFUSED
    # After the executor was made: ray.init sets a handler of its own.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: controller.stop())
    try:
        controller.run()
    finally:
        store.close()
    return 0


def _end_group(code: int) -> None:
    """End with all of Ray's processes: its agents would wait a minute for a head that is gone."""
    if os.getpgrp() == os.getpid():  # `nas serve` starts this process in a group of its own
        os.killpg(0, signal.SIGKILL)
    os._exit(code)


def _make_executor(settings: Settings, *, store: Store) -> Executor:
    if settings.executor == "local":
        return LocalExecutor()
    # Before ray is imported, which is when Ray reads its mode.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if settings.ray_address is None:
        # A token of this process's own, for the local cluster. Without it Ray keeps one in the user's home, readable for everybody,
        # and warns about it at every start.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from workers.ray_executor import RayExecutor

    return RayExecutor(settings, save_node=store.save_node)


if __name__ == "__main__":
    sys.exit(main())
