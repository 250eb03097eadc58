"""Muon: momentum whose direction is made orthogonal, for the matrices inside the layers. Embeddings, head and norms are AdamW's.

An AdamW step is as large as its largest element allows; a gradient of a pruned model has few large directions, and Muon moves along all of them
alike. It needs one moment instead of two, and (20 m + 10 m^2 / n) / 6T of the student's own arithmetic more, for matrices of m <= n and T tokens a
step: small where a step has many times more tokens than the model has channels.

torch.optim.Muon is the same update for one matrix at a time; this one takes matrices of one shape together, which is several times faster where they
are small, takes stacked experts, and does not wait for a rate that lies on the device.

Source: K. Jordan et al., https://kellerjordan.github.io/posts/muon/; the size of the update: Liu et al., arXiv 2502.16982, section 2.2.
Shape suffixes: S matrices of one shape, M rows, N columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nas.compress.device import multiplies_bfloat16

_COEFFICIENTS = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_UPDATE_RMS = 0.2
"""Of an AdamW step, as measured in arXiv 2502.16982: with it both take the same kind of rate."""
_STACK_ELEMENTS = 2**22
"""Matrices are stacked up to this size: 16 MiB in float32. A larger one goes alone."""


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum of matrices, or of stacks of them; the state is laid out before the first step."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float) -> None:
        """
        Args:
            groups: of weights of two dimensions, or three where the first counts matrices (experts).
            lr: the update's root mean square is 0.2 of it.
        """
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for weight in [weight for group in self.param_groups for weight in group["params"]]:
            if weight.ndim not in (2, 3):
                raise ValueError(f"weights: expected matrices or stacks of matrices, got the shape {tuple(weight.shape)}")
            self.state[weight] = {"momentum": torch.zeros_like(weight)}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for alike in _stacks(weight for weight in group["params"] if weight.grad is not None):
                momenta: list[Tensor] = [self.state[weight]["momentum"] for weight in alike]
                gradients = [weight.grad for weight in alike if weight.grad is not None]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
                updates_SMN = orthogonalise(torch.cat([direction.view(-1, *direction.shape[-2:]) for direction in directions]))
                updates_SMN *= group["lr"] * (_UPDATE_RMS * max(updates_SMN.shape[-2:]) ** 0.5)
                for weight, update_SMN in zip(alike, torch.split(updates_SMN, [weight[..., 0, 0].numel() for weight in alike]), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update_SMN.view_as(weight))


def orthogonalise(matrices_SMN: Tensor) -> Tensor:
    """The nearest matrices whose singular values are alike, roughly 0.7 to 1.2; those far below the largest, by a thousand and more, stay behind.

    Five steps of Newton-Schulz, in bfloat16 where the device multiplies it. Returns: float32.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices_SMN.shape[-2] > matrices_SMN.shape[-1]
    X_SMN = matrices_SMN.mT if tall else matrices_SMN
    X_SMN = X_SMN / X_SMN.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    if multiplies_bfloat16(matrices_SMN.device):
        X_SMN = X_SMN.bfloat16()
    for _ in range(_ITERATIONS):
        gram_SMM = X_SMN @ X_SMN.mT
        X_SMN = torch.baddbmm(X_SMN, torch.baddbmm(gram_SMM, gram_SMM, gram_SMM, beta=b, alpha=c), X_SMN, beta=a)
    return (X_SMN.mT if tall else X_SMN).float().contiguous()


def _stacks(weights: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Weights whose matrices have one shape, together as far as `_STACK_ELEMENTS` allows."""
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for weight in weights:
        by_shape.setdefault(tuple(weight.shape[-2:]), []).append(weight)
    for alike in by_shape.values():
        stack: list[nn.Parameter] = []
        for weight in alike:
            if stack and sum(other.numel() for other in stack) + weight.numel() > _STACK_ELEMENTS:
                yield stack
                stack = []
            stack.append(weight)
        yield stack
