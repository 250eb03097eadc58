"""Pruning, distilling and scoring without a service."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.errors import FAILED, INTERRUPTED
from nas.cli.options import Device, Json, Threads
from nas.cli.registry import open_store
from nas.errors import InvalidSpec, Problem
from nas.settings import Settings
from nas.terminal import err, out, print_facts, print_rows, say

if TYPE_CHECKING:
    from nas.compress.corpus import Corpus
    from nas.recipe import RecipeCorpus

commands = typer.Typer()


@commands.command()
def prune(
    teacher: Annotated[str, typer.Option(help="Folder, or Hugging Face id.")],
    shape: Annotated[str, typer.Option(help="Shape as JSON, or a file with it (shape.json of a bundle).")],
    corpus: Annotated[list[str], typer.Option(help="Text on which importance is measured.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder of the student; plain transformers loads it.")],
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens per calibration block.")] = 512,
    calibration_tokens: Annotated[int, typer.Option(min=256, help="Tokens on which importance and depth are measured.")] = 131_072,
    reconstruction: Annotated[bool, typer.Option(help="Fit what stays to what was removed, where that lowers the held-out loss.")] = True,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Cut one shape out of a teacher; needs no service."""
    from nas.pruning import prune_teacher
    from nas.shape import Shape

    _prepare_torch(threads, device=device)
    summary = prune_teacher(
        teacher=_fetched_teacher(teacher),
        shape=Shape.from_dict(_read_shape(shape)),
        corpus=_fetched_corpus(corpus),
        out=out_folder,
        device=device,
        sequence_length=sequence_length,
        calibration_tokens=calibration_tokens,
        reconstruction=reconstruction,
    )
    print_facts({**summary, "folder": str(out_folder)}, as_json=as_json)


@commands.command()
def distill(
    corpus: Annotated[list[str], typer.Option(help="Text to distil on; repeat for a mixture, in the order of the recipe's corpora and with their weights.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder of the result; plain transformers loads it.")],
    recipe: Annotated[Path | None, typer.Argument(help="recipe.json of a bundle, or the bundle's folder; without one, --student and --tokens.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder, or Hugging Face id; default: the one that the bundle brings, if it was corrected.")] = None,
    student: Annotated[Path | None, typer.Option(help="Checkpoint to start from; default: the bundle's.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Instead of the recipe's; without either it follows the loss.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences per step, instead of the recipe's; 16 without one.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=8, help="Tokens per sequence, instead of the recipe's; 512 without one.")] = None,
    validation_tokens: Annotated[int | None, typer.Option(min=16, help="Held-out tokens, instead of the recipe's; 32,768 without one.")] = None,
    sharded: Annotated[
        bool | None,
        typer.Option(
            "--sharded/--replicated", help="Under torchrun: divide the student over the processes (FSDP2), or not (DDP); default: where it does not fit whole."
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """The full distillation of a student; needs no service.

    Killed and run again with the same arguments, it goes on from its last checkpoint (one a minute, and one at Ctrl-C).

    Over several GPUs or machines, which see the same folders: torchrun --nproc-per-node 8 -m nas.cli distill ... The result is the same up to rounding,
    and a run may go on with another number of processes. The batch is shared out, so it has to be a multiple of them.
    """
    from nas.compress.distillation import Diverged, Stopped
    from nas.compress.distributed import join_world
    from nas.full_run import distil_fully
    from nas.recipe import Recipe, RecipeInputs

    _prepare_torch(threads, device=device)
    if recipe is not None:
        path = recipe / "recipe.json" if recipe.is_dir() else recipe
        if not path.is_file():
            raise InvalidSpec(Problem(field="recipe", expected="a recipe.json or a bundle's folder", got=str(recipe)))
        overrides = {"tokens": tokens, "learning_rate": learning_rate, "batch_size": batch_size}
        plan = Recipe.read(path, **overrides, sequence_length=sequence_length, validation_tokens=validation_tokens)
        inputs, student = RecipeInputs.read(path), student or path.parent
    elif student is None or tokens is None:
        missing = [name for name, value in (("--student", student), ("--tokens", tokens)) if value is None]
        raise InvalidSpec(Problem(field="recipe", expected=f"a recipe, or {', '.join(missing)} as well", got="none"))
    else:
        plan = Recipe(
            tokens=tokens,
            learning_rate=learning_rate,
            batch_size=batch_size or 16,
            sequence_length=sequence_length or 512,
            validation_tokens=validation_tokens or 32_768,
        )
        inputs = RecipeInputs(teacher=None, corpora=())
    if teacher is None and inputs.teacher_folder is None:
        raise InvalidSpec(Problem(field="--teacher", expected="a folder or Hugging Face id: the recipe brings no teacher of its own", got="nothing"))
    started = time.monotonic()
    with join_world(device) as world:
        err.quiet = out.quiet = not world.is_first
        teacher_folder = _fetched_teacher(teacher or str(inputs.teacher_folder))
        corpora = _mixture(corpus, recipe=inputs.corpora)
        try:
            with _interruptible() as should_stop, _progress(tokens=plan.tokens) as report:
                summary = distil_fully(
                    plan,
                    student=student,
                    teacher=teacher_folder,
                    corpora=corpora,
                    out=out_folder,
                    device=world.device,
                    expected_teacher=inputs.teacher,
                    world=world,
                    spreading=None if sharded is None else "sharded" if sharded else "replicated",
                    report=report,
                    should_stop=should_stop,
                )
        except (Stopped, Diverged) as ended:
            say(str(ended))
            raise typer.Exit(INTERRUPTED if isinstance(ended, Stopped) else FAILED) from ended
        if world.is_first:
            print_facts({**summary, "wall_seconds": time.monotonic() - started, "folder": str(out_folder)}, as_json=as_json)


def _mixture(sources: Sequence[str], *, recipe: Sequence[RecipeCorpus]) -> list[tuple[Corpus, float]]:
    """Each source with its weight. Other text than the search's is allowed, and said."""
    from nas.compress.corpus import check_corpus

    corpora = [check_corpus(_fetched_corpus([source])) for source in sources]
    if len(recipe) != len(corpora):
        if recipe:
            mixed = ", ".join(f"{entry.name} (weight {entry.weight:g})" for entry in recipe)
            say(f"--corpus: the recipe mixes {mixed}, got {len(corpora)} corpora; each has weight 1 in this run")
        return [(corpus, 1.0) for corpus in corpora]
    for source, corpus, entry in zip(sources, corpora, recipe, strict=True):
        if entry.digest not in (None, corpus.digest):
            say(f"--corpus {source}: other text than the recipe's {entry.name}; going on with it (digest {corpus.digest[:12]}, not {str(entry.digest)[:12]})")
    return [(corpus, entry.weight) for corpus, entry in zip(corpora, recipe, strict=True)]


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) asks to stop after a checkpoint; the second is a Ctrl-C like any other."""
    asked: list[int] = []
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def ask(signum: int, _: Any) -> None:
        say("stopping after a checkpoint; run the same command again to go on")
        asked.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])

    for signum in before:
        signal.signal(signum, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _progress(*, tokens: int) -> Iterator[Callable[[Any], None]]:
    """Where the training stands: one live line on a terminal, else a line every ten seconds."""
    said = -math.inf
    with err.status("measuring the student as it is", spinner="dots") as status:

        def report(progress: Any) -> None:
            nonlocal said
            left = max(0.0, (tokens - progress.tokens) / progress.tokens_per_second) if progress.tokens_per_second else 0.0
            speed = f"{progress.tokens_per_second:,.0f} tokens/s  {left:,.0f} s left"
            line = f"{progress.tokens:,} / {tokens:,} tokens  loss {progress.loss:.4f}  {speed}"
            status.update(line)
            if not err.is_terminal and (time.monotonic() - said >= 10.0 or progress.tokens >= tokens):
                said = time.monotonic()
                err.print(line, highlight=False, soft_wrap=True)

        yield report


@commands.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a model, or Hugging Face id.")],
    task: Annotated[list[str], typer.Option(help="Registered task (repeat for more), or a folder of task YAML.")],
    num_fewshot: Annotated[int, typer.Option(min=0, help="Worked examples in front of each document.")] = 0,
    limit: Annotated[int | None, typer.Option(min=2, help="Documents per task; default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests per forward pass.")] = 64,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score a checkpoint with lm-eval; needs no service."""
    import tempfile

    from nas.compress.teacher import load_model, load_tokenizer
    from nas.evaluate.scoring import score_stock
    from nas.evaluate.tasks import add_task, load_tasks

    _prepare_torch(threads, device=device)
    folder = _fetched_teacher(checkpoint)
    folders: list[Path] = []
    with tempfile.TemporaryDirectory() as temporary:
        for entry in task:
            if Path(entry).is_dir():
                folders += [card.folder for card in add_task(entry, destination=Path(temporary))]
            else:
                with open_store() as (store, _):
                    folders.append(Path(store.get_task(entry).folder))
        tasks = load_tasks(folders, num_fewshot={})
        if num_fewshot:
            tasks = load_tasks(folders, num_fewshot=dict.fromkeys(tasks, num_fewshot))
        documents = {name: range(len(loaded.eval_docs))[:limit] for name, loaded in tasks.items()}
        model = load_model(folder, dtype="float32", device=device)
        scores = score_stock(model, tokenizer=load_tokenizer(folder), tasks=tasks, documents=documents, batch_size=batch_size, max_length=None)
    rows = [
        {"task": name, "metric": metric, "value": value.value, "standard_error": value.standard_error, "documents": result.num_documents}
        for name, result in scores.tasks.items()
        for metric, value in result.metrics.items()
    ]
    print_rows(rows, as_json=as_json)


def _prepare_torch(threads: int | None, *, device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise InvalidSpec(Problem(field="device", expected="cpu or cuda", got=device))
    import torch
    from transformers.utils import logging as transformers_logging

    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidSpec(Problem(field="device", expected="cpu, as torch finds no CUDA device here", got=device))
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)


def _fetched_teacher(source: str) -> Path:
    from nas.compress.teacher import fetch_teacher

    return fetch_teacher(source, cache=Settings.from_environment(os.environ).registry_folder / "teachers")


def _fetched_corpus(sources: Sequence[str]) -> list[Path]:
    from nas.compress.corpus import fetch_corpus

    cache = Settings.from_environment(os.environ).registry_folder / "corpora"
    return [path for source in sources for path in fetch_corpus(source, cache=cache)]


def _read_shape(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidSpec(Problem(field="shape", expected="a JSON object or a file with one", got=str(error))) from error
    if not isinstance(values, dict):
        raise InvalidSpec(Problem(field="shape", expected="a JSON object", got=text))
    return values
