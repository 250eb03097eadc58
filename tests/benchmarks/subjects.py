"""A teacher of the reference material, ready to be cut: packed text, importance, the layers of every depth, the sorted teacher, its signals; made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from nas.architecture import read_architecture
from nas.compress.blocks import Blocks, Part, build_blocks, load_blocks
from nas.compress.depth import DepthMethod, choose_layers
from nas.compress.importance import Method, measure_importance
from nas.compress.reconstruction import split_calibration
from nas.compress.second_moments import SecondMoments, load_moments, measure_moments
from nas.compress.signals import StoredSignals, StoredTeacher, build_signals
from nas.compress.sorting import Sorting, load_sorting, make_order, save_sorted, sort_teacher
from nas.compress.teacher import load_model, load_tokenizer
from nas.compress.teacher_outputs import RunningTeacher, TeacherOutputs
from nas.compress.untrusted import CONFIG_FILE
from nas.errors import NotFound
from tests.benchmarks.reference import reference_folder

SEQUENCE_LENGTH = 128
CALIBRATION_TOKENS = 65_536
HELD_OUT_TOKENS = 65_536
MOST_TRAIN_TOKENS = 10_000_000
MOST_SIGNAL_TOKENS = 2**21
"""Up to so many training tokens the teacher's outputs are stored; beyond, it runs beside the student."""

Choices = Literal["ours", "plain", "minitron"]
"""How importance and depth are chosen: our defaults, our defaults where nothing is reconstructed, or what Minitron published."""
SELECTION: Mapping[Choices, tuple[Method, DepthMethod]] = {
    "ours": ("energy", "bridged_damage"),
    "plain": ("energy", "damage"),
    "minitron": ("l2_mean", "block_influence"),
}
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """One teacher and its text."""

    teacher: PreTrainedModel
    """Sorted, as are the signals."""
    train_NT: Tensor
    calibration_NT: Tensor
    held_out_NT: Tensor
    outputs: TeacherOutputs
    """On the training blocks."""
    held_out_outputs: TeacherOutputs
    sorting: Sorting
    moments: SecondMoments
    """Of the sorted teacher, on the first part of the calibration blocks."""


def load_subject(name: str, *, choices: Choices, train_tokens: int, cache: Path) -> Subject:
    """The teacher `name` of the reference material with the first `train_tokens` of its text; what takes long is kept in `cache`."""
    reference = reference_folder()
    source, folder = reference / "models" / name, cache / name
    blocks = _once(
        lambda: load_blocks(folder / "blocks"), make=lambda: _pack(source, text=reference / "data" / "text" / "tinystories", folder=folder / "blocks")
    )
    sorting = _once(lambda: load_sorting(folder / choices), make=lambda: _sort(source=source, blocks=blocks, choices=choices, folder=folder / choices))
    teacher = load_model(sorting.folder, dtype="float32", device="cpu").requires_grad_(False)
    moments = _once(lambda: load_moments(folder / choices / "moments"), make=lambda: _measure(sorting, blocks=blocks, folder=folder / choices / "moments"))
    train_NT = blocks.train_NT[: train_tokens // SEQUENCE_LENGTH]
    return Subject(
        teacher=teacher,
        train_NT=train_NT,
        calibration_NT=blocks.calibration_NT,
        held_out_NT=blocks.validation_NT,
        outputs=_stored(teacher, train_NT, folder=folder / choices, part="train") if train_tokens <= MOST_SIGNAL_TOKENS else RunningTeacher(teacher),
        held_out_outputs=_stored(teacher, blocks.validation_NT, folder=folder / choices, part="held_out"),
        sorting=sorting,
        moments=moments,
    )


def _measure(sorting: Sorting, *, blocks: Blocks, folder: Path) -> None:
    model = load_model(sorting.folder, dtype="float32", device="cpu")
    measure_moments(model, sorting=sorting, blocks_BT=split_calibration(blocks.calibration_NT)[0], folder=folder, batch_size=16)


def _once(load: Callable[[], T], *, make: Callable[[], object]) -> T:
    try:
        return load()
    except NotFound:
        make()
        return load()


def _pack(source: Path, *, text: Path, folder: Path) -> None:
    build_blocks(
        [Part(name=text.name, files=(text / "train.jsonl",))],
        tokenizer=load_tokenizer(source),
        sequence_length=SEQUENCE_LENGTH,
        train_tokens=MOST_TRAIN_TOKENS,
        calibration_tokens=CALIBRATION_TOKENS,
        validation_tokens=HELD_OUT_TOKENS,
        seed=0,
        folder=folder,
    )


def _sort(*, source: Path, blocks: Blocks, choices: Choices, folder: Path) -> None:
    teacher = load_model(source, dtype="float32", device="cpu")
    architecture = read_architecture(teacher.config.to_dict())
    num_layers = architecture.shape.num_hidden_layers
    depths = range(num_layers // 2, num_layers + 1)
    method, depth = SELECTION[choices]
    importance = measure_importance(teacher, blocks_BT=blocks.calibration_NT, method=method, batch_size=16)
    layers = choose_layers(teacher, method=depth, importance=importance, depths=depths, blocks_BT=blocks.calibration_NT, batch_size=16)
    order = make_order(importance, architecture.shape)
    save_sorted(
        folder,
        state=sort_teacher(teacher, order=order, architecture=architecture),
        order=order,
        importance=importance,
        config=json.loads((source / CONFIG_FILE).read_text(encoding="utf-8")),
        layers=layers,
        tokenizer_from=source,
    )


def _stored(teacher: PreTrainedModel, blocks_NT: Tensor, *, folder: Path, part: str) -> TeacherOutputs:
    """Exact signals of these blocks."""
    part = f"{part}_{len(blocks_NT)}"

    def make() -> None:
        build_signals(teacher, blocks_NT=blocks_NT, part=part, kind="exact", top_k=1, folder=folder / "signals", teacher_digest=folder.name, batch_size=16)

    return StoredTeacher(_once(lambda: StoredSignals(folder / "signals", part=part), make=make))
