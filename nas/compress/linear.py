"""Linear layers in passes without gradients: float32 on a CPU is multiplied by oneDNN rather than by the BLAS library behind PyTorch.

That library is MKL, which stays with AVX2 on processors that are not Intel's: on an EPYC with AVX-512 oneDNN takes less than half of its time for the
same sums, up to rounding (LOG.md). PyTorch itself multiplies bfloat16 by oneDNN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

_HAS_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs @ weight.T + bias, as torch.nn.functional.linear."""
    is_float = inputs.dtype == torch.float32 and inputs.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if not is_float or torch.is_grad_enabled() or not _HAS_ONEDNN:
        return functional.linear(inputs, weight, bias)
    # The operator that torch.compile makes of a linear layer; compiling would want a C++ compiler on every worker.
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return product


@contextlib.contextmanager
def fast_linear_layers(model: nn.Module) -> Iterator[None]:
    """The model's linear layers compute by `linear` for a while."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.__dict__["forward"] = _forward_of(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _forward_of(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda inputs: linear(inputs, layer.weight, layer.bias)
