"""What tasks say of the students of the ground truth: each scored through evaluation packs, by the task's own metric and by its likelihood forms.

    NAS_REFERENCE=... python -m tests.benchmarks.ground_truth_tasks [--teacher T] [--processes N] [--folder build/benchmarks]

Scored are the students that ground_truth.py left under the folder, on tasks by whose accuracy the teacher stands clear of random weights, the same documents
of each (a page has no accuracy, its likelihood is the loss); the scores of the teacher and of random weights stand in the same file. Stopped and started
again at will. Minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nas.compress.slicing import build_student
from nas.compress.sorting import load_sorting
from nas.evaluate.pack import find_pack
from nas.evaluate.scoring import PackedTask, open_pack, score_packed
from nas.evaluate.tasks import TaskCard, add_task, load_tasks, split_documents
from nas.search.prepare import random_model
from nas.search.results import Metric
from nas.search.task_scoring import CPU_BATCH_TOKENS
from nas.search.task_signals import WEAK_Z, standard_errors_apart
from nas.search.trial import paired_metric
from nas.shape import Shape
from tests.benchmarks.campaign import WORK
from tests.benchmarks.ground_truth import METHOD, Cell, read_rows, teacher_architecture
from tests.benchmarks.reference import reference_folder, write_tasks
from tests.benchmarks.task_rows import ACCURACIES, NAMED, TaskRow, Values, read_task_rows, write_task_rows

STOCK = {"arc_easy": "ai2_arc", "hellaswag": "hellaswag", "blimp_adjunct_island": "blimp"}
"""Stock task -> folder of the reference data; beside them the tasks of the teachers' own kind of text."""
NUM_DOCUMENTS = 100
POINTS = (0, 6_250, 25_000, 100_000)
"""Tokens at which students are scored, as far as they have them, and at their last point."""


def clear_values(teacher: Mapping[str, Mapping[str, Metric]], random: Mapping[str, Mapping[str, Metric]]) -> dict[str, list[str]]:
    """Task -> the metrics by which the teacher stands clear of random weights; a task without an accuracy among them is left out."""
    clear = {
        task: [metric for metric, value in metrics.items() if standard_errors_apart(value, random[task][metric]) >= WEAK_Z] for task, metrics in teacher.items()
    }
    return {task: metrics for task, metrics in clear.items() if any(metric in ACCURACIES for metric in metrics)}


def catalogue(teacher: str, *, folder: Path) -> tuple[TaskCard, ...]:
    """The tasks that are tried, in a folder of their own."""
    reference, own = reference_folder(), folder / teacher / "tasks"
    cards = list(add_task(str(write_tasks(own / "yaml", reference=reference)), destination=own / "catalogue"))
    for name, dataset in STOCK.items():
        cards += add_task(name, destination=own / "catalogue", dataset_path=reference / "data" / "eval" / dataset)
    return tuple(cards)


@cache
def _packed(teacher: str, cards: tuple[TaskCard, ...]) -> dict[str, PackedTask]:
    """The pack of each task; made once."""
    source = reference_folder() / "models" / teacher
    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    tasks = load_tasks([card.folder for card in cards], num_fewshot={})
    packs = {
        card.name: find_pack(
            card.folder.parent.parent / "packs",
            task=tasks[card.name],
            digest=card.digest,
            num_fewshot=None,
            tokenizer=tokenizer,
            config=config,
            documents=split_documents(tasks[card.name], documents_per_task=NUM_DOCUMENTS, seed=0).search,
            max_length=config.max_position_embeddings,
        )
        for card in cards
    }
    return {name: open_pack(pack, task=tasks[name]) for name, pack in packs.items()}


def score_ends(teacher: str, *, cards: tuple[TaskCard, ...]) -> tuple[TaskRow, TaskRow]:
    """The teacher and random weights, on the tasks and by the metrics that tell them apart."""
    torch.set_num_threads(1)
    packed = _packed(teacher, cards)
    model = AutoModelForCausalLM.from_pretrained(reference_folder() / "models" / teacher, dtype=torch.float32).eval()
    models = (model, random_model(teacher_architecture(teacher), config=model.config.to_dict(), seed=0, device="cpu"))
    teachers, randoms = (
        {
            name: {metric: paired_metric(score, name=metric) for metric in score.documents}
            for name, score in score_packed(one, packed, batch_tokens=CPU_BATCH_TOKENS).tasks.items()
        }
        for one in models
    )
    clear = clear_values(teachers, randoms)

    def row(shape: str, found: Mapping[str, Mapping[str, Metric]]) -> TaskRow:
        values = {task: {metric: round(found[task][metric].value, 5) for metric in metrics} for task, metrics in clear.items()}
        return TaskRow(teacher=teacher, max_fraction=0.0, shape=shape, seed=0, tokens=0, values=values)

    return row(NAMED[0], teachers), row(NAMED[1], randoms)


def score_cell(cell: Cell, *, points: Sequence[int], clear: Values, cards: tuple[TaskCard, ...], folder: Path) -> list[TaskRow]:
    """A cell's students at some points, on some tasks by the metrics of `clear`; in this process on one thread."""
    torch.set_num_threads(1)
    packed = _packed(cell.teacher, cards)
    # The config is that of slicing: a student of another width has another eps in its norms.
    student = build_student(load_sorting(folder / cell.teacher / METHOD), Shape.from_key(cell.shape), dtype="float32", device="cpu")
    rows = []
    for tokens in points:
        student.load_state_dict(load_file(folder / "ground_truth" / cell.key / f"{tokens}.safetensors"))
        scores = score_packed(student, packed, batch_tokens=CPU_BATCH_TOKENS).tasks
        values = {task: {metric: round(scores[task].metric(metric).value, 5) for metric in metrics} for task, metrics in clear.items()}
        rows.append(TaskRow(**asdict(cell), tokens=tokens, values=values))
    return rows


def missing(cells: Iterable[tuple[Cell, Sequence[int]]], *, known: Iterable[TaskRow]) -> Iterator[tuple[Cell, list[int]]]:
    """Cells of the first seed, and which of the points wanted of each are not known."""
    places = {row.place for row in known}
    for cell, tokens in cells:
        wanted = sorted({*POINTS, tokens[-1]} & set(tokens))
        todo = [number for number in wanted if (cell.teacher, cell.max_fraction, cell.shape, cell.seed, number) not in places]
        if todo and cell.seed == 0:
            yield cell, todo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=("stories260K", "tales4M"), action="append")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=WORK)
    arguments = parser.parse_args()
    for teacher in arguments.teacher or ("stories260K", "tales4M"):
        _score_teacher(teacher, processes=arguments.processes, folder=arguments.folder)


def _score_teacher(teacher: str, *, processes: int, folder: Path) -> None:
    console = Console()
    known: dict[Any, TaskRow] = {row.place: row for row in read_task_rows()}
    cards = catalogue(teacher, folder=folder)
    ends = [row for row in known.values() if row.teacher == teacher and row.shape in NAMED] or score_ends(teacher, cards=cards)
    known |= {row.place: row for row in ends}
    write_task_rows(known.values())
    clear = ends[0].values
    console.print(f"{teacher} stands clear of random weights by: " + ", ".join(f"{task} ({', '.join(metrics)})" for task, metrics in clear.items()))
    cells = [(row.cell, row.tokens) for row in sorted(read_rows(), key=lambda row: -row.cell.max_fraction) if row.cell.teacher == teacher]
    todo, cards = list(missing(cells, known=known.values())), tuple(card for card in cards if card.name in clear)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(score_cell, cell, points=points, clear=clear, cards=cards, folder=folder) for cell, points in todo]
        for number, future in enumerate(as_completed(futures), start=1):
            known |= {row.place: row for row in future.result()}
            write_task_rows(known.values())
            console.print(f"{number} of {len(todo)}")


if __name__ == "__main__":
    main()
