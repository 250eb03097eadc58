"""`make bench`: what the product costs, as ratios against a baseline in the same run, with medians.

    distillation    tokens per second of our training loop against a plain transformers loop with F.kl_div
    trial           seconds per trial by step, in a search through the running service
    overhead        share of the workers' wall time in which nothing is distilled and nothing is evaluated

The training loops run on random weights (speed does not depend on them), the search on the demo's teacher, corpus and tasks, which
are made first where `make demo` has not made them yet. Needs no reference material.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nas.compress.distillation import distil
from nas.compress.objective import TeacherLogits
from nas.compress.train_plan import TrainPlan
from nas.demo.__main__ import make_inputs
from nas.families import read_architecture
from nas.registration import register_corpus, register_tasks, register_teacher
from nas.search.prepare import random_model
from nas.store.store import Store
from tests.benchmarks.service import bench_settings, run_search, serving

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 5,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
"""The shape of stories260K."""

console = Console(width=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    arguments = parser.parse_args()
    bench_distillation(repeats=arguments.repeats)
    with tempfile.TemporaryDirectory() as folder:
        bench_search(Path(folder), cores=arguments.cores)


def bench_distillation(*, repeats: int) -> None:
    """Tokens per second on one thread, ours and plain in turn."""
    torch.set_num_threads(1)
    architecture = read_architecture(CONFIG)
    teacher = random_model(architecture, config=CONFIG, seed=0, device="cpu").requires_grad_(False)
    student = random_model(architecture, config={**CONFIG, "num_hidden_layers": 4, "intermediate_size": 128}, seed=1, device="cpu")
    table = Table("distillation, 1 thread", "tokens/s", "plain loop", "ratio (median, min, max)", box=None)
    for batch_size, length in ((4, 128), (16, 128), (8, 256)):
        blocks_NT = torch.randint(0, CONFIG["vocab_size"], (batch_size * 24, length), generator=torch.Generator().manual_seed(0), dtype=torch.int32)  # type: ignore[call-overload]
        pairs = [(_speed(_ours, student, teacher, blocks_NT, batch_size), _speed(_plain, student, teacher, blocks_NT, batch_size)) for _ in range(repeats + 1)][
            1:
        ]
        ratios = [ours / plain for ours, plain in pairs]
        speeds = f"{median(ours for ours, _ in pairs):,.0f}", f"{median(plain for _, plain in pairs):,.0f}"
        table.add_row(f"batch {batch_size} x {length}", *speeds, f"{median(ratios):.2f}  ({min(ratios):.2f}, {max(ratios):.2f})")
    console.print(table)


def _speed(train: Callable[[nn.Module, nn.Module, Tensor, int], None], student: nn.Module, teacher: nn.Module, blocks_NT: Tensor, batch_size: int) -> float:
    model = copy.deepcopy(student)
    started = time.perf_counter()
    train(model, teacher, blocks_NT, batch_size)
    return blocks_NT.numel() / (time.perf_counter() - started)


def _ours(student: nn.Module, teacher: nn.Module, blocks_NT: Tensor, batch_size: int) -> None:
    distil(student, objective=TeacherLogits(teacher), blocks_NT=blocks_NT, plan=TrainPlan(tokens=blocks_NT.numel(), learning_rate=1e-3, batch_size=batch_size))


def _plain(student: nn.Module, teacher: nn.Module, blocks_NT: Tensor, batch_size: int) -> None:
    """What one writes by hand: whole logits, F.kl_div, AdamW."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    student.train()
    for tokens_BT in blocks_NT.long().split(batch_size):
        with torch.no_grad():
            target_BTV = torch.log_softmax(teacher(tokens_BT).logits.float(), dim=-1)
        log_BTV = torch.log_softmax(student(tokens_BT).logits.float(), dim=-1)
        loss = nn.functional.kl_div(log_BTV, target_BTV, log_target=True, reduction="sum") / tokens_BT.numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()


def bench_search(folder: Path, *, cores: int) -> None:
    """A small search through the service: seconds per trial by step, and the share of time that is neither distilling nor evaluating."""
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
            *(f"{median(rung['seconds'][step] for rung in of_rung):.2f}" for step in steps),
            str(len(of_rung)),
        )
    console.print(table)
    busy = sum(rung["seconds"][step] for rung in rungs for step in ("distil", "evaluate"))
    wall = (times["search.confirming"] - times["search.searching"]) * cores
    console.print(
        f"prepare {times['search.searching'] - times['search.preparing']:.1f} s · search {wall / cores:.1f} s on {cores} cores · "
        f"confirm and bundle {times['search.succeeded'] - times['search.confirming']:.1f} s · {board['cost']['tokens']:,} tokens"
    )
    console.print(f"share of the search's worker time that is neither distillation nor evaluation: {1 - busy / wall:.1%}")


if __name__ == "__main__":
    main()
