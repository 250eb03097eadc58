"""One run of the training loop over several processes: who has which blocks, and how weights and gradients are spread.

Every process holds all weights (DDP) or a part of each (FSDP2); each computes an equal share of every batch, and gradients are averages over all. So the
order of the data, the loss and, up to rounding, the weights are those of one process, however many there are. One process alone pays nothing.
Does not train: the loop (distillation.py) asks. Started by torchrun; the process group is `join_world`'s.

Source: DistributedDataParallel and `fully_shard` of torch; Rajbhandari et al., ZeRO, arXiv 1910.02054, for what is divided.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from nas.errors import InvalidSpec, NasError, Problem

Spreading = Literal["replicated", "sharded"]
"""Of a model over processes: each holds it all (DDP), or a part of every weight (FSDP2)."""
_PATIENCE = timedelta(hours=2)
"""How long a process waits for another, which may be reading a corpus or writing a checkpoint meanwhile."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The processes of a run, as one of them sees it."""

    rank: int = 0
    size: int = 1
    processes_on_host: int = 1
    """How many share this machine's memory and cores."""
    device: str = "cpu"
    """This process's own: cpu, or cuda:N."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def check_batch(self, batch_size: int) -> None:
        """
        Raises:
            InvalidSpec: the blocks of a batch cannot be shared out equally.
        """
        if batch_size % self.size:
            raise InvalidSpec(Problem(field="batch_size", expected=f"a multiple of the {self.size} processes", got=str(batch_size)))

    def share(self, rows_B: Tensor) -> Tensor:
        """This process's blocks of a batch."""
        return rows_B if self.size == 1 else rows_B.chunk(self.size)[self.rank]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, on the device, without waiting for it."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it is up in any process: clocks and signals differ between them, what is done next must not."""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in raised.tolist())

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        if self.size == 1:
            return number
        smallest = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return int(smallest)

    def once(self, work: Callable[[], T]) -> T:
        """What the first process makes of `work`, in all of them: the value, which is small, or the error."""
        if self.size == 1:
            return work()
        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = work()
            except NasError as error:
                made[1] = error
        dist.broadcast_object_list(made)
        if made[1] is not None:
            raise made[1]
        value: T = made[0]
        return value

    def average_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """For weights that are no part of the student, and so spread by nobody."""
        for weight in weights if self.size > 1 else ():
            assert weight.grad is not None
            self.mean(weight.grad)


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """The world that torchrun made (RANK, WORLD_SIZE, LOCAL_RANK in the environment), for as long as the context lasts; else one process alone.

    Args:
        device: cpu or cuda; each process on a machine takes a GPU of its own.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=device)
        return
    local = int(os.environ["LOCAL_RANK"])
    if device.startswith("cuda"):
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    # Flags and objects travel by gloo, so that the host never waits for the device's work.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=_PATIENCE)
    try:
        yield World(rank=dist.get_rank(), size=size, processes_on_host=int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device=device)
    finally:
        dist.destroy_process_group()


class Spread:
    """A student over the processes of a world. After it was sharded, its weights are whole only inside `run` and `loss`."""

    def __init__(self, student: Any, *, world: World, spreading: Spreading = "replicated") -> None:
        """
        Args:
            student: a transformers causal language model, the same in every process; a sharded one may lie on the CPU, its shards move to the device.
        """
        self.student, self.world = student, world
        self._replica: DistributedDataParallel | None = None
        self._shards: Any = None
        if world.size == 1:
            return
        if spreading == "sharded":
            mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
            for layer in _layers(student):
                fully_shard(layer, mesh=mesh)
            self._shards = fully_shard(_Whole(student), mesh=mesh)
        else:
            # Nothing is dropped out and no buffer changes. Gradients live in DDP's buckets, not beside them.
            self._replica = DistributedDataParallel(_Whole(student), broadcast_buffers=False, gradient_as_bucket_view=True)

    def run(self, work: Callable[[nn.Module], T]) -> T:
        """`work` on the student with every weight whole where it is read, the head's too, which is read outside of the model's own forward pass."""
        if self._shards is None:
            return work(self.student)
        with torch.no_grad():
            done: T = self._shards(work)
        self._shards.reshard()  # else what no layer holds stays whole, and whoever asks for the weights gets copies that are not trained
        return done

    def loss(self, work: Callable[[nn.Module], Tensor]) -> Tensor:
        """As `run`, for a loss that is then differentiated: the way back leaves the shards."""
        module = self._shards or self._replica
        loss: Tensor = work(self.student) if module is None else module(work)
        return loss

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around the passes of one batch: replicas exchange gradients after the last. Shards do after each, since no process has room for a whole."""
        return nullcontext() if last or self._replica is None else self._replica.no_sync()

    def whole_state(self) -> dict[str, Tensor]:
        """The student's state dict on the CPU, in the first process; empty in the others."""
        state = {}
        for name, tensor in self.student.state_dict().items():
            gathered = whole(tensor)
            if self.world.is_first:
                state[name] = gathered.cpu()
        return state


class _Whole(nn.Module):
    """A module whose forward pass is any function of the student: its hooks gather the weights that no layer holds, embeddings, last norm and head."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, work: Callable[[nn.Module], T]) -> T:
        return work(self.student)


def shard_teacher(teacher: nn.Module, *, world: World) -> nn.Module:
    """Divide the layers of a frozen model over the processes; its embeddings and head stay whole, and it runs as before.

    Args:
        teacher: a transformers causal language model on the CPU; it moves to the device.
    """
    model: Any = teacher
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    inside = {parameter for layer in _layers(teacher) for parameter in layer.parameters()}
    outside = {parameter for parameter in teacher.parameters() if parameter not in inside}
    for parameter in outside:
        parameter.data = parameter.data.to(world.device)
    for layer in _layers(teacher):
        fully_shard(layer, mesh=mesh)
    fully_shard(model.base_model, mesh=mesh, ignored_params=outside)
    return teacher


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this process may hold a part; every process has to ask."""
    gathered: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered


def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, the same in every process, into one of which this process may hold a part."""
    if isinstance(target, DTensor):
        # src_data_rank: every process cuts its own part out, and nothing is sent.
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)


def clip_gradients(weights: Iterable[nn.Parameter], *, max_norm: float) -> Tensor:
    """Scale the gradients to a norm of at most `max_norm`, shards of them and whole ones together. Returns: the norm before, on the device."""
    weights = list(weights)
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    if not shards:
        return nn.utils.clip_grad_norm_(weights, max_norm)
    others = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    square = nn.utils.get_total_norm(shards).square()
    dist.all_reduce(square)
    norm = (square + nn.utils.get_total_norm(others).square()).sqrt()
    torch._foreach_mul_(shards + others, (max_norm / (norm + 1e-6)).clamp(max=1.0))  # as torch's own clipping
    return norm


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
