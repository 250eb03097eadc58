"""A small search through the running service: seconds per trial by step, and the share of the workers' time in which nothing is distilled or evaluated.

On the demo's teacher, corpus and tasks, which are made first where `make demo` has not made them yet.
"""

from __future__ import annotations

import tempfile
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from nas.demo.__main__ import make_inputs
from nas.registration import register_corpus, register_tasks, register_teacher
from nas.store.store import Store
from tests.benchmarks.service import bench_settings, run_search, serving

CORES = 2

console = Console(width=120)


def bench() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        _search(Path(folder), cores=CORES)
    return True


def _search(folder: Path, *, cores: int) -> None:
    environment, settings = bench_settings(folder, cores=cores)
    inputs = make_inputs()
    store = Store.open(settings.database_url, migrate=True)
    register_teacher(str(inputs / "teacher"), name="bench", store=store, settings=settings)
    register_corpus([str(inputs / "corpus")], name="bench", store=store, settings=settings)
    tasks = register_tasks(str(inputs / "tasks"), dataset_path=None, store=store, settings=settings)
    store.close()
    spec = {
        "teacher": "bench",
        "corpus": {"parts": [{"name": "bench"}], "sequence_length": 128, "calibration_tokens": 16_384, "validation_tokens": 8_192},
        "tasks": [{"name": task.name} for task in tasks],
        "budget": {"max_fraction": 0.6},
        "sampler": {"max_trials": 8, "num_startup_trials": 4},
        "rungs": {"first_tokens": 50_000, "factor": 2, "num_trained": 2},
        "evaluation": {"documents_per_task": 150, "held_out_documents": 150},
        "distillation": {"learning_rate": 1e-3, "batch_size": 4},
        "resources": {"max_parallel_trials": cores},
    }
    times: dict[str, float] = {}

    def note(event: dict[str, Any]) -> None:
        if event["type"].startswith("search."):
            times[event["type"]] = datetime.fromisoformat(event["created_at"]).timestamp()

    with serving(environment, log=folder / "serve.log") as client:
        search_id = run_search(client, spec, on_event=note)
        board, trials = client.leaderboard(search_id), client.trials(search_id)
        details = [client.trial(search_id, trial["number"]) for trial in trials]
    _print_search(board, details=details, times=times, cores=cores)


def _print_search(board: dict[str, Any], *, details: list[dict[str, Any]], times: dict[str, float], cores: int) -> None:
    rungs = [rung for detail in details for rung in detail["rungs"]]
    steps = sorted({step for rung in rungs for step in rung["seconds"]})
    table = Table("seconds by step (median)", *steps, "rungs", box=None)
    for number in sorted({rung["rung"] for rung in rungs}):
        of_rung = [rung for rung in rungs if rung["rung"] == number]
        table.add_row(
            f"rung {number}, {of_rung[0]['tokens']:,} tokens",
            *(_median_of(of_rung, step=step) for step in steps),
            str(len(of_rung)),
        )
    console.print(table)
    busy = sum(rung["seconds"].get(step, 0.0) for rung in rungs for step in ("distil", "evaluate"))
    wall = (times["search.confirming"] - times["search.searching"]) * cores
    console.print(
        f"prepare {times['search.searching'] - times['search.preparing']:.1f} s · search {wall / cores:.1f} s on {cores} cores · "
        f"confirm and bundle {times['search.succeeded'] - times['search.confirming']:.1f} s · {board['cost']['distillation_tokens']:,} tokens"
    )
    console.print(f"share of the search's worker time that is neither distillation nor evaluation: {1 - busy / wall:.1%}")


def _median_of(rungs: list[dict[str, Any]], *, step: str) -> str:
    """Seconds of a step, among the rungs that had it: a latency is measured once, and nothing is distilled before training."""
    found = [rung["seconds"][step] for rung in rungs if step in rung["seconds"]]
    return f"{median(found):.2f}" if found else ""
