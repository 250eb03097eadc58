"""Seconds to score a model on stock tasks: through evaluation packs, against lm-eval's own Hugging Face path at its best batch size. The same numbers.

    NAS_REFERENCE=... python -m tests.benchmarks scoring

CPU seconds of one thread, since a shared machine's wall clock says little; the two take turns, medians. lm-eval renders and encodes its prompts on every
run, a pack is made once: its making is a column of its own. "less work" is by how much fewer multiplications the linear layers need, lm-eval at its best
batch size: sharing what sequences have in common, no padding, the head only where something is scored. What is faster beyond that, or slower, is speed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nas.evaluate.pack import Pack, build_pack
from nas.evaluate.prefix_trees import plan_batches
from nas.evaluate.scores import TaskScore
from nas.evaluate.scoring import open_pack, score_packed, score_stock
from nas.evaluate.tasks import add_task, load_tasks
from nas.search.task_scoring import CPU_BATCH_TOKENS
from tests.benchmarks.reference import reference_folder

TASKS = {"hellaswag": ("hellaswag", 4.0), "arc_easy": ("ai2_arc", 4.0), "blimp_adjunct_island": ("blimp", 2.0)}
"""lm-eval task -> (folder of the reference data, goal)."""
TEACHERS = {"stories260K": 100, "tales4M": 100, "random 75M": 20}
"""Teacher -> documents of each task. The random one has the tokenizer of tales4M."""
RANDOM = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 64}
BATCH_SIZES = (1, 4, 16, 64)
REPEATS = 3
MAX_APART = 1e-3
"""Between a document's log-probabilities per byte."""
console = Console(width=180)


def bench() -> bool:
    """Prints the table; False where a score differs from lm-eval's."""
    reference = reference_folder()
    columns = ("teacher", "task", *(f"lm-eval, {size}" for size in BATCH_SIZES), "pack", "made in", "times faster", "goal", "less work", "apart", "the same")
    table = Table(*columns, box=None)
    threads, same = torch.get_num_threads(), True
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        for teacher, num_documents in TEACHERS.items():
            model, tokenizer = _load(teacher, models=reference / "models")
            for name, (dataset, goal) in TASKS.items():
                (card,) = add_task(name, destination=Path(temporary), dataset_path=reference / "data" / "eval" / dataset)
                task = load_tasks([card.folder], num_fewshot={})[name]
                found = _compare(model, tokenizer, task=task, name=name, documents=range(num_documents))
                same = same and found.is_same
                seconds = [f"{seconds:.2f}" for seconds in (*found.stock, found.pack, found.making)]
                ratios = [f"{min(found.stock) / found.pack:.1f}", f">= {goal:g}", f"{found.work:.1f}"]
                table.add_row(teacher, name, *seconds, *ratios, f"{found.apart:.0e}", "yes" if found.is_same else "NO")
    torch.set_num_threads(threads)
    console.print(table)
    return same


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """lm-eval and the pack on one task; seconds are CPU seconds."""

    stock: list[float]
    """By batch size."""
    pack: float
    making: float
    work: float
    """Multiplications of lm-eval's linear layers over the pack's."""
    apart: float
    """The largest difference of a document's log-probability per byte."""
    is_same: bool


def _load(teacher: str, *, models: Path) -> tuple[Any, Any]:
    if (models / teacher).is_dir():
        return AutoModelForCausalLM.from_pretrained(models / teacher, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(models / teacher)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(models / "tales4M", **RANDOM)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(models / "tales4M")


def _compare(model: Any, tokenizer: Any, *, task: Any, name: str, documents: Sequence[int]) -> Comparison:
    length = model.config.max_position_embeddings
    making, pack = _timed(lambda: build_pack(task, tokenizer=tokenizer, config=model.config, documents=documents, max_length=length, key=""))
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
    apart = _apart(found, expected[0])
    return Comparison(
        stock=medians,
        pack=ours,
        making=making,
        work=_work_ratio(model, pack=pack, batch_size=BATCH_SIZES[medians.index(min(medians))]),
        apart=apart,
        is_same=apart <= MAX_APART and all(found.metrics[metric].value == value.value for metric, value in expected[0].metrics.items() if metric[:3] == "acc"),
    )


def _work_ratio(model: Any, *, pack: Pack, batch_size: int) -> float:
    head = model.get_output_embeddings().weight.numel()
    body = sum(module.weight.numel() for module in model.base_model.modules() if isinstance(module, nn.Linear))
    batches = plan_batches(pack.sequences(), num_scored=pack.num_scored_Q.tolist(), batch_tokens=CPU_BATCH_TOKENS)
    ours = sum(body * len(batch.tokens_T) + head * len(set(batch.nodes_S.tolist())) for batch in batches)
    lengths = sorted((len(sequence) - 1 for sequence in pack.sequences()), reverse=True)  # as lm-eval batches them
    padded = sum(lengths[first] * len(lengths[first : first + batch_size]) for first in range(0, len(lengths), batch_size))
    return padded * (body + head) / ours


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def _apart(found: TaskScore, expected: TaskScore) -> float:
    pairs = zip(found.documents["logprob_per_byte"].numerators, expected.documents["logprob_per_byte"].numerators, strict=True)
    return max(abs(ours - theirs) for ours, theirs in pairs)
