"""A real search on the reference teacher, through REST from start to end, and what it was worth.

    NAS_REFERENCE=... python -m tests.benchmarks.reference_search FOLDER [--trials 16] [--cores 2] [--seed 0]

Prints the leaderboard, where the time went, and the winner against the median random legal shape, the anchors and the same
shape trained from scratch, all at equal tokens and on documents and blocks that no rung used. LOG.md quotes it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nas.compress.distillation import distil
from nas.compress.objective import NextToken, TeacherLogits
from nas.compress.slicing import build_student
from nas.compress.train_plan import make_plan
from nas.registration import register_corpus, register_tasks, register_teacher
from nas.search.layout import prepared_key
from nas.search.prepare import random_model
from nas.search.shared import load_shared
from nas.search.trial import measure
from nas.settings import Settings
from nas.shape import Shape
from nas.spec import parse_spec
from nas.store.store import Store
from nas.terminal import event_line, leaderboard_table
from tests.benchmarks.reference import PAIR_CONFIGS, reference_folder, write_tasks
from tests.benchmarks.service import bench_settings, run_search, serving

console = Console(width=220)

_SCRATCH_RATE = 1.5e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--controls", type=int, default=8)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-tokens", type=int, default=50_000)
    arguments = parser.parse_args()
    reference = reference_folder()
    folder = arguments.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    environment, settings = bench_settings(folder, cores=arguments.cores)
    _register(settings, reference=reference, tasks=write_tasks(folder / "tasks", reference=reference))
    spec = _spec(arguments)
    with serving(environment, log=folder / "serve.log") as client:
        started = time.monotonic()
        search_id = run_search(client, spec, on_event=_print_event)
        seconds = time.monotonic() - started
        board, winner = client.leaderboard(search_id), client.winner(search_id)
    console.print(leaderboard_table(board))
    console.print_json(data={"wall_seconds": seconds, "cost": board["cost"], "agreement": board["agreement"], "winner": winner["shape"]})
    torch.set_num_threads(arguments.cores)
    scratch = _scratch(settings, search_id=search_id, shape=Shape.from_dict(winner["shape"]))
    _compare(board, winner=winner["trial"], scratch=scratch)


def _spec(arguments: argparse.Namespace) -> dict[str, Any]:
    pairs = [{"name": f"minpairs_{name}", "metric": "acc", "weight": 1 / len(PAIR_CONFIGS)} for name in PAIR_CONFIGS]
    return {
        "label": f"reference, seed {arguments.seed}",
        "teacher": "stories260K",
        "corpus": {"parts": [{"name": "tinystories"}], "sequence_length": 128, "calibration_tokens": 65_536, "validation_tokens": 32_768},
        "tasks": [{"name": "tinystories_bits"}, {"name": "tinystories_lastword"}, {"name": "tinystories_ending", "metric": "acc_norm"}, *pairs],
        "budget": {"max_fraction": 0.6},
        "sampler": {"max_trials": arguments.trials, "num_startup_trials": 6},
        "controls": {"num_random": arguments.controls},
        "rungs": {"first_tokens": arguments.first_tokens, "factor": 2, "num_trained": 3},
        "evaluation": {"documents_per_task": 150, "batch_size": 64},
        "distillation": {"batch_size": 4},
        "resources": {"cpus": 1.0, "max_parallel_trials": arguments.cores},
        "seed": arguments.seed,
    }


def _register(settings: Settings, *, reference: Path, tasks: Path) -> None:
    store = Store.open(settings.database_url, migrate=True)
    register_teacher(str(reference / "models" / "stories260K"), name=None, store=store, settings=settings)
    register_corpus([str(reference / "data" / "text" / "tinystories" / "train.jsonl")], name="tinystories", store=store, settings=settings)
    register_tasks(str(tasks), dataset_path=None, store=store, settings=settings)
    store.close()


def _print_event(event: dict[str, Any]) -> None:
    if line := event_line(event):
        console.print(line, markup=False, highlight=False)


def _scratch(settings: Settings, *, search_id: str, shape: Shape) -> dict[str, dict[str, Any]]:
    """The winner's shape with random weights, given the same tokens: by distillation, and by plain language modelling."""
    store = Store.open(settings.database_url)
    search = store.get_search(search_id)
    store.close()
    spec = parse_spec(json.dumps(search.spec))
    prepared = settings.prepared_folder / prepared_key(spec, inputs=search.inputs)
    shared = load_shared(spec, inputs=search.inputs, prepared=prepared, device="cpu")
    plan = make_plan(
        spec.distillation,
        tokens=spec.rungs.tokens(spec.rungs.num_trained),
        seed=spec.seed,
        teacher_hidden_size=shared.sorting.architecture.shape.hidden_size,
    )
    plan = replace(plan, learning_rate=_SCRATCH_RATE, rate_follows_loss=False)
    results = {}
    for name, objective in (("scratch, distilled", TeacherLogits(shared.teacher)), ("scratch, cross-entropy", NextToken())):
        config = build_student(shared.sorting, shape, dtype="float32", device="cpu").config.to_dict()
        student = random_model(shared.sorting.architecture, config=config, seed=spec.seed, device="cpu")
        distil(student, objective=objective, blocks_NT=shared.blocks.train_NT, plan=plan)
        result = measure(
            spec,
            inputs=search.inputs,
            prepared=prepared,
            model=student,
            device="cpu",
            rung=spec.rungs.num_trained,
            tokens=plan.tokens,
            held_out=True,
            with_tasks=True,
        )
        results[name] = result.as_dict()
    return results


def _compare(board: dict[str, Any], *, winner: int, scratch: dict[str, dict[str, Any]]) -> None:
    rows = {row["number"]: row for row in board["rows"] if (row.get("confirmation") or {}).get("held_out")}
    held_out = {number: row["confirmation"]["held_out"] for number, row in rows.items()}
    controls = [held_out[number] for number, row in rows.items() if row["is_control"]]
    teacher, random = board["teacher"]["held_out"], board["random"]["held_out"]
    named = {"teacher": teacher, "winner": held_out[winner]}
    named |= {row["origin"]: held_out[number] for number, row in rows.items() if row["origin"].startswith("anchor:")}
    named |= {**scratch, "random weights": random}
    tasks = list(teacher["tasks"])
    table = Table("", "parameters", "loss", "KL", *tasks, box=None)
    for name, result in named.items():
        cells = [
            f"{metric['value']:.3f}±{metric['standard_error']:.3f}" for metric in (result["loss"], result["kl"], *(result["tasks"][task] for task in tasks))
        ]
        table.add_row(name, f"{result['parameters']:,}", *cells)
    middle = [f"{median(result[name]['value'] for result in controls):.3f}" for name in ("loss", "kl")]
    middle += [f"{median(result['tasks'][task]['value'] for result in controls):.3f}" for task in tasks]
    table.add_row(f"median of {len(controls)} random shapes", f"{int(median(result['parameters'] for result in controls)):,}", *middle)
    console.print("on documents and blocks that no rung used, at equal tokens:")
    console.print(table)


if __name__ == "__main__":
    main()
