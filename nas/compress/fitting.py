"""Whether training, a teacher and files fit this machine, asked before anything is loaded. The numbers come from nas/memory.py."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from nas.architecture import Architecture
from nas.compress.device import capacity, free_disk, multiplies_bfloat16
from nas.compress.distributed import Spreading, World
from nas.compress.train_plan import TrainPlan
from nas.errors import DoesNotFit, InvalidSpec, Problem
from nas.memory import Capacity, Moments, TeacherMemory, Training, explain, fit_training, inference_memory, table, written
from nas.shape import Shape

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A plan that fits, and how the models of the run are spread over its processes."""

    plan: TrainPlan
    spreading: Spreading = "replicated"
    teacher_sharded: bool = False


def fit_plan(
    plan: TrainPlan,
    *,
    architecture: Architecture,
    shape: Shape,
    teacher: TeacherMemory | None,
    sequence_length: int,
    device: str,
    moments: Moments | None = None,
) -> TrainPlan:
    """The plan with the micro-batch, checkpointing and kind of moments that fit this device; all but bfloat16 moments give the same student.

    Args:
        moments: None: the first that fits of float32, offloaded, bfloat16.
    Raises:
        DoesNotFit: nothing does; the message has the least that is needed, by component.
    """
    wanted = _wanted(plan, sequence_length=sequence_length, device=device, processes=1)
    kinds = (moments,) if moments else get_args(Moments)
    return _fit(plan, architecture=architecture, shape=shape, wanted=wanted, teacher=teacher, there=capacity(device), kinds=kinds)


def fit_run(
    plan: TrainPlan,
    *,
    architecture: Architecture,
    teacher: TeacherMemory,
    sequence_length: int,
    world: World,
    moments: Moments | None,
    spreading: Spreading | None,
) -> Fitted:
    """As `fit_plan`, for a run over the processes of a world: every model whole in each of them where it fits, else first the student sharded, then the
    teacher too. All processes get the same answer.

    Args:
        spreading: of the student; None: chosen.
    Raises:
        DoesNotFit: as `fit_plan`. InvalidSpec: Muon on shards.
    """
    shape, device = architecture.shape, world.device
    if world.size == 1:
        fitted = fit_plan(plan, architecture=architecture, shape=shape, teacher=teacher, sequence_length=sequence_length, device=device, moments=moments)
        return Fitted(plan=fitted)
    if plan.optimizer == "muon" and spreading == "sharded":
        raise InvalidSpec(Problem(field="optimizer", expected="adamw where the weights are sharded (muon needs whole matrices)", got="muon"))
    there = _agreed_capacity(world)
    wanted = _wanted(plan, sequence_length=sequence_length, device=device, processes=world.size)
    refused: DoesNotFit | None = None
    for student, teacher_sharded in (("replicated", False), ("sharded", False), ("replicated", True), ("sharded", True)):
        if spreading not in (None, student) or (student == "sharded" and plan.optimizer == "muon"):
            continue
        # Sharding is dearer than checkpointing, but not than moments that travel or are rounded.
        kinds: tuple[Moments, ...] = (moments,) if moments else ("float32",) if student == "replicated" else ("float32", "bfloat16")
        setting = replace(wanted, num_shards=world.size if student == "sharded" else 1)
        beside = replace(teacher, num_shards=world.size if teacher_sharded else 1)
        try:
            fitted = _fit(plan, architecture=architecture, shape=shape, wanted=setting, teacher=beside, there=there, kinds=kinds)
        except DoesNotFit as error:
            refused = error
        else:
            return Fitted(plan=fitted, spreading="sharded" if student == "sharded" else "replicated", teacher_sharded=teacher_sharded)
    assert refused is not None
    raise DoesNotFit(f"on each of {world.size} processes, {refused}")


def _agreed_capacity(world: World) -> Capacity:
    """What every process has: of the host's memory an equal part each."""
    there = capacity(world.device)
    host = there.host_bytes // world.processes_on_host
    return replace(there, device_bytes=world.least(there.device_bytes if there.device == "cuda" else host), host_bytes=world.least(host))


def _wanted(plan: TrainPlan, *, sequence_length: int, device: str, processes: int) -> Training:
    kind, batch_size = torch.device(device).type, plan.batch_size // processes
    return Training(
        sequence_length=sequence_length,
        batch_size=batch_size,
        micro_batch_size=min(batch_size, plan.micro_batch_size or batch_size),
        dtype=plan.dtype if multiplies_bfloat16(torch.device(device)) else "float32",
        checkpoint_activations=plan.checkpoint_activations,
        optimizer=plan.optimizer,
        device=kind,
    )


def _fit(
    plan: TrainPlan,
    *,
    architecture: Architecture,
    shape: Shape,
    wanted: Training,
    teacher: TeacherMemory | None,
    there: Capacity,
    kinds: tuple[Moments, ...],
) -> TrainPlan:
    fitting, estimate = fit_training(architecture, shape, wanted=wanted, teacher=teacher, capacity=there, moments=kinds)
    logger.info(
        "training takes %s: micro batch %d, %s moments%s",
        written(estimate.device_bytes),
        fitting.micro_batch_size,
        fitting.moments,
        ", activations checkpointed" if fitting.checkpoint_activations else "",
        extra={"action": "fit_memory", **estimate.as_dict()},
    )
    return replace(plan, micro_batch_size=fitting.micro_batch_size, checkpoint_activations=fitting.checkpoint_activations, moments=fitting.moments)


def check_teacher_fits(teacher: TeacherMemory, *, tokens: int, beside: Mapping[str, int], device: str) -> None:
    """Refuse a teacher whose forward pass over `tokens` at once does not fit.

    Args:
        beside: what else is on the device with it.

    Raises:
        DoesNotFit: with the numbers, and what else can be done.
    """
    there = capacity(device)
    estimate = inference_memory(teacher, tokens=tokens, device=there.device)
    estimate = replace(estimate, device={**estimate.device, **beside})
    if estimate.device_bytes > there.usable_bytes:
        advice = "a search runs its teacher on one device: take a larger one, or dtype bfloat16; `nas distill` under torchrun shards a teacher"
        raise DoesNotFit(f"{explain(estimate, capacity=there, what='the teacher')}\n{advice}")


def check_host_fits(parts: Mapping[str, int], *, what: str) -> None:
    """Refuse work whose components do not fit the host's memory.

    Raises:
        DoesNotFit: with the numbers.
    """
    there = capacity("cpu")
    if sum(parts.values()) > there.usable_host_bytes:
        raise DoesNotFit(f"{what}: expected at most {written(there.usable_host_bytes)} of memory, got {table(parts)}")


def check_disk_fits(parts: Mapping[str, int], *, folder: Path, what: str) -> None:
    """Refuse work whose files do not fit the disk of `folder`.

    Raises:
        DoesNotFit: with the numbers.
    """
    free = free_disk(folder)
    if sum(parts.values()) > free:
        raise DoesNotFit(f"{what}: expected at most {written(free)}, free on the disk of {folder}, got {table(parts)}")
