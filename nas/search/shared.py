"""What the steps of one search read in common: the prepared folder, the teacher's signals, and the teacher itself where something asks for it.

Shape suffixes: N blocks, T tokens.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from nas.compress.blocks import load_blocks
from nas.compress.hidden_states import TeacherStates
from nas.compress.manifest import load_tensors
from nas.compress.objective import Objective, TeacherLogits
from nas.compress.reconstruction import stream_map
from nas.compress.second_moments import SecondMoments, load_moments
from nas.compress.signals import StoredSignals, StoredTeacher, StoredTopK, build_signals
from nas.compress.sorting import SORTING, load_sorting
from nas.compress.teacher import WEIGHTS_FILE, load_model
from nas.compress.teacher_outputs import RunningTeacher, TeacherOutputs
from nas.cost import SignalChoice, SignalKind, choose_signals
from nas.files import write_json
from nas.search.layout import BLOCKS, CORRECTED, MOMENTS, SIGNALS, SORTED
from nas.search.task_scoring import TaskScorer
from nas.shape import Shape
from nas.spec import SearchSpec

CHOICE = "choice.json"
"""In the signals' folder, last: the kind that is kept, its bytes and why."""
TRAIN, VALIDATION = "train", "validation"

logger = logging.getLogger(__name__)


def teacher_dtype(spec: SearchSpec, *, device: str) -> str:
    """The teacher only infers: bfloat16 on an accelerator that trains in it, float32 elsewhere."""
    return spec.distillation.dtype if device != "cpu" else "float32"


def teacher_folder(spec: SearchSpec, *, inputs: Mapping[str, Any], prepared: Path) -> Path:
    """The teacher that students are cut from and taught by: the registered one, or that one corrected."""
    return prepared / CORRECTED if spec.compression.teacher_correction_tokens else Path(inputs["teacher"]["path"])


class Shared:
    """What all trials of a search read and none changes. The teacher is loaded where it is asked for, which with signals no trial does."""

    def __init__(self, spec: SearchSpec, *, inputs: Mapping[str, Any], prepared: Path, device: str) -> None:
        self._folder, self._device = prepared, device
        self._dtype = teacher_dtype(spec, device=device)
        self._batch_size = spec.distillation.micro_batch_size or spec.distillation.batch_size
        self._top_k = spec.distillation.top_k
        self._teacher_folder = teacher_folder(spec, inputs=inputs, prepared=prepared)
        self._stored: dict[str, StoredSignals] = {}
        self.sorting = load_sorting(prepared / SORTED)
        self.blocks = load_blocks(prepared / BLOCKS)
        self.tasks = TaskScorer(spec, inputs=inputs, prepared=prepared, teacher=self._teacher_folder, device=device)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        # The sorted teacher is the same function, and in float32 as on disk its pages are mapped: the workers of a machine hold it once.
        return load_model(self._folder / SORTED, dtype=self._dtype, device=self._device).requires_grad_(False)

    @cached_property
    def signals(self) -> SignalChoice:
        """Which signals the prepare step kept."""
        return SignalChoice(**json.loads((self._folder / SIGNALS / CHOICE).read_text(encoding="utf-8")))

    def validation(self, *, held_out: bool) -> Tensor:
        """The half of the validation blocks that compares the rungs, or the half that none of them sees."""
        half = len(self.blocks.validation_NT) // 2
        return self.blocks.validation_NT[half:] if held_out else self.blocks.validation_NT[:half]

    def validation_outputs(self, *, held_out: bool) -> TeacherOutputs:
        """The teacher on the blocks of `validation`."""
        if self.signals.kind is None:
            return RunningTeacher(self.teacher)
        return StoredTeacher(self._open(VALIDATION), first_row=len(self.blocks.validation_NT) // 2 if held_out else 0)

    @cached_property
    def moments(self) -> SecondMoments:
        """What reconstruction reads; the prepare step leaves it where the spec asks for reconstruction."""
        return load_moments(self._folder / MOMENTS)

    def objective(self, spec: SearchSpec, *, shape: Shape, rotated: bool) -> Objective:
        """What a student of this shape is trained towards on the training blocks.

        Args:
            rotated: its residual stream is not a choice of the teacher's channels (`Reconstruction.rotated`).
        """
        kind, states = self.signals.kind, spec.distillation.hidden_states
        if kind == "top_k" and states in ("auto", "off"):
            return StoredTopK(self._open(TRAIN))
        teacher = StoredTeacher(self._open(TRAIN)) if kind == "exact" else self.teacher
        if states == "off":
            return TeacherLogits(teacher)
        layers = self.sorting.layers[shape.num_hidden_layers] if states == "all" else None
        onto = stream_map(self.sorting, shape, moments=self.moments if rotated else None)  # of the sorted teacher, whose signals these are, too
        return TeacherStates(teacher, onto=onto, layers=layers)

    def keep_signals(self, spec: SearchSpec, *, report: Callable[[int, int], None]) -> SignalChoice:
        """Choose and build the signals, or find them built.

        Args:
            report: told (blocks done, all blocks); may raise to stop: whole shards stay.
        Raises:
            InvalidSpec: the kind that the spec asks for does not fit its budget or the disk.
        """
        folder = self._folder / SIGNALS
        folder.mkdir(exist_ok=True)
        shape, vocab_size = self.sorting.architecture.shape, self.sorting.architecture.vocab_size
        choice = choose_signals(
            "off" if spec.distillation.hidden_states == "all" else spec.distillation.signals,
            train_tokens=self.blocks.train_NT.numel(),
            validation_tokens=self.blocks.validation_NT.numel(),
            hidden_size=shape.hidden_size,
            vocab_size=vocab_size,
            bytes_per_element=2 if self._dtype == "bfloat16" else 4,
            top_k=spec.distillation.top_k,
            max_bytes=spec.distillation.max_signal_bytes,
            # What an attempt that was killed has written is no reason to choose otherwise.
            free_bytes=shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.iterdir()),
        )
        if choice.kind is not None:
            self._build(choice.kind, report=report)
        write_json(asdict(choice), target=folder / CHOICE)
        logger.info("signals: %s", choice.reason, extra={"action": "keep_signals", "kind": choice.kind, "bytes": choice.bytes})
        return choice

    def _build(self, kind: SignalKind, *, report: Callable[[int, int], None]) -> None:
        # Of the sorted teacher: its channels have another order than the registered one's, and shards of two orders must not meet under one head.
        _, facts = load_tensors(self._folder / SORTED, name=SORTING)
        total, before = len(self.blocks.train_NT) + len(self.blocks.validation_NT), 0
        parts: tuple[tuple[str, Tensor, SignalKind], ...] = ((TRAIN, self.blocks.train_NT, kind), (VALIDATION, self.blocks.validation_NT, "exact"))
        for part, blocks_NT, part_kind in parts:
            build_signals(
                self.teacher,
                blocks_NT=blocks_NT,
                part=part,
                kind=part_kind,
                top_k=self._top_k,
                folder=self._folder / SIGNALS,
                teacher_digest=facts["sha256"][WEIGHTS_FILE],
                batch_size=self._batch_size,
                report=partial(_report_part, report, before=before, total=total),
            )
            before += len(blocks_NT)

    def _open(self, part: str) -> StoredSignals:
        if part not in self._stored:
            self._stored[part] = StoredSignals(self._folder / SIGNALS, part=part, device=self._device, repair=self._repair)
        return self._stored[part]

    def _repair(self) -> None:
        """Make what is damaged again, and let go of the teacher that this took."""
        assert self.signals.kind is not None
        self._build(self.signals.kind, report=lambda done, of: None)
        del self.teacher


def _report_part(report: Callable[[int, int], None], done: int, of: int, *, before: int, total: int) -> None:
    report(before + done, total)


def load_shared(spec: SearchSpec, *, inputs: Mapping[str, Any], prepared: Path, device: str) -> Shared:
    """The shared inputs of a search; kept in memory for the process's next trial."""
    fewshot = tuple((task.name, task.num_fewshot) for task in spec.tasks)
    folders = tuple(task["folder"] for task in inputs["tasks"])
    key = (str(prepared), inputs["teacher"]["path"], teacher_dtype(spec, device=device), device, folders, fewshot)
    if key not in _shared:
        forget_shared()  # before the next one is loaded: two teachers may not fit
        _shared[key] = Shared(spec, inputs=inputs, prepared=prepared, device=device)
    return _shared[key]


_shared: dict[tuple[Any, ...], Shared] = {}
"""At most one entry: a worker process mostly runs the trials of one search."""


def forget_shared() -> None:
    """Let go of the teacher and all else that is kept for the next trial."""
    _shared.clear()
