"""`python -m workers`: the controller process. Settings come from the environment; it ends with its parent, if it was given one."""

from __future__ import annotations

import logging
import os
import signal
import sys

from nas.settings import Settings
from nas.store.store import Store
from workers.controller import Controller
from workers.executor import Executor, LocalExecutor
from workers.step import watch_parent


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    settings = Settings.from_environment(os.environ)
    settings.data_folder.mkdir(parents=True, exist_ok=True)
    if parent := os.environ.pop("NAS_PARENT_PID", None):
        watch_parent(int(parent))
    store = Store.open(settings.database_url, migrate=True)
    executor: Executor
    if settings.executor == "ray":
        from workers.ray_executor import RayExecutor

        executor = RayExecutor(settings)
    else:
        executor = LocalExecutor()
    controller = Controller(store=store, executor=executor, settings=settings)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: controller.stop())
    try:
        controller.run()
    finally:
        store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
