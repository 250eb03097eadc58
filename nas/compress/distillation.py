"""The one training loop, and the held-out likelihood: a short rung, the full run, training from scratch and the demo's teacher differ only in arguments.

A run of N tokens is a *trunk* at a constant learning rate (after a short warm-up) and then a *decay branch*: the last `decay_tokens`, over which the
rate falls to zero. The branch's end is what is scored; the next, longer rung goes on from the trunk's end, as if the branch had never been.
So a student of N tokens has always seen the first N tokens of one fixed order, whatever its shape and however often it was stopped.
All counts are whole steps of `batch_size` blocks: steps = ceil(tokens / (batch_size * T)).

Same seed, threads and CPU: the same bits, stopped and resumed or not. Random state outside is neither read nor changed (no dropout).
Knows no store and no files but its own checkpoint; does not prune, and scores nothing but likelihood.

Shape suffixes: N blocks or tokens, B batch, T tokens of a block, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nas.compress.losses import cross_entropy, final_hidden, forward_kl, head_weight, kl_loss, token_chunks
from nas.compress.manifest import load_tensors, save_tensors
from nas.errors import Conflict, CorruptFile, NasError, NotFound

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 1.0
_MIN_REPORTS = 20
"""A short run reports at least so often, so that its learning curve is one."""
_RECENT_STEPS = 16
_TRAINING_PER_SAVE = 20
"""Seconds of training for each second that a checkpoint takes, so that saving stays below 5 % however large the student is."""
_LENGTH = frozenset({"tokens", "decay_tokens"})
_MEMORY_ONLY = frozenset({"micro_batch_size"})


class Diverged(NasError):
    """A loss or a gradient stopped being a number; the weights are those of before that step."""

    def __init__(self, step: int, tokens: int, what: str = "loss") -> None:
        super().__init__(step, tokens, what)
        self.step = step
        self.tokens = tokens
        self.what = what

    def __str__(self) -> str:
        return f"{self.what}: expected a finite number, got none at step {self.step} ({self.tokens} tokens)"


class Stopped(NasError):
    """`should_stop` said so; the checkpoint, if there is one, holds all that was done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """How one student is trained."""

    tokens: int
    """Seen by the student at the end, trunk and decay branch together; rounded up to whole steps."""
    learning_rate: float
    """Of the trunk. Small models on short runs: 1.5e-3 to 2e-3 at 256 to 512 tokens per step (measured on a 260K-parameter teacher)."""
    batch_size: int
    """Blocks per step."""
    warmup_tokens: int = 0
    """Linear from zero; counted from the trunk's start, so it is the same for every rung."""
    decay_tokens: int = 0
    """The last tokens of `tokens`, over which the rate falls linearly to zero."""
    weight_decay: float = 0.0
    """Of matrices only, not of norms and biases."""
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    seed: int = 0
    """Of the data order, and of nothing else."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic, on CUDA only; weights and optimizer stay float32."""
    micro_batch_size: int | None = None
    """Blocks per forward pass; None: batch_size. Halved when CUDA runs out of memory."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if not 0 <= self.decay_tokens <= self.tokens:
            raise ValueError(f"decay_tokens: expected 0 to tokens={self.tokens}, got {self.decay_tokens}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size: expected at least 1, got {self.micro_batch_size}")

    def steps(self, sequence_length: int) -> int:
        return math.ceil(self.tokens / (self.batch_size * sequence_length))

    def trunk_steps(self, sequence_length: int) -> int:
        """Steps before the decay branch."""
        return self.steps(sequence_length) - math.ceil(self.decay_tokens / (self.batch_size * sequence_length))

    def rate(self, step: int, *, sequence_length: int) -> float:
        """Learning rate of the step with this index (from 0)."""
        warmup = math.ceil(self.warmup_tokens / (self.batch_size * sequence_length))
        total, trunk = self.steps(sequence_length), self.trunk_steps(sequence_length)
        rising = min(1.0, (step + 1) / (warmup + 1))
        falling = 1.0 if step < trunk else (total - step) / (total - trunk + 1)
        return self.learning_rate * rising * falling


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainState:
    """All that the rest of a run depends on: the weights, AdamW's moments and the number of steps done."""

    step: int
    tensors: dict[str, Tensor]
    """`weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`, float32, on the CPU."""
    recipe: dict[str, Any]
    """The plan, the blocks' shape and the loss that made it: a run with another recipe must not go on from it."""
    recent_losses: tuple[float, ...]
    """Of the last steps."""


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
    trunk: TrainState
    """For the next rung: the state before the decay branch."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Likelihood on blocks that were not trained on, float64."""

    kl_N: Tensor | None
    """Per block, mean KL(teacher || student) over its T positions, nats per token; None without a teacher."""
    loss_N: Tensor
    """Per block, mean cross-entropy of its T - 1 next tokens, nats per token."""

    @property
    def kl(self) -> float | None:
        return None if self.kl_N is None else float(self.kl_N.mean())

    @property
    def kl_standard_error(self) -> float | None:
        return None if self.kl_N is None else _standard_error(self.kl_N)

    @property
    def loss(self) -> float:
        return float(self.loss_N.mean())

    @property
    def loss_standard_error(self) -> float:
        return _standard_error(self.loss_N)


def distil(
    student: nn.Module,
    *,
    teacher: nn.Module | None,
    blocks_NT: Tensor,
    plan: TrainPlan,
    state: TrainState | None = None,
    checkpoint: Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    checkpoint_every_seconds: float = 60.0,
) -> Distilled:
    """Train `student` in place to `plan.tokens`; afterwards it holds the weights at the end of the decay branch.

    It starts from what `checkpoint` holds (a run that was killed), else from `state` (the trunk of a shorter run), else from the student as it is.

    Args:
        student: a transformers causal language model in float32; trained where it lies. Left in eval mode: no dropout.
        teacher: on the same device; None: next-token cross-entropy instead of KL.
        blocks_NT: integer tokens, on the CPU.
        state: of a run that differs in its length only.
        checkpoint: folder of this run alone; holds `trunk` and, during the decay branch, `branch`.
        report: told about once a second, at least every twentieth of the run, and at the end.
        should_stop: asked before every step.
        checkpoint_every_seconds: at least; longer where a save takes long. 0: after every step.
    Raises:
        Stopped: after saving. Diverged: nothing saved since the last checkpoint. Conflict: the state is of another recipe, or beyond the plan.
        CorruptFile: the checkpoint differs from its manifest.
    """
    run = _Run(
        student,
        teacher=teacher,
        blocks_NT=blocks_NT,
        plan=plan,
        checkpoint=checkpoint,
        report=report,
        should_stop=should_stop,
        checkpoint_every_seconds=checkpoint_every_seconds,
    )
    return run.go(state)


def load_trunk(checkpoint: Path) -> TrainState:
    """The trunk that a run left in its checkpoint folder.

    Raises:
        NotFound, CorruptFile: as `load_tensors`.
    """
    return _load_state(checkpoint, name="trunk")


def sound_checkpoint(checkpoint: Path) -> Path:
    """The folder as `distil` can go on from it: a damaged state is removed, and what was trained for it is trained again, to the same bits.

    Without the trunk the whole run starts again; without the branch, the branch.
    """
    for name in ("trunk", "branch"):
        try:
            load_tensors(checkpoint, name=name)
        except NotFound:
            continue
        except CorruptFile as damaged:
            logger.warning("checkpoint is damaged, its %s is trained again", name, extra={"action": "checkpoint_lost", "reason": str(damaged)})
            if name == "trunk":
                shutil.rmtree(checkpoint)
                break
            for file in checkpoint.glob(f"{name}*"):
                file.unlink()
    return checkpoint


@torch.no_grad()
def evaluate_kl(student: nn.Module, *, teacher: nn.Module | None, blocks_NT: Tensor, batch_size: int) -> HeldOut:
    """KL to the teacher and cross-entropy of the student, per block. Models are evaluated in the dtype they have."""
    device = next(student.parameters()).device
    kl: list[Tensor] = []
    loss: list[Tensor] = []
    for model in (student, teacher):
        if model is not None:
            model.eval()
    for batch_BT in torch.split(blocks_NT, batch_size):
        tokens_BT = batch_BT.to(device, torch.int64)
        num_blocks, num_tokens = tokens_BT.shape
        labels_N = tokens_BT.roll(-1, dims=1).flatten()
        hidden_ND, head_VD = final_hidden(student, tokens_BT), head_weight(student)
        teacher_ND = None if teacher is None else final_hidden(teacher, tokens_BT)
        kl_N = torch.empty(num_blocks * num_tokens, device=device)
        loss_N = torch.empty_like(kl_N)
        for chunk in token_chunks(len(hidden_ND), head_VD=head_VD, chunk_tokens=None):
            logits_CV = (hidden_ND[chunk] @ head_VD.t()).float()
            loss_N[chunk] = nn.functional.cross_entropy(logits_CV, labels_N[chunk], reduction="none")
            if teacher is not None and teacher_ND is not None:
                kl_N[chunk] = forward_kl(logits_CV, teacher_ND[chunk] @ head_weight(teacher).t())
        loss.append(loss_N.view(num_blocks, num_tokens)[:, :-1].double().mean(dim=1).cpu())
        kl.append(kl_N.view(num_blocks, num_tokens).double().mean(dim=1).cpu())
    return HeldOut(kl_N=None if teacher is None else torch.cat(kl), loss_N=torch.cat(loss))


class _Run:
    """One call of `distil`: the optimizer, where it stands, and what has not been reported yet."""

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: nn.Module | None,
        blocks_NT: Tensor,
        plan: TrainPlan,
        checkpoint: Path | None,
        report: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        checkpoint_every_seconds: float,
    ) -> None:
        if blocks_NT.ndim != 2 or len(blocks_NT) == 0:
            raise ValueError(f"blocks_NT: expected at least one block of tokens, got the shape {tuple(blocks_NT.shape)}")
        self.student, self.teacher, self.plan = student.eval(), teacher, plan
        if teacher is not None:
            teacher.eval()
        self.checkpoint, self.report, self.should_stop = checkpoint, report, should_stop
        self.checkpoint_every_seconds = checkpoint_every_seconds
        self.sequence_length = blocks_NT.shape[1]
        self.order = _DataOrder(blocks_NT, batch_size=plan.batch_size, seed=plan.seed)
        self.weights = dict(student.named_parameters())
        self.device = next(iter(self.weights.values())).device
        self.optimizer = _make_optimizer(self.weights, plan=plan)
        self.micro_batch_size = min(plan.batch_size, plan.micro_batch_size or plan.batch_size)
        self.steps_between_reports = max(1, plan.steps(self.sequence_length) // _MIN_REPORTS)
        self.step = 0
        self.unreported: list[float] = []
        self.recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self.reported_at = self.saved_at = time.monotonic()
        self.saved: tuple[str, int] | None = None
        self.save_seconds = 0.0
        self.recipe = asdict(plan) | {"blocks": list(blocks_NT.shape), "objective": "kl" if teacher is not None else "cross_entropy"}

    def go(self, state: TrainState | None) -> Distilled:
        started = time.monotonic()
        total, trunk_steps = self.plan.steps(self.sequence_length), self.plan.trunk_steps(self.sequence_length)
        branch: TrainState | None = None
        if self.checkpoint is not None and (self.checkpoint / "trunk.json").exists():
            self._restore(load_trunk(self.checkpoint), ignore=_MEMORY_ONLY)
            self.saved = "trunk", self.step
            if self.step == trunk_steps and (self.checkpoint / "branch.json").exists():
                branch = _load_state(self.checkpoint, name="branch")
        elif state is not None:
            self._restore(state, ignore=_MEMORY_ONLY | _LENGTH)
        if self.step > trunk_steps:
            raise Conflict(f"state: expected at most the {trunk_steps} steps of this plan's trunk, got {self.step}")
        first_step = self.step if branch is None else branch.step
        self._train_to(trunk_steps, name="trunk")
        trunk = self._save(name="trunk")
        if branch is not None:
            self._restore(branch, ignore=_MEMORY_ONLY)
            self.saved = "branch", self.step
        self._train_to(total, name="branch")
        if self.unreported:
            self._report()
        return Distilled(
            tokens=self._tokens(total),
            loss=sum(self.recent) / max(1, len(self.recent)),
            seconds=time.monotonic() - started,
            trained_tokens=self._tokens(total - first_step),
            trunk=trunk,
        )

    def _train_to(self, last_step: int, *, name: str) -> None:
        while self.step < last_step:
            if self.should_stop():
                self._save(name=name)
                raise Stopped(f"stopped at step {self.step} of {last_step} of the {name}")
            loss = self._train_step()
            self.unreported.append(loss)
            self.recent.append(loss)
            self.step += 1
            if time.monotonic() - self.reported_at >= _REPORT_SECONDS or self.step % self.steps_between_reports == 0:
                self._report()
            if self.checkpoint is not None and time.monotonic() - self.saved_at >= self._seconds_between_saves():
                self._save(name=name)

    def _train_step(self) -> float:
        tokens_BT = self.order.batch(self.step).to(self.device, torch.int64)
        while True:
            try:
                loss = self._accumulate_gradients(tokens_BT)
                break
            except torch.cuda.OutOfMemoryError:
                if self.micro_batch_size == 1:
                    raise
                self.micro_batch_size = (self.micro_batch_size + 1) // 2
                logger.warning("out of memory: micro batch halved to %d", self.micro_batch_size, extra={"action": "halve_micro_batch"})
            torch.cuda.empty_cache()  # outside the handler, where the failed pass is no longer referenced by the traceback
        norm = float(nn.utils.clip_grad_norm_(self.weights.values(), self.plan.max_grad_norm))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Diverged(self.step, self._tokens(self.step), "gradient" if math.isfinite(loss) else "loss")
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step, sequence_length=self.sequence_length)
        self.optimizer.step()
        return loss

    def _accumulate_gradients(self, tokens_BT: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for micro_BT in torch.split(tokens_BT, self.micro_batch_size):
            with self._autocast():
                loss = self._loss(micro_BT) * (len(micro_BT) / len(tokens_BT))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return float(total)

    def _loss(self, tokens_BT: Tensor) -> Tensor:
        if self.teacher is None:
            hidden_ND = final_hidden(self.student, tokens_BT[:, :-1])
            return cross_entropy(hidden_ND, head_weight(self.student), labels_N=tokens_BT[:, 1:].flatten())
        with torch.no_grad():
            teacher_ND = final_hidden(self.teacher, tokens_BT)
        return kl_loss(
            final_hidden(self.student, tokens_BT), head_weight(self.student), teacher_hidden_ND=teacher_ND, teacher_head_VD=head_weight(self.teacher).detach()
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.plan.dtype == "bfloat16" and self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def _report(self) -> None:
        now = time.monotonic()
        self.report(
            Progress(
                step=self.step,
                tokens=self._tokens(self.step),
                loss=sum(self.unreported) / len(self.unreported),
                learning_rate=self.optimizer.param_groups[0]["lr"],
                tokens_per_second=self._tokens(len(self.unreported)) / max(1e-9, now - self.reported_at),
            )
        )
        self.unreported, self.reported_at = [], now

    def _tokens(self, steps: int) -> int:
        return steps * self.plan.batch_size * self.sequence_length

    def _snapshot(self) -> TrainState:
        tensors: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            moments = self.optimizer.state[weight]
            for key, tensor in (("weight", weight), ("exp_avg", moments["exp_avg"]), ("exp_avg_sq", moments["exp_avg_sq"])):
                tensors[f"{key}/{name}"] = tensor.detach().to("cpu", copy=True)
        return TrainState(step=self.step, tensors=tensors, recipe=self.recipe, recent_losses=tuple(self.recent))

    def _save(self, *, name: str) -> TrainState:
        """The state as it is now, written to the checkpoint unless that holds it."""
        started = time.monotonic()
        state = self._snapshot()
        if self.checkpoint is not None and self.saved != (name, state.step):
            facts = {"step": state.step, "tokens": self._tokens(state.step), "recipe": state.recipe, "recent_losses": state.recent_losses}
            save_tensors(self.checkpoint, name=name, tensors=state.tensors, facts=facts)
            self.saved, self.saved_at = (name, state.step), time.monotonic()
            self.save_seconds = self.saved_at - started
        return state

    def _seconds_between_saves(self) -> float:
        return max(self.checkpoint_every_seconds, _TRAINING_PER_SAVE * self.save_seconds) if self.checkpoint_every_seconds > 0 else 0.0

    @torch.no_grad()
    def _restore(self, state: TrainState, *, ignore: frozenset[str]) -> None:
        for key in sorted(self.recipe.keys() - ignore):
            if self.recipe[key] != state.recipe.get(key):
                raise Conflict(f"{key}: expected {state.recipe.get(key)!r}, with which the state was made, got {self.recipe[key]!r}")
        for name, weight in self.weights.items():
            moments = self.optimizer.state[weight]
            weight.copy_(state.tensors[f"weight/{name}"])
            moments["exp_avg"].copy_(state.tensors[f"exp_avg/{name}"])
            moments["exp_avg_sq"].copy_(state.tensors[f"exp_avg_sq/{name}"])
            moments["step"].fill_(float(state.step))
        self.step = state.step
        self.recent = deque(state.recent_losses, maxlen=_RECENT_STEPS)


@dataclass(slots=True, kw_only=True)
class _Epoch:
    number: int
    order_N: Tensor


class _DataOrder:
    """The blocks of each step: epoch e goes over all blocks in a permutation that follows from (seed, e) alone."""

    def __init__(self, blocks_NT: Tensor, *, batch_size: int, seed: int) -> None:
        self.blocks_NT, self.batch_size, self.seed = blocks_NT, batch_size, seed
        self.epoch = self._shuffle(0)

    def batch(self, step: int) -> Tensor:
        num_blocks = len(self.blocks_NT)
        rows: list[Tensor] = []
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        while position < end:
            number, first = divmod(position, num_blocks)
            if number != self.epoch.number:
                self.epoch = self._shuffle(number)
            taken = self.epoch.order_N[first : first + end - position]
            rows.append(self.blocks_NT[taken])
            position += len(taken)
        return torch.cat(rows)

    def _shuffle(self, number: int) -> _Epoch:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{number}".encode()).digest()[:7], "big")
        order_N = torch.randperm(len(self.blocks_NT), generator=torch.Generator().manual_seed(seed))
        return _Epoch(number=number, order_N=order_N)


def _make_optimizer(weights: dict[str, nn.Parameter], *, plan: TrainPlan) -> torch.optim.AdamW:
    """AdamW with its state laid out before the first step, so that every state can be saved."""
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise ValueError(f"{name}: expected float32 weights to train, got {weight.dtype}")
    groups = [
        {"params": [w for w in weights.values() if w.ndim >= 2], "weight_decay": plan.weight_decay},
        {"params": [w for w in weights.values() if w.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(plan.beta1, plan.beta2), fused=True)
    for weight in weights.values():
        optimizer.state[weight] = {
            "step": torch.zeros((), dtype=torch.float32, device=weight.device),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }
    return optimizer


def _load_state(checkpoint: Path, *, name: str) -> TrainState:
    tensors, facts = load_tensors(checkpoint, name=name)
    return TrainState(step=facts["step"], tensors=tensors, recipe=facts["recipe"], recent_losses=tuple(facts["recent_losses"]))


def _standard_error(values_N: Tensor) -> float:
    return float(values_N.std() / math.sqrt(len(values_N))) if len(values_N) > 1 else math.nan
