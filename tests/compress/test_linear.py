"""A faster product is the same product, and a model keeps its own layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from nas.compress.linear import fast_linear_layers, linear


class Recorder(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def operators(work: Callable[[], object]) -> set[str]:
    with Recorder() as recorder:
        work()
    return recorder.names


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("shape", [(7, 24), (1, 24), (2, 3, 24), (0, 24)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_product_is_the_one_of_torch(shape: tuple[int, ...], has_bias: bool) -> None:
    inputs, weight, bias = drawn(shape, (11, 24), (11,))
    with torch.no_grad():
        found = linear(inputs, weight, bias if has_bias else None)
    torch.testing.assert_close(found, functional.linear(inputs, weight, bias if has_bias else None))


def test_inputs_and_weights_may_be_views() -> None:
    inputs, weight = drawn((24, 7), (24, 11))
    with torch.inference_mode():
        torch.testing.assert_close(linear(inputs.t()[::2], weight.t()), inputs.t()[::2] @ weight)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
def test_float32_without_gradients_is_multiplied_by_onednn_and_nothing_else_is() -> None:
    inputs, weight = drawn((7, 24), (11, 24))
    with torch.no_grad():
        assert "mkldnn::_linear_pointwise" in operators(lambda: linear(inputs, weight))
        assert "mkldnn::_linear_pointwise" not in operators(lambda: linear(inputs.double(), weight.double()))
    assert "mkldnn::_linear_pointwise" not in operators(lambda: linear(inputs, weight))


def test_layers_compute_as_ever_where_gradients_are_wanted() -> None:
    layer, (inputs,) = nn.Linear(24, 11), drawn((7, 24))
    with fast_linear_layers(nn.Sequential(layer)):
        layer(inputs).sum().backward()
    assert layer.weight.grad is not None


def test_a_model_has_its_own_layers_again_afterwards() -> None:
    model, (inputs,) = nn.Sequential(nn.Linear(24, 11), nn.ReLU(), nn.Linear(11, 3)), drawn((7, 24))
    before = [dict(module.__dict__) for module in model.modules()]
    with torch.no_grad():
        expected = model(inputs)
        with fast_linear_layers(model):
            torch.testing.assert_close(model(inputs), expected)
        with pytest.raises(RuntimeError, match="inner product"), fast_linear_layers(model):
            model(inputs[:, 1:])
        assert torch.equal(model(inputs), expected)
    assert [dict(module.__dict__) for module in model.modules()] == before
