"""The prepare step: all that is computed once per (teacher, corpus, tasks, method) and reused by every trial and later search.

corpus -> packed blocks; teacher (corrected first where the spec asks for it) -> importance -> sorted teacher and kept layers per depth;
tasks -> the documents of the rungs and the held-out ones; teacher -> its signals on the blocks; teacher and random weights scored.
Knows no store; trial.py reads the folder it leaves. Killed and run again, it takes up what is whole: blocks, corrected and sorted teacher, shards.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nas.architecture import Architecture, read_architecture
from nas.compress.blocks import Blocks, Part, build_blocks, load_blocks
from nas.compress.corpus import check_corpus
from nas.compress.correction import RATE_SHARE, Correction, correct_teacher, load_correction
from nas.compress.depth import Damage, choose_layers
from nas.compress.fitting import check_disk_fits, check_host_fits, check_teacher_fits, fit_plan
from nas.compress.importance import measure_importance
from nas.compress.reconstruction import split_calibration
from nas.compress.second_moments import HELD_BYTES, SecondMoments, load_moments, measure_moments
from nas.compress.sorting import Sorting, load_sorting, make_order, save_sorted, sort_teacher
from nas.compress.teacher import check_teacher, load_model, load_tokenizer
from nas.compress.train_plan import make_plan
from nas.cost import weight_bytes
from nas.errors import CorpusUnavailable, CorruptFile, NotFound, TeacherUnavailable
from nas.evaluate.tasks import load_tasks, split_documents
from nas.files import write_json
from nas.memory import TeacherMemory, preparation_disk
from nas.search.layout import BLOCKS, CORRECTED, MOMENTS, PREPARED, SORTED, SPLITS, searched_depths
from nas.search.shared import Shared, forget_shared, load_shared, teacher_dtype, teacher_folder
from nas.search.task_damage import task_damage
from nas.search.trial import measure
from nas.spec import SearchSpec

WHOLE = "whole"
"""In a prepared folder, while tasks choose the layers: the sorted teacher before they are chosen."""
REPORT_SECONDS = 5.0
"""Between two reports of one step."""

logger = logging.getLogger(__name__)

T = TypeVar("T")
Report = Callable[[dict[str, Any]], None]
Layers = Mapping[int, tuple[int, ...]]
ShouldStop = Callable[[], bool]


def prepare(spec: SearchSpec, *, inputs: Mapping[str, Any], folder: Path, device: str, report: Report, should_stop: ShouldStop) -> dict[str, Any]:
    """Fill `folder`, or find it filled; returns what the leaderboard needs of it.

    Raises:
        TeacherUnavailable, CorpusUnavailable, TaskUnavailable: what the search refers to cannot be used, or is no longer what was registered.
        DoesNotFit: the teacher is too large for this machine; asked before it is loaded.
        StoppedEarly: asked to; what was finished stays.
    """
    steps = _Steps(report=report, should_stop=should_stop)
    with steps.step("check"):
        _check_digests(inputs)
    if (folder / PREPARED).exists():
        facts = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
        assert isinstance(facts, dict)
        return facts
    _check_room(spec, inputs=inputs, folder=folder, device=device)
    folder.mkdir(parents=True, exist_ok=True)
    with steps.step("corpus"):
        blocks = _found(folder / BLOCKS, load=load_blocks) or _build_blocks(spec, inputs=inputs, folder=folder)
    correction = _correct(spec, inputs=inputs, folder=folder, blocks=blocks, device=device, steps=steps)
    with steps.step("tasks"):
        documents = _split_tasks(spec, inputs=inputs, folder=folder)
    sorting = _found(folder / SORTED, load=load_sorting) or _sort(spec, inputs=inputs, folder=folder, blocks=blocks, device=device, steps=steps)
    facts = {"layers": {str(depth): list(kept) for depth, kept in sorting.layers.items()}, "documents": documents, "blocks": blocks.facts}
    facts["correction"] = None if correction is None else asdict(correction)
    shared = load_shared(spec, inputs=inputs, prepared=folder, device=device)
    if spec.compression.reconstruction:
        with steps.step("moments"):
            _found(folder / MOMENTS, load=load_moments) or _measure_moments(spec, shared=shared, folder=folder, report=steps.progress)
    with steps.step("signals"):
        facts["signals"] = asdict(shared.keep_signals(spec, report=steps.progress))
    with steps.step("baselines"):
        facts |= _measure_baselines(spec, inputs=inputs, folder=folder, device=device)
    forget_shared()  # with signals no trial needs the teacher
    facts["seconds"] = steps.seconds
    write_json(facts, target=folder / PREPARED)
    return facts


class StoppedEarly(Exception):
    """The prepare step was asked to stop."""


class _Steps:
    """The parts of the prepare step: their seconds, told to the controller as they begin, left where it asks to stop."""

    def __init__(self, *, report: Report, should_stop: ShouldStop) -> None:
        self.seconds: dict[str, float] = {}
        self._report, self.should_stop = report, should_stop
        self._name = ""
        self._reported = 0.0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._name = name
        self._check()
        self._tell({"step": name})
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def progress(self, done: int, of: int) -> None:
        """Inside a long step: how far it is."""
        self._check()
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self._tell({"step": self._name, "done": done, "of": of})

    def _check(self) -> None:
        if self.should_stop():
            raise StoppedEarly(self._name)

    def _tell(self, line: dict[str, Any]) -> None:
        self._report(line)
        self._reported = time.monotonic()


def _check_digests(inputs: Mapping[str, Any]) -> None:
    """Files lie where the operator left them: one that was changed since would make every digest in the winner's bundle a lie."""
    teacher = inputs["teacher"]
    if (found := check_teacher(Path(teacher["path"])).digest) != teacher["digest"]:
        raise TeacherUnavailable(f"teacher {teacher['name']}: expected the digest {teacher['digest']}, with which it was registered, got {found}")
    for corpus in inputs["corpora"]:
        if (found := check_corpus([Path(file) for file in corpus["files"]]).digest) != corpus["digest"]:
            raise CorpusUnavailable(f"corpus {corpus['name']}: expected the digest {corpus['digest']}, with which it was registered, got {found}")


def _check_room(spec: SearchSpec, *, inputs: Mapping[str, Any], folder: Path, device: str) -> None:
    """The teacher on the device, its sorting in the host's memory, and what stays on disk besides the signals, which have a budget of their own."""
    architecture = read_architecture(inputs["teacher"]["config"])
    weights = weight_bytes(architecture, architecture.shape, bytes_per_element=4)
    files = preparation_disk(architecture, corrected=spec.compression.teacher_correction_tokens > 0, moments=spec.compression.reconstruction)
    check_disk_fits(files, folder=folder, what="the prepared folder")
    check_host_fits({"teacher (float32)": weights, "its sorted copy": weights}, what="sorting the teacher")
    forget_shared()  # another search's teacher may still fill the device
    # On a CPU their sums are float64.
    held = min(HELD_BYTES, files.get("second moments", 0) * (2 if device == "cpu" else 1))
    name, size = max(("random weights, the other baseline (float32)", weights), ("second moments held at once", held), key=lambda part: part[1])
    check_teacher_fits(
        TeacherMemory(architecture=architecture, dtype=teacher_dtype(spec, device=device)),
        tokens=(spec.distillation.micro_batch_size or spec.distillation.batch_size) * spec.corpus.sequence_length,
        beside={name: size},
        device=device,
    )


def _found(folder: Path, *, load: Callable[[Path], T]) -> T | None:
    """What an earlier attempt left whole; None where it has to be made."""
    try:
        return load(folder)
    except (NotFound, CorruptFile) as missing:
        logger.info("%s has to be made", folder.name, extra={"action": "prepare", "reason": str(missing)})
        return None


def _build_blocks(spec: SearchSpec, *, inputs: Mapping[str, Any], folder: Path) -> Blocks:
    length = spec.corpus.sequence_length
    return build_blocks(
        [
            Part(name=part.name, files=tuple(Path(file) for file in corpus["files"]), weight=part.weight)
            for part, corpus in zip(spec.corpus.parts, inputs["corpora"], strict=True)
        ],
        tokenizer=load_tokenizer(Path(inputs["teacher"]["path"])),
        sequence_length=length,
        train_tokens=spec.rungs.tokens(spec.rungs.num_trained),
        calibration_tokens=spec.corpus.calibration_tokens,
        # Two equal halves of whole blocks: one compares the rungs, the other is kept for the confirmation.
        validation_tokens=2 * length * math.ceil(spec.corpus.validation_tokens / length),
        seed=spec.seed,
        folder=folder / BLOCKS,
    )


def _correct(spec: SearchSpec, *, inputs: Mapping[str, Any], folder: Path, blocks: Blocks, device: str, steps: _Steps) -> Correction | None:
    """The corrected teacher, where the spec asks for one: from here on it is the teacher."""
    tokens = spec.compression.teacher_correction_tokens
    if not tokens:
        return None
    if (found := _found(folder / CORRECTED, load=load_correction)) is not None:
        return found
    forget_shared()  # another search's teacher may still fill the device
    architecture, moments = read_architecture(inputs["teacher"]["config"]), spec.distillation.moments
    plan = fit_plan(
        make_plan(spec.distillation, tokens=tokens, seed=spec.seed, teacher_hidden_size=architecture.shape.hidden_size),
        architecture=architecture,
        shape=architecture.shape,
        teacher=None,
        sequence_length=spec.corpus.sequence_length,
        device=device,
        moments=None if moments == "auto" else moments,
    )
    with steps.step("correction"):
        return correct_teacher(
            Path(inputs["teacher"]["path"]),
            digest=inputs["teacher"]["digest"],
            config=inputs["teacher"]["config"],
            train_NT=blocks.train_NT,
            validation_NT=blocks.validation_NT,
            plan=replace(plan, learning_rate=RATE_SHARE * plan.learning_rate, rate_follows_loss=False),
            out=folder / CORRECTED,
            device=device,
            report=lambda progress: steps.progress(progress.tokens, tokens),
            should_stop=steps.should_stop,
        )


def _sort(spec: SearchSpec, *, inputs: Mapping[str, Any], folder: Path, blocks: Blocks, device: str, steps: _Steps) -> Sorting:
    """Importance, the layers of every depth, and the sorted teacher on disk."""
    source = teacher_folder(spec, inputs=inputs, prepared=folder)
    architecture = read_architecture(inputs["teacher"]["config"])
    batch_size = spec.distillation.micro_batch_size or spec.distillation.batch_size
    forget_shared()  # another search's teacher may still fill the device
    with steps.step("importance"):
        teacher = load_model(source, dtype=teacher_dtype(spec, device=device), device=device)
        importance = measure_importance(teacher, blocks_BT=blocks.calibration_NT, method=spec.compression.importance, batch_size=batch_size)
        order = make_order(importance, architecture.shape)

    def save(target: Path, layers: Layers) -> None:
        # What students are cut from never follows the arithmetic's dtype: bfloat16 would round every weight of every student.
        stored = load_model(source, dtype="float32", device="cpu")
        state = sort_teacher(stored, order=order, architecture=architecture)
        save_sorted(target, state=state, order=order, importance=importance, config=inputs["teacher"]["config"], layers=layers, tokenizer_from=source)

    with steps.step("depth"):
        layers = choose_layers(
            teacher,
            method=spec.compression.depth,
            importance=importance,
            depths=searched_depths(spec, inputs=inputs),
            blocks_BT=blocks.calibration_NT,
            batch_size=batch_size,
            by_task=partial(_by_task, spec, inputs=inputs, folder=folder, save=save, device=device),
            report=steps.progress,
        )
    del teacher
    with steps.step("sort"):
        save(folder / SORTED, layers)
        shutil.rmtree(folder / WHOLE, ignore_errors=True)
    return load_sorting(folder / SORTED)


def _measure_moments(spec: SearchSpec, *, shared: Shared, folder: Path, report: Callable[[int, int], None]) -> SecondMoments:
    return measure_moments(
        shared.teacher,
        sorting=shared.sorting,
        blocks_BT=split_calibration(shared.blocks.calibration_NT)[0],
        folder=folder / MOMENTS,
        batch_size=spec.distillation.micro_batch_size or spec.distillation.batch_size,
        report=report,
    )


def _by_task(
    spec: SearchSpec, kl: Damage, *, inputs: Mapping[str, Any], folder: Path, save: Callable[[Path, Mapping[int, tuple[int, ...]]], None], device: str
) -> Damage:
    """What sets of layers cost on the tasks; the models are cut out of a sorted teacher that has selected no layers yet."""
    save(folder / WHOLE, {})
    return task_damage(spec, inputs=inputs, prepared=folder, sorting=load_sorting(folder / WHOLE), kl=kl, device=device)


def _split_tasks(spec: SearchSpec, *, inputs: Mapping[str, Any], folder: Path) -> dict[str, dict[str, int]]:
    """Which documents the rungs see and which are held out, into the folder; returns how many."""
    tasks = load_tasks([Path(task["folder"]) for task in inputs["tasks"]], num_fewshot={task.name: task.num_fewshot for task in spec.tasks})
    documents: dict[str, dict[str, list[int]]] = {}
    for task in spec.tasks:
        split = split_documents(tasks[task.name], documents_per_task=spec.evaluation.documents_per_task, seed=spec.seed)
        documents[task.name] = {"search": list(split.search), "held_out": _held_out(split.held_out, spec=spec)}
    write_json(documents, target=folder / SPLITS)
    return {name: {part: len(ids) for part, ids in split.items()} for name, split in documents.items()}


def _measure_baselines(spec: SearchSpec, *, inputs: Mapping[str, Any], folder: Path, device: str) -> dict[str, Any]:
    """The teacher and random weights, as if they were trials, on the rungs' documents and on the held-out ones."""
    shared = load_shared(spec, inputs=inputs, prepared=folder, device=device)
    random = random_model(shared.sorting.architecture, config=inputs["teacher"]["config"], seed=spec.seed, device=device)
    measured = {}
    for name, model in (("teacher", shared.teacher), ("random", random)):
        for held_out in (False, True):
            result = measure(spec, inputs=inputs, prepared=folder, model=model, device=device, rung=0, tokens=0, held_out=held_out, with_tasks=True)
            measured[f"{name}_held_out" if held_out else name] = result.as_dict()
    return measured


def random_model(architecture: Architecture, *, config: Mapping[str, Any], seed: int, device: str) -> PreTrainedModel:
    """The architecture with freshly initialised weights, float32; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version", "dtype", "torch_dtype")}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture.model_type, **values), dtype=torch.float32)
    return model.to(device).eval()


def _held_out(documents: Sequence[int], *, spec: SearchSpec) -> list[int]:
    """The held-out documents that are scored: all, or as many as the spec asks for, drawn by its seed."""
    limit = spec.evaluation.held_out_documents
    return list(documents) if limit is None or limit >= len(documents) else sorted(Random(spec.seed).sample(documents, limit))
