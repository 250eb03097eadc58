"""Steps as Ray tasks, on a local cluster or on one by address. The only importer of ray.

One task per step, `max_retries=0`: retries are ours, bounded and with a reason. CPU workers stay warm between steps; a GPU
step gets a process of its own (`max_calls=1` on the decorator: `.options` would not set it), so that its memory returns.
Ray's own failure detection takes a minute; the controller's leases do not wait for it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RayTaskError

from nas.settings import Settings
from workers.step import Outcome, Step, execute, read_outcome

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 * 2**20
"""Steps pass paths, never weights; Ray's default of 30 % of the memory would only take it away from training."""


class RayExecutor:
    """The Ray driver; lives in the controller's process. Losing the cluster's head ends this process (its supervisor restarts it)."""

    def __init__(self, settings: Settings) -> None:
        # Steps that use no GPU must not see one: since Ray 2.55 the list is no longer emptied for them.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING, "runtime_env": {"env_vars": environment}}
        if settings.ray_address:
            ray.init(address=settings.ray_address, **common)
        else:
            ray.init(
                address="local",  # without it Ray joins whatever cluster already runs on the machine
                num_cpus=settings.num_cpus,
                num_gpus=settings.num_gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **common,
            )
        self._on_cpu = ray.remote(num_cpus=1, max_retries=0)(execute)
        self._on_gpu = ray.remote(num_cpus=1, num_gpus=1, max_calls=1, max_retries=0)(execute)
        self._running: dict[Any, tuple[str, Step]] = {}

    def start(self, step: Step) -> None:
        task = self._on_gpu if step.gpus else self._on_cpu
        reference = task.options(num_cpus=step.cpus, num_gpus=step.gpus, name=f"{step.stage} {step.key}").remote(step)
        self._running[reference] = (step.key, step)

    def wait(self, *, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        if not self._running:
            return []
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout_seconds)
        more, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [self._settle(reference) for reference in dict.fromkeys([*ready, *more])]

    def _settle(self, reference: Any) -> tuple[str, Outcome]:
        key, step = self._running.pop(reference)
        try:
            return key, ray.get(reference, timeout=10)
        except (RayError, GetTimeoutError) as error:
            # The step may have ended its work before its worker died.
            return key, read_outcome(Path(step.folder)) or _died(error)

    def kill(self, key: str) -> None:
        for reference, (running, _) in self._running.items():
            if running == key:
                ray.cancel(reference, force=True)

    def close(self) -> None:
        for reference in self._running:
            ray.cancel(reference, force=True)
        self._running.clear()
        ray.shutdown()


def _died(error: Exception) -> Outcome:
    if isinstance(error, OutOfMemoryError):
        return Outcome(succeeded=False, reason="out_of_memory", message=str(error)[:1000])
    if isinstance(error, RayTaskError):
        return Outcome(succeeded=False, reason="error", message=str(error)[:2000])
    return Outcome(succeeded=False, reason="worker_died", message=f"{type(error).__name__}: {error}"[:1000])
