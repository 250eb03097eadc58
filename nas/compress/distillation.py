"""The one training loop: a short rung, the full run, training from scratch and the demo's teacher differ only in arguments.

A run is a *trunk* and then a *decay branch* (train_plan.py). The branch's end is what is scored; the next, longer rung goes on from the trunk's end,
as if the branch had never been. So a student of N tokens has always seen the first N tokens of one fixed order, whatever its shape and however often
it was stopped.

Same seed, threads and CPU: the same bits, stopped and resumed or not. Random state outside is neither read nor changed (no dropout).
Knows no store and no files but its own checkpoint; does not prune, and does not know what the student is trained towards (objective.py).

Shape suffixes: N blocks, B batch, T tokens of a block.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from nas.compress.data_order import DataOrder
from nas.compress.device import multiplies_bfloat16
from nas.compress.distributed import Spread, World, clip_gradients, copy_whole, whole
from nas.compress.heap import keep_freed_memory, return_freed_memory
from nas.compress.moments import make_optimizer
from nas.compress.objective import Objective
from nas.compress.train_plan import TrainPlan
from nas.compress.train_state import TrainState, load_state, load_trunk, save_state
from nas.errors import Conflict, NasError

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 1.0
_MIN_REPORTS = 20
"""A short run reports at least so often, so that its learning curve is one."""
_RECENT_STEPS = 16
_TRAINING_PER_SAVE = 20
"""Seconds of training for each second that a checkpoint takes, so that saving stays below 5 % however large the student is."""
_STEPS_BETWEEN_LOOKS = {"cuda": 16}
"""Steps whose losses stay on the device: to read one, the host waits for all that it has asked for. On the CPU nothing waits, every step is looked at."""
_MIN_STEPS_TO_WORSEN = 100
_WORSE = 0.5, 0.2
"""Diverged is a mean loss of `_RECENT_STEPS` above the untrained student's by so many nats and by such a share, whichever is more: a student that starts
near its teacher first goes away from it, by less (LOG.md)."""
_LENGTH = frozenset({"tokens", "decay_tokens"})
_MEMORY_ONLY = frozenset({"micro_batch_size", "checkpoint_activations", "moments"})
"""What a run may change between two calls: where it needs less memory. bfloat16 moments are a measured difference (LOG.md)."""


class Diverged(NasError):
    """Training does not work: something is not a number, or the student has become worse than it was untrained. No checkpoint holds such a state."""

    def __init__(self, step: int, tokens: int, what: str = "loss", reason: str = "expected a finite number, got none") -> None:
        super().__init__(step, tokens, what, reason)
        self.step = step
        self.tokens = tokens
        self.what = what
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what}: {self.reason} at step {self.step} ({self.tokens} tokens)"


class Stopped(NasError):
    """`should_stop` said so; the checkpoint, if there is one, holds all that was done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands."""

    step: int
    tokens: int
    """Seen by the student so far."""
    loss: float
    """Mean since the last report, nats per token."""
    learning_rate: float
    tokens_per_second: float
    """Since the last report."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Distilled:
    """The end of a run; the student itself holds the weights."""

    tokens: int
    """Seen by the student: whole steps, so at least those of the plan."""
    loss: float
    """Training loss, mean of the last 16 steps, nats per token."""
    seconds: float
    """Spent in this call."""
    trained_tokens: int
    """Trained in this call: all of `tokens` less what it resumed from."""
    trunk: TrainState | None
    """For the next rung: the state before the decay branch. None where the checkpoint holds it (`load_trunk`), not to keep it in memory as well."""


def distil(
    student: nn.Module,
    *,
    objective: Objective,
    blocks_NT: Tensor,
    plan: TrainPlan,
    state: TrainState | None = None,
    checkpoint: Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    checkpoint_every_seconds: float = 60.0,
    spread: Spread | None = None,
) -> Distilled:
    """Train `student` in place to `plan.tokens`; afterwards it holds the weights at the end of the decay branch.

    It starts from what `checkpoint` holds (a run that was killed), else from `state` (the trunk of a shorter run), else from the student as it is.

    Args:
        student: a transformers causal language model in float32; trained where it lies. Left in eval mode: no dropout.
        objective: what it is trained towards; computes on the student's device.
        blocks_NT: integer tokens, on the CPU.
        state: of a run that differs in its length only.
        checkpoint: folder of this run alone; holds `trunk` and, during the decay branch, `branch`.
        report: told about once a second, at least every twentieth of the run, and at the end.
        should_stop: asked before every step.
        checkpoint_every_seconds: at least; longer where a save takes long. 0: after every step.
        spread: the student over several processes, all of which call this with the same arguments and a checkpoint folder that all see; it goes on
            from a checkpoint of another number of processes. `report` is called in the first only. None: this process is alone.
    Raises:
        Stopped: after saving. Diverged: nothing saved since the last checkpoint. Conflict: the state is of another recipe, or beyond the plan.
        CorruptFile: the checkpoint differs from its manifest.
    """
    run = _Run(
        student,
        objective=objective,
        blocks_NT=blocks_NT,
        plan=plan,
        checkpoint=checkpoint,
        report=report,
        should_stop=should_stop,
        checkpoint_every_seconds=checkpoint_every_seconds,
        spread=spread or Spread(student, world=World()),
    )
    return run.go(state)


class _Run:
    """One call of `distil`: the optimizer, where it stands, and what has not been reported yet."""

    def __init__(
        self,
        student: nn.Module,
        *,
        objective: Objective,
        blocks_NT: Tensor,
        plan: TrainPlan,
        checkpoint: Path | None,
        report: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        checkpoint_every_seconds: float,
        spread: Spread,
    ) -> None:
        if blocks_NT.ndim != 2 or len(blocks_NT) == 0:
            raise ValueError(f"blocks_NT: expected at least one block of tokens, got the shape {tuple(blocks_NT.shape)}")
        spread.world.check_batch(plan.batch_size)
        self.student, self.objective, self.plan = student.eval(), objective, plan
        self.spread, self.world = spread, spread.world
        checkpoint_activations(student, on=plan.checkpoint_activations)
        self.checkpoint, self.report, self.should_stop = checkpoint, report, should_stop
        self.checkpoint_every_seconds = checkpoint_every_seconds
        self.blocks_NT, self.sequence_length = blocks_NT, blocks_NT.shape[1]
        self.order = DataOrder(len(blocks_NT), batch_size=plan.batch_size, seed=plan.seed)
        self.weights = dict(student.named_parameters()) | {f"objective.{name}": weight for name, weight in objective.weights().items()}
        self.device = next(iter(self.weights.values())).device
        self.optimizer = make_optimizer(self.weights, plan=plan, tables=(*_tables(student), *objective.weights().values()))
        if self.device.type == "cpu":
            (return_freed_memory if plan.checkpoint_activations else keep_freed_memory)()
        self.steps_between_looks = _STEPS_BETWEEN_LOOKS.get(self.device.type, 1)
        self.micro_batch_size = min(plan.batch_size // self.world.size, plan.micro_batch_size or plan.batch_size)
        self.steps_between_reports = max(1, plan.steps(self.sequence_length) // _MIN_REPORTS)
        self.step = 0
        self.unread: list[Tensor] = []
        """loss_norm_2 of the last steps, on the device."""
        self.unreported: list[float] = []
        self.recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self.running_loss = torch.zeros((), device=self.device)
        self.untrained_loss: float | None = None
        self.reported_at = self.saved_at = time.monotonic()
        self.saved: tuple[str, int] | None = None
        self.save_seconds = 0.0
        self.recipe = asdict(plan) | {"blocks": list(blocks_NT.shape), "objective": objective.facts}

    def go(self, state: TrainState | None) -> Distilled:
        started = time.monotonic()
        total, trunk_steps = self.plan.steps(self.sequence_length), self.plan.trunk_steps(self.sequence_length)
        branch: TrainState | None = None
        if self.checkpoint is not None and (self.checkpoint / "trunk.json").exists():
            self._restore(load_trunk(self.checkpoint), ignore=_MEMORY_ONLY)
            self.saved = "trunk", self.step
            if self.step == trunk_steps and (self.checkpoint / "branch.json").exists():
                branch = load_state(self.checkpoint, name="branch")
        elif state is not None:
            self._restore(state, ignore=_MEMORY_ONLY | _LENGTH)
        if self.step > trunk_steps:
            raise Conflict(f"state: expected at most the {trunk_steps} steps of this plan's trunk, got {self.step}")
        first_step = self.step if branch is None else branch.step
        self._train_to(trunk_steps, name="trunk")
        self._save(name="trunk")
        trunk = self._snapshot() if self.checkpoint is None else None
        if branch is not None:
            self._restore(branch, ignore=_MEMORY_ONLY)
            self.saved = "branch", self.step
        self._train_to(total, name="branch")
        if self.unreported:
            self._report()
        self.student.eval()  # also the layers, whose flag switches checkpointing on
        return Distilled(
            tokens=self._tokens(total),
            loss=sum(self.recent) / max(1, len(self.recent)),
            seconds=time.monotonic() - started,
            trained_tokens=self._tokens(total - first_step),
            trunk=trunk,
        )

    def _train_to(self, last_step: int, *, name: str) -> None:
        """
        Raises:
            Diverged: at most `_STEPS_BETWEEN_LOOKS` steps later.
        """
        while self.step < last_step:
            if any(self.world.any(self.should_stop())):
                self._save(name=name)
                raise Stopped(f"stopped at step {self.step} of {last_step} of the {name}")
            self.unread.append(self._train_step())
            self.step += 1
            if len(self.unread) >= self.steps_between_looks:
                self._look()
            now = time.monotonic()
            report, save = self.world.any(now - self.reported_at >= _REPORT_SECONDS, now - self.saved_at >= self._seconds_between_saves())
            if report or self.step % self.steps_between_reports == 0:
                self._report()
            if save:
                self._save(name=name)
        self._look()

    def _look(self) -> None:
        """Read the losses of the steps that were not looked at.

        Raises:
            Diverged
        """
        if not self.unread:
            return
        first, pairs = self.step - len(self.unread), torch.stack(self.unread).tolist()
        self.unread = []
        for step, (loss, norm) in enumerate(pairs, start=first):
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise Diverged(step, self._tokens(step), "gradient" if math.isfinite(loss) else "loss")
            if step == 0:
                self.untrained_loss = loss
            self.unreported.append(loss)
            self.recent.append(loss)
            self._check_not_worse(step)

    def _check_not_worse(self, step: int) -> None:
        if self.untrained_loss is None or step < max(_MIN_STEPS_TO_WORSEN, self.plan.warmup_steps(self.sequence_length) + _RECENT_STEPS):
            return
        loss, (nats, share) = sum(self.recent) / len(self.recent), _WORSE
        if loss > self.untrained_loss + max(nats, share * self.untrained_loss):
            raise Diverged(step, self._tokens(step), "loss", f"expected less than the untrained student's {self.untrained_loss:.3f}, got {loss:.3f}")

    def _train_step(self) -> Tensor:
        """Returns: loss_norm_2, the step's mean loss and the norm of its gradient, on the device."""
        rows_B = self.world.share(self.order.rows(self.step))
        tokens_BT = self.blocks_NT[rows_B].to(torch.int64)
        if self.device.type == "cuda":  # out of pinned memory the copy waits for nothing
            tokens_BT = tokens_BT.pin_memory().to(self.device, non_blocking=True)
        while True:
            try:
                loss = self._accumulate_gradients(tokens_BT, rows_B=rows_B)
                break
            except torch.cuda.OutOfMemoryError:
                if self.micro_batch_size == 1 or self.world.size > 1:  # the others wait for gradients of the size that was agreed
                    raise
                self.micro_batch_size = (self.micro_batch_size + 1) // 2
                logger.warning("out of memory: micro batch halved to %d", self.micro_batch_size, extra={"action": "halve_micro_batch"})
            torch.cuda.empty_cache()  # outside the handler, where the failed pass is no longer referenced by the traceback
        norm = clip_gradients(self.weights.values(), max_norm=self.plan.max_grad_norm)
        rate = self._rate(loss)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_scale"]
        self.optimizer.step()
        return torch.stack((loss, norm))

    def _rate(self, loss: Tensor) -> float | Tensor:
        """Of this step, whose mean loss over the whole batch is `loss`; on the device where it follows the loss, so that the host need not wait."""
        rate = self.plan.rate(self.step, sequence_length=self.sequence_length)
        if not self.plan.rate_follows_loss:
            return rate
        self.running_loss.lerp_(loss, 1 / min(self.step + 1, _RECENT_STEPS))
        return rate * self.running_loss.clamp_min(0).sqrt().sqrt()

    def _accumulate_gradients(self, tokens_BT: Tensor, *, rows_B: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        passes = list(zip(torch.split(tokens_BT, self.micro_batch_size), torch.split(rows_B, self.micro_batch_size), strict=True))
        for number, (micro_BT, micro_B) in enumerate(passes, start=1):
            with self.spread.accumulating(last=number == len(passes)):
                with self._autocast():
                    loss = self.spread.loss(partial(self.objective.loss, tokens_BT=micro_BT, rows_B=micro_B)) * (len(micro_BT) / len(tokens_BT))
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self.world.average_gradients(self.objective.weights().values())
        return self.world.mean(total)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.plan.dtype == "bfloat16" and multiplies_bfloat16(self.device):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _report(self) -> None:
        self._look()
        now = time.monotonic()
        progress = Progress(
            step=self.step,
            tokens=self._tokens(self.step),
            loss=sum(self.unreported) / len(self.unreported),
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            tokens_per_second=self._tokens(len(self.unreported)) / max(1e-9, now - self.reported_at),
        )
        if self.world.is_first:
            self.report(progress)
        self.unreported, self.reported_at = [], now

    def _tokens(self, steps: int) -> int:
        return steps * self.plan.batch_size * self.sequence_length

    def _snapshot(self) -> TrainState:
        """The state as it is now, in memory of its own."""
        tensors = {name: whole(tensor).to("cpu", copy=True) for name, tensor in self._tensors()}
        return TrainState(step=self.step, tensors=tensors, recipe=self.recipe, recent_losses=tuple(self.recent), untrained_loss=self.untrained_loss)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of the state, as far as this process holds it."""
        yield "running_loss", self.running_loss
        for name, weight in self.weights.items():
            for key, tensor in {"weight": weight, **self.optimizer.state[weight]}.items():
                yield f"{key}/{name}", tensor.detach()

    def _save(self, *, name: str) -> None:
        """Write the state as it is now to the checkpoint unless that holds it."""
        if self.checkpoint is None or self.saved == (name, self.step):
            return
        self._look()  # a state that is not sound is not saved
        started = time.monotonic()
        self.optimizer.zero_grad(set_to_none=True)  # room for the copies on their way to the file
        tensors = {}
        for key, tensor in self._tensors():
            gathered = whole(tensor)  # one at a time, and kept by the process that writes
            if self.world.is_first:
                tensors[key] = gathered.cpu()
        state = TrainState(step=self.step, tensors=tensors, recipe=self.recipe, recent_losses=tuple(self.recent), untrained_loss=self.untrained_loss)
        self.world.once(partial(save_state, state, checkpoint=self.checkpoint, name=name, tokens=self._tokens(state.step)))
        self.saved, self.saved_at = (name, state.step), time.monotonic()
        self.save_seconds = self.saved_at - started

    def _seconds_between_saves(self) -> float:
        return max(self.checkpoint_every_seconds, _TRAINING_PER_SAVE * self.save_seconds) if self.checkpoint_every_seconds > 0 else 0.0

    @torch.no_grad()
    def _restore(self, state: TrainState, *, ignore: frozenset[str]) -> None:
        for key in sorted(self.recipe.keys() - ignore):
            if self.recipe[key] != state.recipe.get(key):
                raise Conflict(f"{key}: expected {state.recipe.get(key)!r}, with which the state was made, got {self.recipe[key]!r}")
        for name, tensor in self._tensors():
            copy_whole(tensor, state.tensors[name])
        self.step = state.step
        self.recent = deque(state.recent_losses, maxlen=_RECENT_STEPS)
        self.untrained_loss = state.untrained_loss


def _tables(student: nn.Module) -> tuple[nn.Parameter, ...]:
    """Embeddings and head: matrices whose rows are tokens."""
    model: Any = student
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def checkpoint_activations(student: nn.Module, *, on: bool) -> None:
    """Let each decoder layer keep its input only, and run its forward pass again on the way back; the same bits.

    transformers checkpoints layers in training mode alone, which would switch dropout on; the flag of the layers themselves, and not of what
    is inside them, switches nothing else.
    """
    if not on:
        return
    model: Any = student
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for module in student.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
