"""The full distillation of one student: the training code of the rungs, with more tokens. And pruning without a search.

`nas distill` and `nas prune` are these functions; they need no server, no store and no Ray, and resume where they were killed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from nas.compress.corpus import Part, build_blocks, check_corpus
from nas.compress.distillation import HeldOut, Progress, TrainPlan, distil, evaluate_kl
from nas.compress.importance import measure_importance
from nas.compress.manifest import write_json
from nas.compress.slicing import build_student, kept_indices
from nas.compress.sorting import layer_damage, load_sorting, make_order, save_sorted, select_layers, sort_teacher
from nas.compress.teacher import check_teacher, load_model, load_tokenizer, write_checkpoint
from nas.errors import InvalidSpec, Problem
from nas.shape import Shape

WORK = ".work"
"""Inside the output folder: blocks and checkpoints, removed at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to distil a student; a bundle's `recipe.json` is one."""

    tokens: int
    learning_rate: float
    batch_size: int
    sequence_length: int
    warmup_tokens: int = 0
    decay_share: float = 0.2
    """The last share of the tokens, over which the rate falls linearly to zero."""
    weight_decay: float = 0.0
    validation_tokens: int = 32_768
    micro_batch_size: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size", "sequence_length", "validation_tokens"):
            if getattr(self, name) < 1:
                raise InvalidSpec(Problem(field=name, expected="an integer of at least 1", got=str(getattr(self, name))))
        if not 0 < self.learning_rate <= 1:
            raise InvalidSpec(Problem(field="learning_rate", expected="a number in (0, 1]", got=str(self.learning_rate)))

    @classmethod
    def read(cls, path: Path, **overrides: Any) -> Recipe:
        """A recipe file, with what the caller says on top; what is not a recipe's field is a note for people and is left out."""
        values = json.loads(path.read_text(encoding="utf-8"))["distillation"]
        unknown = [name for name in values if name not in {field.name for field in fields(cls)}]
        if unknown:
            raise InvalidSpec(*(Problem(field=f"distillation.{name}", expected="no such field", got=repr(values[name])) for name in unknown))
        return replace(cls(**values), **{name: value for name, value in overrides.items() if value is not None})


def distil_fully(
    recipe: Recipe,
    *,
    student: Path,
    teacher: Path,
    corpus: Sequence[Path],
    out: Path,
    device: str,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Distil a student checkpoint into `out`, a folder that plain transformers loads.

    Run again after a kill, it goes on from its last checkpoint.

    Returns:
        tokens, seconds, and held-out KL and loss before and after, with standard errors.
    Raises:
        TeacherUnavailable, CorpusUnavailable: an input cannot be used. Diverged: the loss is not finite. Stopped: asked to.
    """
    teacher_folder, student_folder = check_teacher(teacher).path, check_teacher(student).path
    tokenizer = load_tokenizer(teacher_folder)
    work = out / WORK
    part = Part(name="corpus", files=check_corpus(corpus).files)
    blocks = build_blocks(
        [part],
        tokenizer=tokenizer,
        sequence_length=recipe.sequence_length,
        train_tokens=recipe.tokens,
        calibration_tokens=recipe.sequence_length,
        validation_tokens=recipe.validation_tokens,
        seed=recipe.seed,
        folder=work / "blocks",
    )
    teacher_model = load_model(teacher_folder, dtype=recipe.dtype if device != "cpu" else "float32", device=device)
    teacher_model.requires_grad_(False)
    model = load_model(student_folder, dtype="float32", device=device)
    batch_size = recipe.micro_batch_size or recipe.batch_size
    before = evaluate_kl(model, teacher=teacher_model, blocks_NT=blocks.validation_NT, batch_size=batch_size)
    plan = TrainPlan(
        tokens=recipe.tokens,
        learning_rate=recipe.learning_rate,
        batch_size=recipe.batch_size,
        warmup_tokens=recipe.warmup_tokens,
        decay_tokens=int(recipe.tokens * recipe.decay_share),
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        dtype=recipe.dtype,
        micro_batch_size=recipe.micro_batch_size,
    )
    distilled = distil(
        model, teacher=teacher_model, blocks_NT=blocks.train_NT, plan=plan, checkpoint=work / "checkpoint", report=report, should_stop=should_stop
    )
    after = evaluate_kl(model, teacher=teacher_model, blocks_NT=blocks.validation_NT, batch_size=batch_size)
    write_checkpoint(model.state_dict(), config=model.config.to_dict(), tokenizer_from=student_folder, folder=out)
    summary = {
        "recipe": asdict(recipe),
        "tokens": distilled.tokens,
        "seconds": distilled.seconds,
        "held_out_before": _held_out(before),
        "held_out_after": _held_out(after),
    }
    write_json(summary, target=out / "distillation.json")
    shutil.rmtree(work)
    return summary


def prune_teacher(
    *,
    teacher: Path,
    shape: Shape,
    corpus: Sequence[Path],
    out: Path,
    device: str,
    sequence_length: int = 512,
    calibration_tokens: int = 131_072,
    importance: Literal["energy", "l2_mean"] = "energy",
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Cut one shape out of a teacher into `out`, a folder that plain transformers loads; `kept_indices.json` says what stayed.

    Raises:
        TeacherUnavailable, CorpusUnavailable: an input cannot be used. InvalidSpec: the shape cannot be cut out of this teacher.
    """
    checked = check_teacher(teacher)
    _check_cut(shape, teacher=checked.architecture.shape)
    model = load_model(checked.path, dtype="float32", device=device)
    work = out / WORK
    blocks_BT = _calibration_blocks(
        checked.path, corpus=corpus, sequence_length=sequence_length, calibration_tokens=calibration_tokens, seed=seed, folder=work / "blocks"
    )
    measured = measure_importance(model, blocks_BT=blocks_BT, method=importance, batch_size=batch_size)
    layers = select_layers(
        num_hidden_layers=checked.architecture.shape.num_hidden_layers,
        depths=[shape.num_hidden_layers],
        damage=layer_damage(model, blocks_BT=blocks_BT[: max(1, len(blocks_BT) // 4)], batch_size=batch_size),
    )
    order = make_order(measured, shape=checked.architecture.shape)
    state = sort_teacher(model, order=order, architecture=checked.architecture)
    save_sorted(work / "sorted", state=state, order=order, importance=measured, config=checked.config, layers=layers, tokenizer_from=checked.path)
    sorting = load_sorting(work / "sorted")
    student: PreTrainedModel = build_student(sorting, shape, dtype="float32", device="cpu")
    write_checkpoint(student.state_dict(), config=student.config.to_dict(), tokenizer_from=checked.path, folder=out)
    write_json(kept_indices(sorting, shape), target=out / "kept_indices.json")
    shutil.rmtree(work)
    return {"shape": shape.as_dict(), "parameters": sum(p.numel() for p in student.parameters()), "teacher_parameters": checked.parameters}


def _check_cut(shape: Shape, *, teacher: Shape) -> None:
    """What can be said before the weights are loaded; the rest is `slicing.check_sliceable`."""
    problems = [
        Problem(field=name, expected=f"at most the teacher's {getattr(teacher, name)}", got=str(getattr(shape, name)))
        for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_key_value_heads", "num_attention_heads")
        if getattr(shape, name) > getattr(teacher, name)
    ]
    if problems:
        raise InvalidSpec(*problems)


def _calibration_blocks(teacher: Path, *, corpus: Sequence[Path], sequence_length: int, calibration_tokens: int, seed: int, folder: Path) -> Tensor:
    part = Part(name="corpus", files=check_corpus(corpus).files)
    blocks = build_blocks(
        [part],
        tokenizer=load_tokenizer(teacher),
        sequence_length=sequence_length,
        train_tokens=sequence_length,
        calibration_tokens=calibration_tokens,
        validation_tokens=sequence_length,
        seed=seed,
        folder=folder,
    )
    return blocks.calibration_NT


def _held_out(measured: HeldOut) -> Mapping[str, float | None]:
    return {
        "kl": measured.kl,
        "kl_standard_error": measured.kl_standard_error,
        "loss": measured.loss,
        "loss_standard_error": measured.loss_standard_error,
    }
