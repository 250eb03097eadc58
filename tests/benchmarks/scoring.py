"""Seconds to score a model on stock tasks: through evaluation packs, against lm-eval's own Hugging Face path at its best batch size. The same numbers.

    NAS_REFERENCE=... python -m tests.benchmarks scoring

CPU seconds of one thread, since a shared machine's wall clock says little; the two take turns, medians. lm-eval renders and encodes its prompts on every
run, a pack is made once: its making is a column of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from nas.evaluate.pack import build_pack
from nas.evaluate.scores import TaskScore
from nas.evaluate.scoring import open_pack, score_packed, score_stock
from nas.evaluate.tasks import add_task, load_tasks
from nas.search.task_scoring import CPU_BATCH_TOKENS
from tests.benchmarks.reference import reference_folder

TASKS = {"hellaswag": ("hellaswag", 4.0), "arc_easy": ("ai2_arc", 4.0), "blimp_adjunct_island": ("blimp", 2.0)}
"""lm-eval task -> (folder of the reference data, goal)."""
TEACHERS = ("stories260K", "tales4M")
NUM_DOCUMENTS = 100
BATCH_SIZES = (1, 4, 16, 64)
REPEATS = 3
MAX_APART = 1e-3
"""Between a document's log-probabilities per byte."""
console = Console(width=150)


def bench() -> bool:
    """Prints the table; False where a score differs from lm-eval's."""
    reference = reference_folder()
    table = Table("teacher", "task", *(f"lm-eval, {size}" for size in BATCH_SIZES), "pack", "made in", "times faster", "goal", "the same", box=None)
    threads, same = torch.get_num_threads(), True
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        for teacher in TEACHERS:
            folder = reference / "models" / teacher
            model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
            for name, (dataset, goal) in TASKS.items():
                (card,) = add_task(name, destination=Path(temporary), dataset_path=reference / "data" / "eval" / dataset)
                stock, ours, made, is_same = _compare(model, tokenizer, task=load_tasks([card.folder], num_fewshot={})[name], name=name)
                same = same and is_same
                cells = [*(f"{seconds:.2f}" for seconds in stock), f"{ours:.2f}", f"{made:.2f}", f"{min(stock) / ours:.1f}", f">= {goal:g}"]
                table.add_row(teacher, name, *cells, "yes" if is_same else "NO")
    torch.set_num_threads(threads)
    console.print(table)
    return same


def _compare(model: Any, tokenizer: Any, *, task: Any, name: str) -> tuple[list[float], float, float, bool]:
    """Seconds of lm-eval by batch size, of the pack, of making it, and whether the scores are the same."""
    documents, length = range(NUM_DOCUMENTS), model.config.max_position_embeddings
    made, pack = _timed(lambda: build_pack(task, tokenizer=tokenizer, config=model.config, documents=documents, max_length=length, key=""))
    packed = {name: open_pack(pack, task=task)}

    def stock(batch_size: int) -> TaskScore:
        tasks, chosen = {name: task}, {name: documents}
        return score_stock(model, tokenizer=tokenizer, tasks=tasks, documents=chosen, batch_size=batch_size, max_length=length).tasks[name]

    score_packed(model, packed, batch_tokens=CPU_BATCH_TOKENS)
    rounds: list[Sequence[float]] = []
    for _ in range(REPEATS):
        seconds, expected = zip(*(_timed(lambda size=size: stock(size)) for size in BATCH_SIZES), strict=True)
        ours, found = _timed(lambda: score_packed(model, packed, batch_tokens=CPU_BATCH_TOKENS).tasks[name])
        rounds.append([*seconds, ours])
    *medians, ours = (median(column) for column in zip(*rounds, strict=True))
    return medians, ours, made, _is_same(found, expected[0])


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def _is_same(found: TaskScore, expected: TaskScore) -> bool:
    accuracies = [metric for metric in expected.metrics if metric.startswith("acc")]
    pairs = zip(found.documents["logprob_per_byte"].numerators, expected.documents["logprob_per_byte"].numerators, strict=True)
    return all(found.metrics[metric].value == expected.metrics[metric].value for metric in accuracies) and all(
        abs(ours - theirs) <= MAX_APART for ours, theirs in pairs
    )
