"""The full distillation of one student: the training code of the rungs, with more tokens. And pruning without a search.

`nas distill` and `nas prune` are these functions; they need no server, no store and no Ray, and resume where they were killed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import PreTrainedModel

from nas.compress.corpus import Corpus, Part, build_blocks, check_corpus, load_blocks
from nas.compress.depth import DepthMethod, choose_layers
from nas.compress.distillation import Diverged, Progress, distil
from nas.compress.distributed import Spread, Spreading, World, shard_teacher
from nas.compress.fitting import Fitted, check_disk_fits, fit_run
from nas.compress.held_out import HeldOut, evaluate_kl
from nas.compress.importance import Method, measure_importance
from nas.compress.manifest import write_json
from nas.compress.objective import TeacherLogits
from nas.compress.reconstruction import Reconstruction, kept_of, reconstruct_student, split_calibration
from nas.compress.second_moments import measure_moments
from nas.compress.slicing import build_student
from nas.compress.sorting import Sorting, load_sorting, make_order, save_sorted, sort_teacher
from nas.compress.teacher import Teacher, check_teacher, load_model, load_tokenizer, write_checkpoint
from nas.compress.train_plan import TrainPlan, trunk_rate
from nas.compress.train_state import sound_checkpoint
from nas.errors import Conflict, CorruptFile, InvalidSpec, NotFound, Problem
from nas.memory import Moments, TeacherMemory, state_bytes
from nas.shape import Shape

WORK = ".work"
"""Inside the output folder: blocks and checkpoints, removed at the end."""
RUN = "run.json"
"""Inside the work folder: what the run depends on, so that another one does not go on from it."""
CHECKPOINT = "checkpoint"
SUMMARY, PRUNING = "distillation.json", "pruning.json"
"""What a finished run leaves in its folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to distil a student; a bundle's `recipe.json` is one."""

    tokens: int
    batch_size: int
    sequence_length: int
    learning_rate: float | None = None
    """Constant along the trunk; None: follows the loss (`trunk_rate`)."""
    warmup_tokens: int = 0
    decay_share: float = 0.2
    """The last share of the tokens, over which the rate falls linearly to zero."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.0
    validation_tokens: int = 32_768
    micro_batch_size: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    moments: Literal["auto", "float32", "offloaded", "bfloat16"] = "auto"
    """Optimiser state; auto: the first of them that fits."""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            Problem(field=name, expected=f"an integer of at least {least}", got=repr(value))
            for name, least in _INTEGERS.items()
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int) or value < least
        ]
        problems += [
            Problem(field=name, expected=f"a number in {interval}", got=repr(value))
            for name, (interval, holds) in _NUMBERS.items()
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, (int, float)) or not holds(value)
            if not (value is None and name == "learning_rate")
        ]
        if self.micro_batch_size is not None and (not isinstance(self.micro_batch_size, int) or self.micro_batch_size < 1):
            problems.append(Problem(field="micro_batch_size", expected="null or an integer of at least 1", got=repr(self.micro_batch_size)))
        if self.moments not in ("auto", *get_args(Moments)):
            problems.append(Problem(field="moments", expected=f"auto, {', '.join(get_args(Moments))}", got=repr(self.moments)))
        if self.dtype not in ("float32", "bfloat16"):
            problems.append(Problem(field="dtype", expected="float32 or bfloat16", got=repr(self.dtype)))
        if self.optimizer not in ("adamw", "muon"):
            problems.append(Problem(field="optimizer", expected="adamw or muon", got=repr(self.optimizer)))
        if not problems and self.validation_tokens < 2 * self.sequence_length:
            expected = f"at least two blocks of sequence_length={self.sequence_length}, whose spread is the standard error"
            problems.append(Problem(field="validation_tokens", expected=expected, got=str(self.validation_tokens)))
        if problems:
            raise InvalidSpec(*problems)

    @classmethod
    def read(cls, path: Path, **overrides: Any) -> Recipe:
        """The `distillation` of a recipe file, with what the caller says on top.

        Raises:
            InvalidSpec: no recipe, an unknown or missing field, or one out of range.
        """
        values = {**_read_recipe(path)["distillation"], **{name: value for name, value in overrides.items() if value is not None}}
        known = {field.name: field for field in fields(cls)}
        problems = [Problem(field=f"distillation.{name}", expected="no such field", got=repr(value)) for name, value in values.items() if name not in known]
        problems += [
            Problem(field=f"distillation.{name}", expected="a value", got="nothing")
            for name, field in known.items()
            if field.default is MISSING and name not in values
        ]
        if problems:
            raise InvalidSpec(*problems)
        return cls(**values)


_INTEGERS = {"tokens": 1, "batch_size": 1, "sequence_length": 8, "warmup_tokens": 0, "validation_tokens": 1, "seed": 0}
"""Least value of every integer of a recipe."""
_NUMBERS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": ("(0, 1] or null", lambda value: 0 < value <= 1),
    "decay_share": ("[0, 1)", lambda value: 0 <= value < 1),
    "weight_decay": ("[0, 10]", lambda value: 0 <= value <= 10),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeCorpus:
    """One corpus of the search's mixture."""

    name: str
    digest: str | None = None
    weight: float = 1.0
    """Its share of the blocks is weight / sum of weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeInputs:
    """The inputs that a recipe file was written for; one written by hand may leave them out."""

    teacher: str | None
    """Digest of the teacher that the student was cut out of."""
    corpora: tuple[RecipeCorpus, ...]
    teacher_folder: Path | None = None
    """The teacher that lies beside the recipe: a corrected one, which exists nowhere else."""

    @classmethod
    def read(cls, path: Path) -> RecipeInputs:
        """The `teacher` and `corpora` of a recipe file.

        Raises:
            InvalidSpec: no recipe, or they are not written as in a bundle's.
        """
        values = _read_recipe(path)
        try:
            teacher, folder = values.get("teacher", {}).get("digest"), values.get("teacher", {}).get("folder")
            teacher_folder = None if folder is None else path.parent / folder
            corpora = tuple(
                RecipeCorpus(**{name: entry[name] for name in ("name", "digest", "weight") if name in entry}) for entry in values.get("corpora", [])
            )
        except (AttributeError, TypeError) as error:
            expected = "`teacher` with a digest and `corpora`, a list with name, digest and weight, as in a bundle's recipe.json"
            raise InvalidSpec(Problem(field=str(path), expected=expected, got=f"{type(error).__name__}: {error}")) from error
        problems = [
            Problem(field=f"corpora.{index}.weight", expected="a number above 0", got=repr(corpus.weight))
            for index, corpus in enumerate(corpora)
            if isinstance(corpus.weight, bool) or not isinstance(corpus.weight, (int, float)) or not 0 < corpus.weight < math.inf
        ]
        if problems:
            raise InvalidSpec(*problems)
        return cls(teacher=teacher, corpora=corpora, teacher_folder=teacher_folder)


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values["distillation"], dict):
            raise TypeError(f"distillation is {values['distillation']!r}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        expected = "a JSON file with the object `distillation`, such as a bundle's recipe.json"
        raise InvalidSpec(Problem(field=str(path), expected=expected, got=f"{type(error).__name__}: {error}")) from error
    assert isinstance(values, dict)
    return values


def distil_fully(
    recipe: Recipe,
    *,
    student: Path,
    teacher: Path,
    corpora: Sequence[tuple[Corpus, float]],
    out: Path,
    device: str,
    expected_teacher: str | None = None,
    world: World | None = None,
    spreading: Spreading | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Distil a student checkpoint into `out`, a folder that plain transformers loads.

    Run again after a kill, it goes on from its last checkpoint; run again when it is done, it returns what it returned then.

    Args:
        corpora: the mixture, each with its weight.
        device: of this process.
        expected_teacher: digest of the teacher that the student was cut out of; None: not known.
        world: the processes that call this with the same arguments, and see the same folders; None: one process.
        spreading: of the student over them; None: every process holds it all where it fits, else a part. A teacher is whole where it fits.
    Returns:
        tokens, seconds, and held-out KL and loss before and after, with standard errors.
    Raises:
        TeacherUnavailable, CorpusUnavailable: an input cannot be used. InvalidSpec: student, teacher and recipe do not fit each other.
        Conflict: `out` holds something else, or a run with another recipe or other inputs. Diverged: the loss is not finite. Stopped: asked to.
        DoesNotFit: no setting fits the memory or the disk; the message has the numbers.
    """
    world = world or World(device=device)
    checked_teacher, checked_student = world.once(lambda: (check_teacher(teacher), check_teacher(student)))
    _check_pair(recipe, student=checked_student, teacher=checked_teacher, expected_teacher=expected_teacher)
    world.check_batch(recipe.batch_size)
    facts = {
        "recipe": asdict(recipe),
        "digests": {"teacher": checked_teacher.digest, "student": checked_student.digest, "corpora": [corpus.digest for corpus, _ in corpora]},
        "weights": [weight for _, weight in corpora],
    }
    work = world.once(partial(_claim, out, mark=SUMMARY, facts=facts, inputs=(teacher, student)))
    if (out / SUMMARY).exists():
        world.once(partial(shutil.rmtree, work, ignore_errors=True))
        return _read_object(out / SUMMARY)
    fitted = _fit(recipe, student=checked_student, teacher=checked_teacher, folder=out, world=world, spreading=spreading)
    world.once(partial(_make_blocks, recipe, corpora=corpora, teacher=checked_teacher, folder=work / "blocks"))
    blocks = load_blocks(work / "blocks")
    teacher_model, spread = _load(recipe, student=checked_student, teacher=checked_teacher, fitted=fitted, world=world)
    batch_size = fitted.plan.micro_batch_size or recipe.batch_size
    held_out = partial(evaluate_kl, teacher=teacher_model, blocks_NT=blocks.validation_NT, batch_size=batch_size)
    before = _held_out(spread.run(held_out), recipe=recipe, tokens=0)
    checkpoint = world.once(partial(sound_checkpoint, work / CHECKPOINT))
    distilled = distil(
        spread.student,
        objective=TeacherLogits(teacher_model),
        blocks_NT=blocks.train_NT,
        plan=fitted.plan,
        checkpoint=checkpoint,
        report=report,
        should_stop=should_stop,
        spread=spread,
    )
    after = _held_out(spread.run(held_out), recipe=recipe, tokens=distilled.tokens)
    state, config = spread.whole_state(), spread.student.config.to_dict()
    world.once(lambda: write_checkpoint(state, config=config, tokenizer_from=checked_student.path, folder=out))
    summary = {**facts, "tokens": distilled.tokens, "seconds": distilled.seconds, "held_out_before": before, "held_out_after": after}
    world.once(partial(write_json, summary, target=out / SUMMARY))
    world.once(partial(shutil.rmtree, work))
    return summary


def _fit(recipe: Recipe, *, student: Teacher, teacher: Teacher, folder: Path, world: World, spreading: Spreading | None) -> Fitted:
    """The run's plan as it fits the machine, and how the models are spread."""
    state = state_bytes(student.architecture, student.architecture.shape)
    # Trunk, branch, and the one of them that replaces an older one; the result is smaller than what is removed for it.
    world.once(partial(check_disk_fits, {"checkpoints of the training": 3 * state}, folder=folder, what="the run"))
    return fit_run(
        _train_plan(recipe, teacher=teacher),
        architecture=student.architecture,
        teacher=TeacherMemory(architecture=teacher.architecture, dtype=_teacher_dtype(recipe, device=world.device)),
        sequence_length=recipe.sequence_length,
        world=world,
        moments=None if recipe.moments == "auto" else recipe.moments,
        spreading=spreading,
    )


def _load(recipe: Recipe, *, student: Teacher, teacher: Teacher, fitted: Fitted, world: World) -> tuple[PreTrainedModel, Spread]:
    """The teacher, frozen, and the student, each whole or in shards. What is sharded is read into the host's memory first."""
    dtype = _teacher_dtype(recipe, device=world.device)
    teacher_model = load_model(teacher.path, dtype=dtype, device="cpu" if fitted.teacher_sharded else world.device)
    teacher_model.requires_grad_(False)
    if fitted.teacher_sharded:
        shard_teacher(teacher_model, world=world)
    model = load_model(student.path, dtype="float32", device="cpu" if fitted.spreading == "sharded" else world.device)
    return teacher_model, Spread(model, world=world, spreading=fitted.spreading)


def _teacher_dtype(recipe: Recipe, *, device: str) -> str:
    return recipe.dtype if device != "cpu" else "float32"


def _check_pair(recipe: Recipe, *, student: Teacher, teacher: Teacher, expected_teacher: str | None) -> None:
    problems = []
    if expected_teacher is not None and teacher.digest != expected_teacher:
        expected = f"the one that the student was cut out of, digest {expected_teacher}"
        problems.append(Problem(field="teacher", expected=expected, got=f"{teacher.path}, digest {teacher.digest}"))
    if student.architecture.vocab_size != teacher.architecture.vocab_size:
        expected = f"the teacher's vocabulary of {teacher.architecture.vocab_size} (a student is distilled by the teacher that it was cut out of)"
        problems.append(Problem(field="student", expected=expected, got=f"one of {student.architecture.vocab_size}"))
    for name, model in (("teacher", teacher), ("student", student)):
        problems += _check_context(recipe.sequence_length, name=name, model=model)
    if problems:
        raise InvalidSpec(*problems)


def _check_context(sequence_length: int, *, name: str, model: Teacher) -> list[Problem]:
    context = model.config.get("max_position_embeddings")
    if not isinstance(context, int) or sequence_length <= context:
        return []
    return [Problem(field="sequence_length", expected=f"at most the {name}'s context of {context}", got=str(sequence_length))]


def _claim(out: Path, *, mark: str, facts: Mapping[str, Any], inputs: Sequence[Path]) -> Path:
    """The work folder inside `out`, once it is sure that `out` is free, or holds this very run, begun or done.

    Args:
        mark: file in `out` that a finished run leaves.
        facts: all that the result depends on.
    """
    if out.resolve() in {path.resolve() for path in inputs}:
        raise Conflict(f"out: expected a folder of its own, got the folder of an input: {out}")
    work = out / WORK
    done, begun = (out / mark).exists(), (work / RUN).exists()
    if not done and not begun and out.exists() and any(path.name != WORK for path in out.iterdir()):
        raise Conflict(f"out: expected a new or empty folder, or one of an earlier run, got one with other files: {out}")
    differences = _differences(facts, _read_object(out / mark if done else work / RUN)) if done or begun else []
    if differences and (done or (work / CHECKPOINT).exists()):
        raise Conflict(f"out: {out} holds another run; " + "; ".join(differences) + "; give it another folder")
    if differences:  # nothing was trained: an attempt that failed at once does not bind the next one
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(facts, target=work / RUN)
    return work


def _differences(wanted: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """What is not the same in two runs, as `field: expected what is there, got what is wanted`."""
    found = []
    for name, value in wanted.items():
        if isinstance(value, Mapping) and isinstance(there.get(name), Mapping):
            found += _differences(value, there[name])
        elif json.loads(json.dumps(value)) != there.get(name):
            found.append(f"{name}: expected {there.get(name)}, with which it was begun, got {value}")
    return found


def _read_object(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def _make_blocks(recipe: Recipe, *, corpora: Sequence[tuple[Corpus, float]], teacher: Teacher, folder: Path) -> None:
    """The run's blocks, unless those of an earlier call are whole."""
    try:
        load_blocks(folder)
    except (NotFound, CorruptFile):
        build_blocks(
            [Part(name=corpus.files[0].name, files=corpus.files, weight=weight) for corpus, weight in corpora],
            tokenizer=load_tokenizer(teacher.path),
            sequence_length=recipe.sequence_length,
            train_tokens=recipe.tokens,
            calibration_tokens=recipe.sequence_length,
            validation_tokens=recipe.validation_tokens,
            seed=recipe.seed,
            folder=folder,
        )


def _train_plan(recipe: Recipe, *, teacher: Teacher) -> TrainPlan:
    learning_rate, rate_follows_loss = trunk_rate(recipe.learning_rate, teacher_hidden_size=teacher.architecture.shape.hidden_size)
    return TrainPlan(
        tokens=recipe.tokens,
        learning_rate=learning_rate,
        rate_follows_loss=rate_follows_loss,
        batch_size=recipe.batch_size,
        warmup_tokens=recipe.warmup_tokens,
        decay_tokens=int(recipe.tokens * recipe.decay_share),
        optimizer=recipe.optimizer,
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        dtype=recipe.dtype,
        micro_batch_size=recipe.micro_batch_size,
    )


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
    work = _claim(out, mark=PRUNING, facts=facts, inputs=(teacher,))
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
    problems += _check_context(sequence_length, name="teacher", model=teacher)
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


def _held_out(measured: HeldOut, *, recipe: Recipe, tokens: int) -> dict[str, float]:
    """The likelihood as plain JSON.

    Raises:
        Diverged: it is not finite, as when the last step, after which no loss is looked at, broke the weights.
    """
    assert measured.kl is not None
    assert measured.kl_standard_error is not None
    values = {
        "kl": measured.kl,
        "kl_standard_error": measured.kl_standard_error,
        "loss": measured.loss,
        "loss_standard_error": measured.loss_standard_error,
    }
    if not all(math.isfinite(value) for value in values.values()):
        raise Diverged(tokens // (recipe.batch_size * recipe.sequence_length), tokens, "KL or loss on the validation blocks")
    return values
