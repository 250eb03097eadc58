"""How much each hidden channel, MLP neuron, attention head and layer matters: forward passes over calibration text, no gradients.

Measures only; the order that follows from it is sorting.py's. Each batch is summed in float32, and the batches'
sums are added up in float64.

Shapes: B batch, T tokens, D hidden, F intermediate, H query heads, E head_dim, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nas.compress.teacher import checkpoint_weights
from nas.errors import InvalidSpec, Problem, TeacherUnavailable
from nas.families import Architecture, read_architecture

Method = Literal["energy", "l2_mean"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Importance:
    """Statistics of one teacher on one calibration text; float64 on the CPU, all >= 0."""

    hidden_D: Tensor
    neurons_LF: Tensor
    heads_LH: Tensor
    """Per query head."""
    block_influence_L: Tensor
    """1 - mean cosine between a layer's input and its output (ShortGPT, arXiv 2403.03853; Minitron's BI)."""
    norm_energy: Mapping[str, Tensor]
    """Norm weight -> share_D: mean over the tokens of x_j^2 / sum_i x_i^2 at that norm's input. Sums to 1."""


def measure_importance(model: PreTrainedModel, *, blocks_BT: Tensor, method: Method, batch_size: int) -> Importance:
    """One pass over the calibration blocks, all axes at once.

    `energy` scores a unit by the output energy it causes: its mean square activation times the squared norm of the
    weights that read it. What nobody reads, and what is silent, scores 0. On the hidden axis every norm counts the same.
    `l2_mean` is Minitron's (L2, mean), arXiv 2407.14679, 2.2: mean over the sequence of |activation|, L2 over the batch;
    hidden channels at the norms' outputs summed over all norms, heads by the L2 norm of their attention output.

    Args:
        model: in evaluation mode.
        blocks_BT: token ids without padding.
        batch_size: sequences per forward pass; changes speed and memory, not the result.
    Raises:
        InvalidSpec: unknown method.
        TeacherUnavailable: the activations are not finite (a dtype too narrow, a broken checkpoint).
    """
    if method not in _METHODS:
        raise InvalidSpec(Problem(field="importance", expected=" or ".join(_METHODS), got=repr(method)))
    architecture = read_architecture(model.config.to_dict())
    score = _METHODS[method]
    sums = _Sums()
    with torch.no_grad(), _listening(model, architecture=architecture, statistics=score, sums=sums):
        for batch_BT in torch.split(blocks_BT, batch_size):
            model.base_model(input_ids=batch_BT.to(model.device), use_cache=False)
    importance = score.finish(model, architecture, sums, blocks_BT.numel())
    finite = (importance.hidden_D, importance.neurons_LF, importance.heads_LH, importance.block_influence_L)
    if not all(bool(scores.isfinite().all()) for scores in finite):
        raise TeacherUnavailable("importance: expected finite activations on the calibration text, got NaN or infinity; try dtype float32")
    return importance


class _Sums:
    """Running float64 sums by (quantity, weight or module name), on the device of the model."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], Tensor] = {}

    def add(self, quantity: str, name: str, value: Tensor) -> None:
        value = value.detach().double()
        key = (quantity, name)
        self._sums[key] = self._sums[key] + value if key in self._sums else value

    def get(self, quantity: str, name: str) -> Tensor:
        return self._sums[quantity, name]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Statistics:
    """One method: what it sums over a batch on each axis, and how the sums become scores."""

    hidden: Callable[[Tensor], Tensor]
    neurons: Callable[[Tensor], Tensor]
    heads: Callable[[Tensor], Tensor]
    finish: Callable[[PreTrainedModel, Architecture, _Sums, int], Importance]


@contextmanager
def _listening(model: PreTrainedModel, *, architecture: Architecture, statistics: _Statistics, sums: _Sums) -> Iterator[None]:
    """Hooks on the norms, the readers of neurons and heads, and the layers, for as long as the context lasts."""
    shape, family = architecture.shape, architecture.family

    def on_norm(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output_BTD: Tensor) -> None:
            square_BTD = inputs[0].float().square()
            tiny = torch.finfo(torch.float32).tiny  # a token of zeros has no energy to share
            sums.add("share", name, (square_BTD / square_BTD.sum(-1, keepdim=True).clamp_min(tiny)).sum((0, 1)))
            sums.add("hidden", name, statistics.hidden(output_BTD.float()))

        return hook

    def on_neurons(name: str) -> Callable[..., None]:
        return lambda module, inputs: sums.add("neurons", name, statistics.neurons(inputs[0].float()))

    def on_heads(name: str) -> Callable[..., None]:
        return lambda module, inputs: sums.add("heads", name, statistics.heads(inputs[0].float().unflatten(-1, (-1, shape.head_dim))))

    def on_layer(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output_BTD: Tensor) -> None:
            sums.add("cosine", name, nn.functional.cosine_similarity(inputs[0].float(), output_BTD.float(), dim=-1).sum())

        return hook

    handles = []
    for name, weight, _ in checkpoint_weights(architecture, num_hidden_layers=shape.num_hidden_layers):
        module = model.get_submodule(name.rpartition(".")[0])
        if weight.is_norm:
            handles.append(module.register_forward_hook(on_norm(name)))
        elif weight.name == family.neuron_reader:
            handles.append(module.register_forward_pre_hook(on_neurons(name)))
        elif weight.name == family.head_reader:
            handles.append(module.register_forward_pre_hook(on_heads(name)))
    for name in layer_modules(architecture):
        handles.append(model.get_submodule(name).register_forward_hook(on_layer(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_modules(architecture: Architecture) -> list[str]:
    """Module path of every layer, read off the names of its weights."""
    template = next(weight.name for weight in architecture.weights if weight.per_layer)
    stem = template.partition("{layer}")[0]
    return [f"{stem}{layer}" for layer in range(architecture.shape.num_hidden_layers)]


def _energy(model: PreTrainedModel, architecture: Architecture, sums: _Sums, num_tokens: int) -> Importance:
    def neurons(name: str) -> Tensor:
        return sums.get("neurons", name) / num_tokens * _column_energy(model.get_parameter(name))

    def heads(name: str) -> Tensor:
        # E||W_h a_h||^2 is the inner product of the head's Gram of activations with that of its columns
        weight_DHE = model.get_parameter(name).float().unflatten(-1, (-1, architecture.shape.head_dim))
        gram_HEE = torch.einsum("dhe,dhf->hef", weight_DHE, weight_DHE).double()
        return (gram_HEE * sums.get("heads", name) / num_tokens).sum((1, 2)).clamp_min(0)

    def hidden(name: str, readers: tuple[str, ...]) -> Tensor:
        energy_D = sums.get("hidden", name) / num_tokens * sum(_column_energy(model.get_parameter(reader)) for reader in readers)
        return energy_D / energy_D.sum().clamp_min(torch.finfo(torch.float64).tiny)

    return _collect(architecture, sums, num_tokens, hidden=hidden, neurons=neurons, heads=heads)


def _l2_mean(model: PreTrainedModel, architecture: Architecture, sums: _Sums, num_tokens: int) -> Importance:
    return _collect(
        architecture,
        sums,
        num_tokens,
        hidden=lambda name, readers: sums.get("hidden", name).sqrt(),
        neurons=lambda name: sums.get("neurons", name).sqrt(),
        heads=lambda name: sums.get("heads", name).sqrt(),
    )


def _collect(
    architecture: Architecture,
    sums: _Sums,
    num_tokens: int,
    *,
    hidden: Callable[[str, tuple[str, ...]], Tensor],
    neurons: Callable[[str], Tensor],
    heads: Callable[[str], Tensor],
) -> Importance:
    """Scores per weight, stacked over the layers; hidden channels are summed over the norms."""
    family, layers = architecture.family, range(architecture.shape.num_hidden_layers)
    norms = {
        name: tuple(reader.format(layer=layer) for reader in family.hidden_readers[weight.name])
        for name, weight, layer in checkpoint_weights(architecture, num_hidden_layers=len(layers))
        if weight.is_norm
    }
    cosine_L = torch.stack([sums.get("cosine", name) for name in layer_modules(architecture)]) / num_tokens
    shares = {name: sums.get("share", name) for name in norms}
    return Importance(
        hidden_D=torch.stack([hidden(name, readers) for name, readers in norms.items()]).sum(0).cpu(),
        neurons_LF=torch.stack([neurons(family.neuron_reader.format(layer=layer)) for layer in layers]).cpu(),
        heads_LH=torch.stack([heads(family.head_reader.format(layer=layer)) for layer in layers]).cpu(),
        block_influence_L=(1 - cosine_L).clamp_min(0).cpu(),
        norm_energy={name: (share_D / share_D.sum()).cpu() for name, share_D in shares.items()},
    )


def _column_energy(weight: Tensor) -> Tensor:
    """Squared norm of every column: how loudly a weight reads each of its inputs."""
    return weight.detach().float().square().sum(0).double()


def _square_sum(activation_BTX: Tensor) -> Tensor:
    return activation_BTX.square().sum((0, 1))


def _head_gram(activation_BTHE: Tensor) -> Tensor:
    return torch.einsum("bthe,bthf->hef", activation_BTHE, activation_BTHE)


def _mean_then_square(activation_BTX: Tensor) -> Tensor:
    return activation_BTX.abs().mean(1).square().sum(0)


_METHODS: Mapping[str, _Statistics] = {
    "energy": _Statistics(hidden=_square_sum, neurons=_square_sum, heads=_head_gram, finish=_energy),
    "l2_mean": _Statistics(
        hidden=_mean_then_square,
        neurons=_mean_then_square,
        heads=lambda activation_BTHE: _mean_then_square(activation_BTHE.norm(dim=-1)),
        finish=_l2_mean,
    ),
}
