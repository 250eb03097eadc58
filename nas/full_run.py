"""The full distillation of one student: the training code of the rungs, with more tokens.

`nas distill` is this function; it needs no server, no store and no Ray, and resumes where it was killed.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from nas.compress.blocks import Part, build_blocks, load_blocks
from nas.compress.corpus import Corpus
from nas.compress.distillation import Diverged, Progress, distil
from nas.compress.distributed import Spread, Spreading, World, shard_teacher
from nas.compress.fitting import Fitted, check_disk_fits, fit_run
from nas.compress.held_out import HeldOut, evaluate_kl
from nas.compress.objective import TeacherLogits
from nas.compress.teacher import Teacher, check_context, check_teacher, load_model, load_tokenizer, write_checkpoint
from nas.compress.train_plan import make_plan
from nas.compress.train_state import sound_checkpoint
from nas.errors import CorruptFile, InvalidSpec, NotFound, Problem
from nas.files import write_json
from nas.memory import TeacherMemory, state_bytes
from nas.recipe import Recipe
from nas.run_folder import CHECKPOINT, claim, read_run

SUMMARY = "distillation.json"
"""What a finished run leaves in its folder."""


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
    work = world.once(partial(claim, out, mark=SUMMARY, facts=facts, inputs=(teacher, student)))
    if (out / SUMMARY).exists():
        world.once(partial(shutil.rmtree, work, ignore_errors=True))
        return read_run(out / SUMMARY)
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
        make_plan(recipe, tokens=recipe.tokens, seed=recipe.seed, teacher_hidden_size=teacher.architecture.shape.hidden_size),
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
        problems += check_context(recipe.sequence_length, name=name, model=model)
    if problems:
        raise InvalidSpec(*problems)


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
