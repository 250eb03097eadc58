"""A teacher of the reference material, cut-ready: packed text, importance, the layers of every depth and the sorted teacher, made once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nas.compress.corpus import Blocks, Part, build_blocks, load_blocks
from nas.compress.importance import measure_importance
from nas.compress.sorting import Sorting, layer_damage, load_sorting, make_order, save_sorted, select_layers, sort_teacher
from nas.compress.teacher import CONFIG_FILE, load_model, load_tokenizer
from nas.errors import NotFound
from nas.families import read_architecture
from tests.benchmarks.reference import reference_folder

SEQUENCE_LENGTH = 128
TRAIN_TOKENS = 10_000_000
CALIBRATION_TOKENS = 65_536
HELD_OUT_TOKENS = 65_536
DEPTH_TOKENS = 16_384
Choices = Literal["ours", "minitron"]
"""How importance and depth are chosen: our defaults, or what Minitron published ((L2, mean) and block influence)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """One teacher and its text; `blocks.train_NT` is all that the corpus has, up to TRAIN_TOKENS."""

    name: str
    teacher: PreTrainedModel
    blocks: Blocks
    sorting: Sorting


def load_subject(name: str, *, choices: Choices, cache: Path) -> Subject:
    """The teacher `name` of the reference material; what takes long is kept in `cache`."""
    reference = reference_folder()
    source, folder = reference / "models" / name, cache / name
    teacher = load_model(source, dtype="float32", device="cpu").requires_grad_(False)
    try:
        blocks = load_blocks(folder / "blocks")
    except NotFound:
        blocks = build_blocks(
            [Part(name="tinystories", files=(reference / "data" / "text" / "tinystories" / "train.jsonl",))],
            tokenizer=load_tokenizer(source),
            sequence_length=SEQUENCE_LENGTH,
            train_tokens=TRAIN_TOKENS,
            calibration_tokens=CALIBRATION_TOKENS,
            validation_tokens=HELD_OUT_TOKENS,
            seed=0,
            folder=folder / "blocks",
        )
    try:
        sorting = load_sorting(folder / choices)
    except NotFound:
        _sort(teacher, source=source, calibration_NT=blocks.calibration_NT, choices=choices, folder=folder / choices)
        sorting = load_sorting(folder / choices)
    return Subject(name=name, teacher=teacher, blocks=blocks, sorting=sorting)


def _sort(teacher: PreTrainedModel, *, source: Path, calibration_NT: Tensor, choices: Choices, folder: Path) -> None:
    config = teacher.config.to_dict()
    architecture = read_architecture(config)
    num_layers = architecture.shape.num_hidden_layers
    importance = measure_importance(teacher, blocks_BT=calibration_NT, method="energy" if choices == "ours" else "l2_mean", batch_size=16)
    depths = range(num_layers // 2, num_layers + 1)
    if choices == "ours":
        damage = layer_damage(teacher, blocks_BT=calibration_NT[: DEPTH_TOKENS // SEQUENCE_LENGTH], batch_size=16)
        layers = select_layers(num_hidden_layers=num_layers, depths=depths, damage=damage)
    else:
        ranked = torch.argsort(importance.block_influence_L, descending=True, stable=True).tolist()
        layers = {depth: tuple(sorted(ranked[:depth])) for depth in depths}
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
