"""The optimizer, and where its state lies between two steps, for models whose float32 moments do not fit beside their weights.

    float32     beside the weights: torch's optimizer as it is
    offloaded   float32 in the host's memory; each weight's moments visit the device for its update: the same bits, for the transfers
    bfloat16    beside the weights in half of the memory; float32 during the update, rounded to the nearest afterwards

Works with every optimizer that updates each weight by itself; Muon's stacks of small matrices (muon.py) are then taken apart, which changes their rounding.
Knows no loop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nas.compress.muon import Muon
from nas.compress.train_plan import TrainPlan
from nas.errors import InvalidSpec, Problem
from nas.memory import Moments

_MUON_RATE = 3.0
"""Muon's rate over AdamW's in the same run (LOG.md)."""


def make_optimizer(weights: dict[str, nn.Parameter], *, plan: TrainPlan, tables: Collection[nn.Parameter] = ()) -> Together | ParkedOptimizer:
    """The plan's optimizer with its state laid out before the first step, so that every state can be saved.

    Every one of its groups has a `rate_scale`, by which the plan's rate is multiplied.

    Args:
        tables: those of the weights that Muon does not take although they are matrices.
    Raises:
        InvalidSpec: Muon on shards, of which none is a matrix.
    """
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise ValueError(f"{name}: expected float32 weights to train, got {weight.dtype}")
    outside = set(tables)
    turned = {w for w in weights.values() if plan.optimizer == "muon" and w.ndim >= 2 and w not in outside}
    if any(isinstance(weight, DTensor) for weight in turned):
        expected = "adamw where the weights are sharded (muon needs whole matrices)"
        raise InvalidSpec(Problem(field="optimizer", expected=expected, got="muon"))
    make = partial(_parts, plan=plan, turned=turned)
    return Together(make(weights)) if plan.moments == "float32" else ParkedOptimizer(weights, make=lambda one: make(one)[0], moments=plan.moments)


def _parts(weights: dict[str, nn.Parameter], *, plan: TrainPlan, turned: Set[nn.Parameter]) -> list[torch.optim.Optimizer]:
    rest = {name: weight for name, weight in weights.items() if weight not in turned}
    matrices = [weight for weight in weights.values() if weight in turned]
    parts: list[torch.optim.Optimizer] = [_make_adamw(rest, plan=plan)] if rest else []
    if matrices:
        group = {"params": matrices, "rate_scale": _MUON_RATE}
        parts.append(Muon([group], lr=plan.learning_rate, momentum=plan.beta1, weight_decay=plan.weight_decay))
    return parts


def _make_adamw(weights: dict[str, nn.Parameter], *, plan: TrainPlan) -> torch.optim.Optimizer:
    # A fused step takes shards or whole tensors, not both: what an objective learns beside a sharded student is whole.
    groups = [
        {"params": [w for w in weights.values() if (w.ndim >= 2) == matrices and isinstance(w, DTensor) == shards], "weight_decay": decay, "rate_scale": 1.0}
        for shards in (False, True)
        for matrices, decay in ((True, plan.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=plan.learning_rate, betas=(plan.beta1, plan.beta2), fused=True)
    for weight in weights.values():
        optimizer.state[weight] = {
            "step": torch.zeros((), dtype=torch.float32, device=weight.device),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }
    return optimizer


class Together:
    """Optimizers of disjoint weights as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._parts = parts
        self.param_groups: list[dict[str, Any]] = [group for part in parts for group in part.param_groups]
        self.state: dict[Tensor, dict[str, Any]] = {weight: state for part in parts for weight, state in part.state.items()}

    def step(self) -> None:
        for part in self._parts:
            part.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none=set_to_none)


class ParkedOptimizer:
    """The part of torch's optimizer interface that the loop needs; steps weight by weight, so that one weight's moments exist as float32 at a time."""

    def __init__(self, weights: Mapping[str, nn.Parameter], *, make: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer], moments: Moments) -> None:
        """
        Args:
            make: an optimizer of these weights, its state laid out.
        """
        self.state: dict[nn.Parameter, dict[str, Any]] = {}
        self.param_groups: list[dict[str, Any]] = []
        self._parts: dict[nn.Parameter, torch.optim.Optimizer] = {}
        for name, weight in weights.items():
            part = make({name: weight})
            self.state[weight] = {key: _park(tensor, like=weight, moments=moments) for key, tensor in part.state.pop(weight).items()}
            self.param_groups += part.param_groups
            self._parts[weight] = part

    @torch.no_grad()
    def step(self) -> None:
        for weight, part in self._parts.items():
            parked = self.state[weight]
            state = {key: tensor.to(weight.device, torch.float32, non_blocking=True) for key, tensor in parked.items()}
            part.state[weight] = state
            part.step()
            for key, tensor in parked.items():
                tensor.copy_(state[key], non_blocking=True)
            del part.state[weight]
        if any(weight.is_cuda for weight in self._parts):
            torch.cuda.synchronize()  # the copies into the host's memory are read by whoever saves the state

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        for part in self._parts.values():
            part.zero_grad(set_to_none=set_to_none)


def _park(tensor: Tensor, *, like: Tensor, moments: Moments) -> Tensor:
    """The tensor where it stays between steps; numbers that do not grow with the weight stay as they are."""
    if tensor.shape != like.shape or moments == "float32":
        return tensor
    if moments == "bfloat16":
        return tensor.to(torch.bfloat16)
    return tensor.to("cpu").pin_memory() if tensor.is_cuda else tensor.to("cpu", copy=True)
