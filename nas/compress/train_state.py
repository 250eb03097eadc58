"""All that the rest of a training run depends on, in memory and in a checkpoint folder. Does not train."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nas.compress.manifest import link_tensors, load_tensors, read_manifest, save_tensors
from nas.errors import CorruptFile, NotFound

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainState:
    """The weights, the optimizer's state and the number of steps done, which is the position in the data."""

    step: int
    tensors: dict[str, Tensor]
    """`running_loss`; `weight/NAME`, and `KEY/NAME` for every KEY of the optimizer's state of that weight (AdamW: step, exp_avg, exp_avg_sq); on the CPU.
    What an objective learns beside the student is called `objective.NAME`."""
    recipe: dict[str, Any]
    """The plan, the blocks' shape and the objective that made it: a run with another recipe must not go on from it."""
    recent_losses: tuple[float, ...]
    """Of the last steps."""
    untrained_loss: float | None
    """Of the first step, before any update; None: no step was done."""


STATES = ("branch", "trunk")
"""Names in a checkpoint folder. The trunk is whole before there is a branch: who looks in this order sees no branch without its trunk."""


def save_state(state: TrainState, *, checkpoint: Path, name: str, tokens: int) -> None:
    """Replace the state of that name ("trunk" or "branch") in the folder; a kill leaves the old one or the new one."""
    facts = {
        "step": state.step,
        "tokens": tokens,
        "recipe": state.recipe,
        "recent_losses": state.recent_losses,
        "untrained_loss": state.untrained_loss,
    }
    save_tensors(checkpoint, name=name, tensors=state.tensors, facts=facts)


def load_state(checkpoint: Path, *, name: str) -> TrainState:
    """What `save_state` wrote.

    Raises:
        NotFound, CorruptFile: as `load_tensors`.
    """
    tensors, facts = load_tensors(checkpoint, name=name)
    return TrainState(
        step=facts["step"], tensors=tensors, recipe=facts["recipe"], recent_losses=tuple(facts["recent_losses"]), untrained_loss=facts["untrained_loss"]
    )


def load_trunk(checkpoint: Path) -> TrainState:
    """The trunk that a run left in its checkpoint folder.

    Raises:
        NotFound, CorruptFile: as `load_tensors`.
    """
    return load_state(checkpoint, name="trunk")


def num_steps(checkpoint: Path) -> int:
    """Steps that a checkpoint folder holds, 0 where it holds none; its tensors are not looked at."""
    return max((steps_of(manifest) for name in STATES if (manifest := read_manifest(checkpoint, name=name)) is not None), default=0)


def steps_of(manifest: Mapping[str, Any]) -> int:
    """Steps of one state, by its manifest."""
    return int(manifest["facts"]["step"])


def link_states(checkpoint: Path, *, into: Path) -> None:
    """The states as they are now, under second names in another folder of the same disk, where they stay when the training replaces its own."""
    for name in STATES:
        link_tensors(checkpoint, name=name, into=into)


def sound_checkpoint(checkpoint: Path) -> Path:
    """The folder as `distil` can go on from it: a damaged state is set aside, and what was trained for it is trained again, to the same bits.

    Without the trunk the whole run starts again, from the checkpoint of the rung below; without the branch, the branch. The damaged files
    are in `<folder>.damaged` beside it, until others are.
    """
    for name in reversed(STATES):
        try:
            load_tensors(checkpoint, name=name)
        except NotFound:
            continue
        except CorruptFile as damaged:
            logger.warning("corrupt_checkpoint: its %s is trained again", name, extra={"action": "checkpoint_lost", "reason": str(damaged)})
            quarantine = checkpoint.with_name(f"{checkpoint.name}.damaged")
            shutil.rmtree(quarantine, ignore_errors=True)
            if name == "trunk":
                checkpoint.rename(quarantine)
                break
            quarantine.mkdir()
            for file in checkpoint.glob(f"{name}*"):
                file.rename(quarantine / file.name)
    return checkpoint
