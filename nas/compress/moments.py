"""Where the optimizer's state lies between two steps, for models whose float32 moments do not fit beside their weights.

    float32     beside the weights: torch's optimizer as it is
    offloaded   float32 in the host's memory; each weight's moments visit the device for its update: the same bits, for the transfers
    bfloat16    beside the weights in half of the memory; float32 during the update, rounded to the nearest afterwards

Works with every optimizer that updates each weight by itself. Knows no loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nas.memory import Moments


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
