"""What it costs to hand a step to a worker: searches of steps that only sleep, through the real controller, store and Ray, on several local nodes.

A worker is idle between the end of one step and the beginning of the next: the result must come back, be recorded and decided on, and the next step
be proposed, sent and begun. Goal: workers busy at least 95 % of the time with steps of 5 seconds. Also one-thread training side by side, one process
a core: tokens a second of all of them against those of one alone, which is what the machine's memory leaves of its cores.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nas.settings import Settings
from nas.spec import dump_spec, parse_spec
from nas.store.store import Store
from tests.simulation.cluster import pretended_result
from tests.simulation.simulator import INPUTS, make_spec
from workers.controller import Controller
from workers.outcome import RESULT, Outcome
from workers.step import PROGRESS, Step

GOAL, GOAL_SECONDS = 0.95, 5.0
NUM_NODES, CPUS_PER_NODE = 2, 4
STEPS_PER_WORKER = 6

console = Console(width=120)


def bench() -> bool:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, _ray_cluster() as address:
        table = Table("seconds of a step", "steps", "until all workers work, s", "idle between two steps, s", "workers busy", "goal", box=None)
        for index, seconds in enumerate((0.5, 2.0, GOAL_SECONDS)):
            started = time.time()
            spans = _search(Path(folder) / str(index), address=address, seconds=seconds)
            full, gap, busy = _idle(spans)
            goal = f">= {GOAL:.0%}" if seconds == GOAL_SECONDS else ""
            table.add_row(f"{seconds:g}", str(len(spans)), f"{full - started:.1f}", f"{gap:.3f}", f"{busy:.1%}", goal)
    console.print(f"{NUM_NODES} nodes of {CPUS_PER_NODE} workers, SQLite")
    console.print(table)
    _print_cores()
    return True


@contextmanager
def _ray_cluster() -> Iterator[str]:
    """A cluster of several nodes on this machine; its address."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # before ray is imported; it listens on this machine alone
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS_PER_NODE, "num_gpus": 0, "object_store_memory": 128 * 2**20})
    try:
        for _ in range(NUM_NODES - 1):
            cluster.add_node(num_cpus=CPUS_PER_NODE, num_gpus=0, object_store_memory=128 * 2**20)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


def _search(folder: Path, *, address: str, seconds: float) -> list[tuple[float, float]]:
    """When workers slept (began, ended), in a search whose every rung takes as long."""
    from workers.ray_executor import RayExecutor

    num_workers = NUM_NODES * CPUS_PER_NODE
    environment = {"NAS_DATA": str(folder), "NAS_RAY_ADDRESS": address, "NAS_RAY_INSECURE": "1"}
    settings = dataclasses.replace(Settings.from_environment(environment), num_gpus=0)
    store = Store.open(settings.database_url, migrate=True)
    values = make_spec(num_trials=num_workers * STEPS_PER_WORKER, num_workers=num_workers, label=str(seconds), rungs={"num_trained": 1})
    spec = parse_spec(json.dumps({**values, "controls": {"num_random": 0}}))
    search_id = store.create_search(spec=dump_spec(spec), inputs=INPUTS, plan={}, label="").id
    executor = RayExecutor(settings, save_node=store.save_node, work="tests.benchmarks.dispatch:sleep")
    controller = Controller(store=store, executor=executor, settings=settings)
    while not store.get_search(search_id).state.is_terminal:
        controller.tick()
        if sum(1 for _ in folder.glob("spans/*")) >= num_workers * STEPS_PER_WORKER:
            break
    controller.stop()
    controller.run()
    store.close()
    return sorted((span["began"], span["ended"]) for file in folder.glob("spans/*") for span in [json.loads(file.read_text(encoding="utf-8"))])


def sleep(step: Step) -> Outcome:
    """A step as `workers.step.execute` runs it, that sleeps where that one works."""
    began, folder = time.time(), Path(step.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROGRESS).write_text(json.dumps({"host": "", "pid": os.getpid()}) + "\n", encoding="utf-8")
    if step.stage == "rung":
        time.sleep(float(step.request["spec"]["label"]))
    outcome = Outcome(succeeded=True, result=pretended_result(step))
    (folder / RESULT).write_text(json.dumps(outcome.as_dict()), encoding="utf-8")
    if step.stage == "rung":
        spans = folder.parents[3] / "spans"
        spans.mkdir(exist_ok=True)
        (spans / step.key).write_text(json.dumps({"began": began, "ended": time.time()}), encoding="utf-8")
    return outcome


def _idle(spans: list[tuple[float, float]]) -> tuple[float, float, float]:
    """From the moment when every worker has a step to the beginning of the last: that moment, idle seconds for each step, and the share of the time slept."""
    num_workers = NUM_NODES * CPUS_PER_NODE
    start, end = spans[num_workers - 1][0], spans[-1][0]
    slept = sum(max(min(ended, end) - max(began, start), 0.0) for began, ended in spans)
    whole = num_workers * (end - start)
    return start, (whole - slept) / (len(spans) - num_workers), slept / whole


def _print_cores() -> None:
    """Tokens a second of one-thread training in as many processes as there are cores, against one."""
    cores = len(os.sched_getaffinity(0))
    alone = sum(_train(1))
    table = Table("processes", "tokens/s of all", "times one alone", box=None)
    for count in sorted({1, max(cores // 2, 1), cores}):
        speeds = _train(count) if count > 1 else [alone]
        table.add_row(str(count), f"{sum(speeds):,.0f}", f"{sum(speeds) / alone:.2f}")
    console.print(f"one-thread training, {cores} cores (load before: {os.getloadavg()[0]:.1f})")
    console.print(table)


def _train(num_processes: int) -> list[float]:
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        return pool.map(train_alone, range(num_processes), chunksize=1)


def train_alone(seed: int, *, seconds: float = 6.0) -> float:
    """Tokens a second of distilling a small student in this process, on one thread."""
    import torch

    from tests.compress.training_values import SEQUENCE_LENGTH, tiny_model

    torch.set_num_threads(1)
    student, teacher = tiny_model(seed=seed, hidden_size=256), tiny_model(seed=seed + 100, hidden_size=256)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    ids_BT = torch.randint(0, 40, (16, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(seed))
    tokens, started = 0, time.perf_counter()
    while (took := time.perf_counter() - started) < seconds:
        with torch.no_grad():
            wanted = teacher(ids_BT).logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(student(ids_BT).logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens += ids_BT.numel()
    return tokens / took
