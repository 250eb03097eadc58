"""Whether training, a teacher and files fit this machine, asked before anything is loaded. The numbers come from nas/memory.py."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from nas.compress.device import capacity, free_disk
from nas.compress.train_plan import TrainPlan
from nas.errors import DoesNotFit
from nas.families import Architecture
from nas.memory import Moments, TeacherMemory, Training, explain, fit_training, inference_memory, table, written
from nas.shape import Shape

logger = logging.getLogger(__name__)


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
    kind = torch.device(device).type
    wanted = Training(
        sequence_length=sequence_length,
        batch_size=plan.batch_size,
        micro_batch_size=min(plan.batch_size, plan.micro_batch_size or plan.batch_size),
        dtype=plan.dtype if kind == "cuda" else "float32",
        checkpoint_activations=plan.checkpoint_activations,
        device=kind,
    )
    kinds = (moments,) if moments else get_args(Moments)
    fitting, estimate = fit_training(architecture, shape, wanted=wanted, teacher=teacher, capacity=capacity(device), moments=kinds)
    fitted = replace(plan, micro_batch_size=fitting.micro_batch_size, checkpoint_activations=fitting.checkpoint_activations, moments=fitting.moments)
    logger.info(
        "training takes %s: micro batch %d, %s moments%s",
        written(estimate.device_bytes),
        fitted.micro_batch_size,
        fitted.moments,
        ", activations checkpointed" if fitted.checkpoint_activations else "",
        extra={"action": "fit_memory", **estimate.as_dict()},
    )
    return fitted


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
