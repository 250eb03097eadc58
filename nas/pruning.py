"""Pruning without a search: teacher and shape to a checkpoint that plain transformers loads. `nas prune` is this function."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from nas.compress.blocks import Part, build_blocks
from nas.compress.corpus import Corpus, check_corpus
from nas.compress.depth import DepthMethod, choose_layers
from nas.compress.importance import Method, measure_importance
from nas.compress.reconstruction import Reconstruction, kept_of, reconstruct_student, split_calibration
from nas.compress.second_moments import measure_moments
from nas.compress.slicing import build_student
from nas.compress.sorting import Sorting, load_sorting, make_order, save_sorted, sort_teacher
from nas.compress.teacher import Teacher, check_context, check_teacher, load_model, load_tokenizer, write_checkpoint
from nas.errors import InvalidSpec, Problem
from nas.files import write_json
from nas.run_folder import claim
from nas.shape import Shape

PRUNING = "pruning.json"
"""What a finished run leaves in its folder."""


def prune_teacher(
    *,
    teacher: Path,
    shape: Shape,
    corpus: Sequence[Path],
    out: Path,
    device: str,
    sequence_length: int = 512,
    calibration_tokens: int = 131_072,
    importance: Method = "energy",
    depth: DepthMethod = "bridged_damage",
    reconstruction: bool = True,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Cut one shape out of a teacher into `out`, a folder that plain transformers loads; `kept_indices.json` says what stayed.

    Raises:
        TeacherUnavailable, CorpusUnavailable: an input cannot be used. InvalidSpec: the shape cannot be cut out of this teacher,
            or the sequence is longer than its context. Conflict: `out` holds something else, or another pruned student.
    """
    checked = check_teacher(teacher)
    _check_cut(shape, teacher=checked, sequence_length=sequence_length)
    checked_corpus = check_corpus(corpus)
    facts = {
        "shape": shape.as_dict(),
        "digests": {"teacher": checked.digest, "corpus": checked_corpus.digest},
        "importance": importance,
        "depth": depth,
        "reconstruction": reconstruction,
        "sequence_length": sequence_length,
        "calibration_tokens": calibration_tokens,
        "seed": seed,
    }
    work = claim(out, mark=PRUNING, facts=facts, inputs=(teacher,))
    model = load_model(checked.path, dtype="float32", device=device)
    blocks_BT = _calibration_blocks(
        checked.path, corpus=checked_corpus, sequence_length=sequence_length, calibration_tokens=calibration_tokens, seed=seed, folder=work / "blocks"
    )
    measured = measure_importance(model, blocks_BT=blocks_BT, method=importance, batch_size=batch_size)
    layers = choose_layers(model, method=depth, importance=measured, depths=[shape.num_hidden_layers], blocks_BT=blocks_BT, batch_size=batch_size)
    order = make_order(measured, shape=checked.architecture.shape)
    state = sort_teacher(model, order=order, architecture=checked.architecture)
    save_sorted(work / "sorted", state=state, order=order, importance=measured, config=checked.config, layers=layers, tokenizer_from=checked.path)
    sorting = load_sorting(work / "sorted")
    del model, state
    student, result = _pruned_student(sorting, shape, blocks_BT=blocks_BT, folder=work / "moments", device=device, batch_size=batch_size, fit=reconstruction)
    write_checkpoint(student.state_dict(), config=student.config.to_dict(), tokenizer_from=checked.path, folder=out)
    write_json(kept_of(sorting, shape, result=result), target=out / "kept_indices.json")
    write_json(facts, target=out / PRUNING)
    shutil.rmtree(work)
    return {
        "shape": shape.as_dict(),
        "parameters": sum(p.numel() for p in student.parameters()),
        "teacher_parameters": checked.parameters,
        "reconstruction": None if result is None else asdict(result),
    }


def _pruned_student(
    sorting: Sorting, shape: Shape, *, blocks_BT: Tensor, folder: Path, device: str, batch_size: int, fit: bool
) -> tuple[PreTrainedModel, Reconstruction | None]:
    """The plain slice, or where `fit` the reconstructed one if it is better."""
    if not fit:
        return build_student(sorting, shape, dtype="float32", device="cpu"), None
    measured_BT, held_out_BT = split_calibration(blocks_BT)
    model = load_model(sorting.folder, dtype="float32", device=device)
    moments = measure_moments(model, sorting=sorting, blocks_BT=measured_BT, folder=folder, batch_size=batch_size)
    del model
    return reconstruct_student(sorting, shape, moments=moments, held_out_NT=held_out_BT, dtype="float32", device=device, batch_size=batch_size)


def _check_cut(shape: Shape, *, teacher: Teacher, sequence_length: int) -> None:
    """What `slicing.check_sliceable` would refuse after all the measuring, and a sequence beyond the context: told before the text is read."""
    whole = teacher.architecture.shape
    problems = [
        Problem(field=name, expected=f"at most the teacher's {getattr(whole, name)}", got=str(getattr(shape, name)))
        for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_key_value_heads", "num_attention_heads", "num_experts")
        if (getattr(shape, name) or 0) > (getattr(whole, name) or 0)
    ]
    if shape.head_dim != whole.head_dim:
        problems.append(Problem(field="head_dim", expected=f"the teacher's {whole.head_dim}", got=str(shape.head_dim)))
    problems.extend(teacher.architecture.refusals(shape))
    problems += check_context(sequence_length, name="teacher", model=teacher)
    if not problems and shape.query_heads_per_kv > whole.query_heads_per_kv:
        expected = f"at most the teacher's {whole.query_heads_per_kv} query heads per KV head"
        problems.append(Problem(field="num_attention_heads", expected=expected, got=f"{shape.num_attention_heads} for {shape.num_key_value_heads} KV heads"))
    if problems:
        raise InvalidSpec(*problems)


def _calibration_blocks(teacher: Path, *, corpus: Corpus, sequence_length: int, calibration_tokens: int, seed: int, folder: Path) -> Tensor:
    blocks = build_blocks(
        [Part(name=corpus.files[0].name, files=corpus.files)],
        tokenizer=load_tokenizer(teacher),
        sequence_length=sequence_length,
        train_tokens=sequence_length,
        calibration_tokens=calibration_tokens,
        validation_tokens=sequence_length,
        seed=seed,
        folder=folder,
    )
    return blocks.calibration_NT
