"""One of the processes that test_distributed.py starts: it trains the tiny student in every way and the first leaves what came out.

python -m tests.compress.distributed_worker FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nas.compress.distillation import Stopped, distil
from nas.compress.distributed import Spread, Spreading, World, join_world, shard_teacher, whole
from nas.compress.held_out import evaluate_kl
from nas.compress.losses import final_hidden
from nas.compress.objective import TeacherLogits
from nas.errors import InvalidSpec
from tests.compress.training_values import plan, tiny_blocks, tiny_model

PLANS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "in small passes, layers checkpointed": {"micro_batch_size": 1, "checkpoint_activations": True},
    "bfloat16 moments": {"moments": "bfloat16"},
    "a rate that follows the loss": {"rate_follows_loss": True},
}
SPREADINGS: tuple[Spreading, ...] = ("replicated", "sharded")
STOPPED_AT = 5


class Projected(TeacherLogits):
    """An objective that learns something beside the student: its final hidden state, projected to the teacher's."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__(teacher)
        generator = torch.Generator().manual_seed(0)
        self.projection = nn.Parameter(torch.randn(16, 16, generator=generator) / 4)

    def weights(self) -> dict[str, nn.Parameter]:
        return {"projection": self.projection}

    def loss(self, student: nn.Module, tokens_BT: Tensor, *, rows_B: Tensor) -> Tensor:
        distance = final_hidden(student, tokens_BT) @ self.projection - self.teacher.hidden(tokens_BT, rows_B=rows_B)
        return super().loss(student, tokens_BT, rows_B=rows_B) + distance.square().mean()


def frozen_teacher() -> nn.Module:
    return tiny_model(seed=0, tied=False).requires_grad_(False).eval()


def train(spread: Spread, *, objective: TeacherLogits, **options: Any) -> float:
    changes = options.pop("changes", {})
    done = distil(spread.student, objective=objective, blocks_NT=tiny_blocks(), plan=plan(**changes), spread=spread, **options)
    return done.loss


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with join_world("cpu") as world:
        losses: dict[str, float] = {}
        facts: dict[str, Any] = {}
        for spreading in SPREADINGS:
            for name, changes in PLANS.items():
                run(f"{spreading}, {name}", world, losses, folder=folder, spreading=spreading, objective=TeacherLogits(frozen_teacher()), changes=changes)
            run(f"{spreading}, with a projection", world, losses, folder=folder, spreading=spreading, objective=Projected(frozen_teacher()))
            for number in (2, 1):
                facts[f"{spreading}, stopped, number {number}"] = stopped(
                    world, folder=folder / f"{spreading}, from {number}", spreading=spreading, begun=number
                )
            resumed = folder / f"{spreading}, from 1"
            run(f"{spreading}, resumed", world, losses, folder=folder, spreading=spreading, objective=TeacherLogits(frozen_teacher()), checkpoint=resumed)
        teacher = shard_teacher(frozen_teacher(), world=world)
        run("sharded, with a sharded teacher", world, losses, folder=folder, spreading="sharded", objective=TeacherLogits(teacher))
        facts |= agreements(world, teacher=teacher)
        if world.is_first:
            (folder / "facts.json").write_text(json.dumps({"losses": losses, **facts}))


def run(name: str, world: World, losses: dict[str, float], *, folder: Path, spreading: Spreading, objective: TeacherLogits, **options: Any) -> None:
    spread = Spread(tiny_model(seed=1, tied="small" not in name), world=world, spreading=spreading)
    spread.run(partial(evaluate_kl, teacher=None, blocks_NT=tiny_blocks()[:2], batch_size=2))  # to look at a student is not to change it
    losses[name] = train(spread, objective=objective, **options)
    weights = {key: whole(weight.detach()).contiguous().clone() for key, weight in spread.student.named_parameters()}
    if world.is_first:
        save_file(weights, folder / f"{name}.safetensors")


def stopped(world: World, *, folder: Path, spreading: Spreading, begun: int) -> int:
    """A run that only the last process is asked to stop, in the middle; or one that a single process began. Returns: the calls before it stopped."""
    calls = 0

    def should_stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > STOPPED_AT and (begun == 1 or world.rank == world.size - 1)

    if begun == 1:
        if world.is_first:
            stop(partial(train, Spread(tiny_model(seed=1), world=World()), objective=TeacherLogits(frozen_teacher())), folder, should_stop)
        return world.least(calls if world.is_first else 10**6)
    stop(partial(train, Spread(tiny_model(seed=1), world=world, spreading=spreading), objective=TeacherLogits(frozen_teacher())), folder, should_stop)
    assert world.least(calls) == calls == -world.least(-calls)
    return calls


def stop(work: Callable[..., float], folder: Path, should_stop: Callable[[], bool]) -> None:
    try:
        work(checkpoint=folder, should_stop=should_stop)
    except Stopped:
        return
    raise AssertionError("the run was not stopped")


def agreements(world: World, *, teacher: nn.Module) -> dict[str, Any]:
    """What processes that see different things agree on, and the likelihood of a sharded student under a sharded teacher."""
    spread = Spread(tiny_model(seed=1), world=world, spreading="sharded")
    held_out = spread.run(partial(evaluate_kl, teacher=teacher, blocks_NT=tiny_blocks()[:5], batch_size=2))

    def refuse() -> None:
        raise InvalidSpec()

    try:
        world.once(refuse)
        error = "none"
    except InvalidSpec as told:
        error = type(told).__name__
    return {
        "any": world.any(world.is_first, False, True),
        "once": world.once(lambda: f"made by {world.rank}"),
        "least": world.least(10 + world.rank),
        "error": error,
        "kl": held_out.kl,
        "loss": held_out.loss,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
