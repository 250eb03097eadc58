"""One rung of one trial as a plain function: slice or resume, distil, score, save. Knows no store and no Ray.

It reads the folder that prepare.py left and keeps its own state in the trial's folder, so any process may run it, be
killed, and another may go on: `rung<r>/` holds the training checkpoint of a rung, `student/` the model of the last one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nas.compress.distillation import Diverged, Progress, distil
from nas.compress.fitting import check_disk_fits, fit_plan
from nas.compress.held_out import evaluate_kl
from nas.compress.manifest import save_tensors
from nas.compress.reconstruction import Reconstruction, load_reconstruction, rebuild_student, reconstruct_student, split_calibration
from nas.compress.slicing import build_student
from nas.compress.teacher import write_checkpoint
from nas.compress.train_plan import TrainPlan, make_plan
from nas.compress.train_state import TrainState, load_trunk, sound_checkpoint
from nas.errors import CorruptFile, NotFound, TaskUnavailable
from nas.evaluate.scores import MetricValue, TaskScore
from nas.files import write_json
from nas.memory import TeacherMemory, rung_disk
from nas.search.costs import closed_costs, measured_costs
from nas.search.layout import PROBE, RECONSTRUCTION, STUDENT, rung_folder
from nas.search.results import Metric, RungResult
from nas.search.shared import Shared, load_shared, teacher_dtype
from nas.shape import Shape
from nas.spec import SearchSpec, objective_metrics

PROBE_TOKENS = 64
"""Length of the text whose logits are kept."""

logger = logging.getLogger(__name__)


def run_rung(
    spec: SearchSpec,
    *,
    inputs: Mapping[str, Any],
    prepared: Path,
    shape: Shape,
    rung: int,
    folder: Path,
    device: str,
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    budget: int = 0,
    seed: int | None = None,
) -> RungResult:
    """Bring a shape to a rung and measure it there; at rung 0 also its latency under the budget's workloads, which no training changes.

    Args:
        prepared: folder of the prepare step.
        budget: index of the one that the shape was proposed for.
        folder: the trial's own, the same for all its rungs and attempts.
        seed: of the data order. None: the spec's, as all but repeats have it.
    Raises:
        Diverged: the loss or a score is not finite. Stopped: asked to; the state is saved.
        DoesNotFit: the memory or the disk is too small; nothing was trained.
    """
    seconds: dict[str, float] = {}
    clock = Clock(seconds)
    shared = load_shared(spec, inputs=inputs, prepared=prepared, device=device)
    plan = (
        None if rung == 0 else fitted_plan(spec, shared=shared, shape=shape, rung=rung, folder=folder, device=device, seed=spec.seed if seed is None else seed)
    )
    clock.lap("load")
    student, reconstruction = start_student(spec, shared=shared, shape=shape, folder=folder, device=device)
    clock.lap("slice")
    tokens = 0
    if plan is not None:
        distilled = distil(
            student,
            objective=shared.objective(spec, shape=shape, rotated=reconstruction is not None and reconstruction.rotated),
            blocks_NT=shared.blocks.train_NT,
            plan=plan,
            state=_trunk_below(folder, rung=rung),
            checkpoint=sound_checkpoint(rung_folder(folder, rung=rung)),
            report=report,
            should_stop=should_stop,
        )
        tokens = distilled.tokens
    clock.lap("distil")
    result = measure(
        spec,
        inputs=inputs,
        prepared=prepared,
        model=student,
        device=device,
        rung=rung,
        tokens=tokens,
        held_out=False,
        with_tasks=spec.scores_tasks(rung),
        budget=budget,
    )
    costs = dict(result.costs)
    clock.lap("evaluate")
    if rung == 0:
        costs |= measured_costs(student, workloads=spec.budgets[budget].latency, dtype=teacher_dtype(spec, device=device))
        clock.lap("latency")
    if rung == spec.rungs.num_trained:
        _save_student(student, shared=shared, folder=folder)
    clock.lap("save")
    return RungResult(**{**_fields(result), "seconds": seconds, "reconstruction": None if reconstruction is None else asdict(reconstruction), "costs": costs})


def start_student(spec: SearchSpec, *, shared: Shared, shape: Shape, folder: Path, device: str) -> tuple[PreTrainedModel, Reconstruction | None]:
    """The student before any training. How it was reconstructed is settled once and kept in the trial's folder: all rungs and attempts start from the same."""
    sorting, found = shared.sorting, load_reconstruction(folder / RECONSTRUCTION)
    if not spec.compression.reconstruction:
        return build_student(sorting, shape, dtype="float32", device=device), None
    if found is not None:
        return rebuild_student(sorting, shape, moments=shared.moments, result=found, dtype="float32", device=device), found
    student, result = reconstruct_student(
        sorting,
        shape,
        moments=shared.moments,
        held_out_NT=split_calibration(shared.blocks.calibration_NT)[1],
        dtype="float32",
        device=device,
        batch_size=spec.distillation.micro_batch_size or spec.distillation.batch_size,
        gains=spec.compression.norm_gains,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(asdict(result), target=folder / RECONSTRUCTION)
    return student, result


def fitted_plan(spec: SearchSpec, *, shared: Shared, shape: Shape, rung: int, folder: Path, device: str, seed: int) -> TrainPlan:
    """The plan of a rung as it fits this machine.

    Raises:
        DoesNotFit: with the numbers.
    """
    architecture, moments = shared.sorting.architecture, spec.distillation.moments
    check_disk_fits(rung_disk(architecture, shape), folder=folder, what=f"rung {rung}")
    return fit_plan(
        make_plan(spec.distillation, tokens=spec.rungs.tokens(rung), seed=seed, teacher_hidden_size=architecture.shape.hidden_size),
        architecture=architecture,
        shape=shape,
        teacher=TeacherMemory(architecture=architecture, dtype=teacher_dtype(spec, device=device), stored=shared.signals.kind is not None),
        sequence_length=spec.corpus.sequence_length,
        device=device,
        moments=None if moments == "auto" else moments,
    )


def _trunk_below(folder: Path, *, rung: int) -> TrainState | None:
    """The trunk that the rung below left. Without it the rung trains from the start: more tokens, the same student."""
    if rung == 1:
        return None
    try:
        return load_trunk(rung_folder(folder, rung=rung - 1))
    except (NotFound, CorruptFile) as damaged:
        logger.warning("trunk of rung %d is lost, training from the start", rung - 1, extra={"action": "trunk_lost", "reason": str(damaged)})
        return None


def measure(
    spec: SearchSpec,
    *,
    inputs: Mapping[str, Any],
    prepared: Path,
    model: PreTrainedModel,
    device: str,
    rung: int,
    tokens: int,
    held_out: bool,
    with_tasks: bool,
    budget: int = 0,
) -> RungResult:
    """KL and loss on the validation blocks, and the tasks: on the rungs' documents, or, by lm-eval itself, on those that no rung sees."""
    shared = load_shared(spec, inputs=inputs, prepared=prepared, device=device)
    batch_size = spec.distillation.micro_batch_size or spec.distillation.batch_size
    likelihood = evaluate_kl(model, teacher=shared.validation_outputs(held_out=held_out), blocks_NT=shared.validation(held_out=held_out), batch_size=batch_size)
    assert likelihood.kl_N is not None
    kl = Metric.from_documents(tuple(likelihood.kl_N.tolist()), higher_is_better=False)
    loss = Metric.from_documents(tuple(likelihood.loss_N.tolist()), higher_is_better=False)
    if not torch.isfinite(torch.tensor([kl.value, loss.value])).all():
        raise Diverged(step=0, tokens=tokens, what="KL or loss on the validation blocks")
    tasks: dict[str, Metric] = {}
    likelihoods: dict[str, dict[str, Metric]] = {}
    details: dict[str, Any] = {}
    if with_tasks:
        scores = shared.tasks.score_held_out(model) if held_out else shared.tasks.score(model)
        for name, metric in objective_metrics(spec, inputs=inputs).items():
            tasks[name] = paired_metric(scores.tasks[name], name=metric)
            if not math.isfinite(tasks[name].value):
                raise Diverged(step=0, tokens=tokens, what=f"{metric} of task {name}")
        likelihoods = {name: {form: paired_metric(task, name=form) for form in task.forms} for name, task in scores.tasks.items()}
        details = {name: {key: _finite(value) for key, value in task.metrics.items()} for name, task in scores.tasks.items()}
    costs = closed_costs(model, workload=spec.budgets[budget].workload)
    return RungResult(
        rung=rung,
        tokens=tokens,
        kl=kl,
        loss=loss,
        tasks=tasks,
        parameters=_count(model),
        seconds={},
        details=details,
        costs=costs,
        likelihoods=likelihoods,
    )


def _finite(value: MetricValue) -> dict[str, Any]:
    """A metric as plain JSON, which has no NaN; a metric that the objective does not read may be one (f1 without a hit)."""
    return {name: None if isinstance(number, float) and not math.isfinite(number) else number for name, number in asdict(value).items()}


def paired_metric(score: TaskScore, *, name: str) -> Metric:
    """A task's metric as a mean over documents, so that two trials are compared document by document.

    A ratio of sums is linearised (influence values): their mean is the metric and their standard error the delta method's.

    Raises:
        TaskUnavailable: the metric is no mean, ratio or perplexity over documents, so it cannot rank by paired differences.
    """
    value = score.metric(name)
    if name not in score.documents:
        raise TaskUnavailable(f"metric of task {score.name}: expected a mean over documents ({', '.join(score.documents)}), got {name!r}")
    parts = score.documents[name]
    total, count = math.fsum(parts.denominators), len(parts.numerators)
    ratio = math.fsum(parts.numerators) / total
    scale = math.exp(ratio) if parts.exponential else 1.0
    pairs = zip(parts.numerators, parts.denominators, strict=True)
    documents = tuple(parts.value + scale * (numerator - ratio * denominator) * count / total for numerator, denominator in pairs)
    paired = Metric.from_documents(documents, higher_is_better=value.higher_is_better)
    return Metric(value=value.value, standard_error=paired.standard_error, higher_is_better=value.higher_is_better, documents=documents)


def _save_student(student: PreTrainedModel, *, shared: Shared, folder: Path) -> None:
    write_checkpoint(student.state_dict(), config=student.config.to_dict(), tokenizer_from=shared.sorting.folder, folder=folder / STUDENT)
    tokens_BT = shared.blocks.validation_NT[:1, :PROBE_TOKENS].to(torch.int64)
    with torch.no_grad():
        logits_BTV = student(tokens_BT.to(student.device)).logits.float().cpu()
    save_tensors(folder, name=PROBE, tensors={"tokens_BT": tokens_BT, "logits_BTV": logits_BTV}, facts={})


def _count(model: PreTrainedModel) -> int:
    """Parameters of the tensors there are; a tied head is one tensor and counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _fields(result: RungResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in RungResult.__slots__}


class Clock:
    """Wall seconds between laps."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = now - self._last
        self._last = now
