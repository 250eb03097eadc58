"""A cluster of several nodes on this machine, each with an environment, a temporary folder and copies of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workers.outcome import Outcome
from workers.step import Step


@contextmanager
def ray_cluster() -> Iterator[Any]:
    """A head without cores, to which nodes are added by `add_node`; nothing of it is left afterwards."""
    from ray.cluster_utils import Cluster

    # A node that is killed is known to be dead after seconds instead of a quarter of a minute.
    impatient = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}
    quiet = {"object_store_memory": 80 * 2**20, "include_dashboard": False, "_system_config": impatient}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, **quiet})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Any, folder: Path, *, num_cpus: int = 1, **environment: str) -> Any:
    """A node whose processes see `folder` as their home, for copies and for temporary files."""
    for name in ("tmp", "home", "cache"):
        (folder / name).mkdir(parents=True)
    own = {"TMPDIR": str(folder / "tmp"), "HOME": str(folder / "home"), "NAS_CACHE": str(folder / "cache")}
    return cluster.add_node(num_cpus=num_cpus, num_gpus=0, object_store_memory=80 * 2**20, env_vars={**own, **environment})


def nap(step: Step) -> Outcome:
    """A step that sleeps and says where, also when it begins."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    Path(step.folder).mkdir(parents=True, exist_ok=True)
    (Path(step.folder) / step.key).write_text(node)
    time.sleep(step.request["seconds"])
    return Outcome(succeeded=True, result={"node": node})


NAP = f"{__name__}:nap"
