"""How much each hidden channel, MLP neuron, attention head, expert and layer matters: forward passes over calibration text, no gradients.

Measures only; the order that follows from it is sorting.py's. Each batch is summed in float32, and the batches'
sums are added up in float64.

Shapes: B batch, T tokens, D hidden, F intermediate, H query heads, E head_dim, Q = H x E, X experts or whichever axis a norm averages over, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nas.architecture import Architecture, read_architecture
from nas.compress.experts import by_file_names, expert_modules, run_experts
from nas.compress.teacher import checkpoint_sources, checkpoint_weights
from nas.errors import InvalidSpec, Problem, TeacherUnavailable
from nas.families import Axis, Source

Method = Literal["energy", "l2_mean", "mean_mean", "second_moment"]

_TINY = torch.finfo(torch.float32).tiny
"""A token of zeros has no energy to share."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Importance:
    """Statistics of one teacher on one calibration text; float64 on the CPU, all >= 0."""

    hidden_D: Tensor
    neurons_LF: Tensor
    """With experts neurons_LXF."""
    heads_LH: Tensor
    """Per query head."""
    block_influence_L: Tensor
    """1 - mean cosine between a layer's input and its output (ShortGPT, arXiv 2403.03853; Minitron's BI)."""
    norm_energy: Mapping[str, Tensor]
    """Weight of a norm over an axis that can be cut -> share of each channel: mean over the tokens of x_j^2 / sum_i x_i^2 at the
    norm's input (of x less its mean, where the family's norms subtract it). Sums to 1."""
    norm_eps: Mapping[str, float]
    """Weight of every norm -> mean over the tokens of eps / (mean square + eps): the part of its divisor that is eps."""
    experts_LX: Tensor | None = None
    """None: a dense family."""


def measure_importance(model: PreTrainedModel, *, blocks_BT: Tensor, method: Method, batch_size: int) -> Importance:
    """One pass over the calibration blocks, all axes at once.

    `energy` scores a unit by the output energy it causes: its mean square activation times the squared norm of the
    weights that read it. What nobody reads, and what is silent, scores 0. On the hidden axis every source counts the same.
    `l2_mean` is Minitron's (L2, mean), arXiv 2407.14679, 2.2: mean over the sequence of |activation|, L2 over the batch;
    hidden channels at the norms' outputs (the stream itself where a family reads it raw) summed, heads by the L2 norm of their attention output.
    `mean_mean` is the same with the mean over the batch (its table 13 has both). `second_moment` is the mean square, readers left out.
    An expert's activations are those of the tokens that it got, times the router's weight, and zero on all others; it is scored as a head is, by its
    output. As a reader of hidden channels it counts by the share of the tokens that it gets.

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
    with torch.no_grad(), _listening(model, architecture=architecture, statistics=score, sums=sums, length=blocks_BT.shape[1]):
        for batch_BT in torch.split(blocks_BT, batch_size):
            model.base_model(input_ids=batch_BT.to(model.device), use_cache=False)
    importance = score.finish(model, architecture, sums, blocks_BT.numel())
    finite = (importance.hidden_D, importance.neurons_LF, importance.heads_LH, importance.block_influence_L, importance.experts_LX)
    if not all(scores is None or bool(scores.isfinite().all()) for scores in finite):
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

    def of(self, quantity: str) -> dict[str, Tensor]:
        """Name -> sum, in the order in which they were first added."""
        return {name: value for (kind, name), value in self._sums.items() if kind == quantity}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Statistics:
    """One method: what it sums over a batch on each axis, and how the sums become scores."""

    hidden: Callable[[Tensor], Tensor]
    neurons: Callable[[Tensor], Tensor]
    heads: Callable[[Tensor], Tensor]
    experts: Callable[[Tensor], Tensor]
    """Of one expert's output_BT1D, as if it were the one head."""
    finish: Callable[[PreTrainedModel, Architecture, _Sums, int], Importance]


@contextmanager
def _listening(model: PreTrainedModel, *, architecture: Architecture, statistics: _Statistics, sums: _Sums, length: int) -> Iterator[None]:
    """Hooks on the norms, the sources, the experts and the layers, for as long as the context lasts. `length`: tokens of a sequence."""
    num_layers = architecture.shape.num_hidden_layers
    handles = []
    for name, weight, _, _ in checkpoint_weights(architecture, num_hidden_layers=num_layers):
        if weight.is_norm:
            add = _add_norm(name, architecture=architecture, eps=float(getattr(model.config, architecture.family.eps_key)), sums=sums)
            handles.append(_module_of(model, name).register_forward_pre_hook(lambda module, inputs, add=add: add(inputs[0].float())))
    for source in checkpoint_sources(architecture, num_hidden_layers=num_layers):
        add = _add_activation(source, statistics=statistics, head_dim=architecture.shape.head_dim, sums=sums)
        if source.axis is Axis.INTERMEDIATE and architecture.shape.num_experts:
            continue  # the experts of a layer are one module
        if source.norm is not None:  # its output rather than the reader's input: the head is not run
            handles.append(_module_of(model, source.norm).register_forward_hook(lambda module, inputs, output_BTD, add=add: add(output_BTD.float())))
        else:
            handles.append(_module_of(model, source.readers[0]).register_forward_pre_hook(lambda module, inputs, add=add: add(inputs[0].float())))
    for layer, module in enumerate(expert_modules(model, architecture=architecture)):
        handles.append(module.register_forward_pre_hook(_add_experts(layer, architecture=architecture, statistics=statistics, sums=sums, length=length)))
    for name in layer_modules(architecture):
        handles.append(model.get_submodule(name).register_forward_hook(_add_cosine(name, sums=sums)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _module_of(model: PreTrainedModel, weight: str) -> nn.Module:
    module: nn.Module = model.get_submodule(weight.rpartition(".")[0])
    return module


def _add_norm(name: str, *, architecture: Architecture, eps: float, sums: _Sums) -> Callable[[Tensor], None]:
    """What a norm averages over: each channel's share, and the part that is eps."""

    def add(input_BTX: Tensor) -> None:
        if architecture.family.norms_centre:
            input_BTX = input_BTX - input_BTX.mean(-1, keepdim=True)
        square_BTX = input_BTX.square()
        eps_BT = eps / (square_BTX.mean(-1) + eps).clamp_min(_TINY)
        sums.add("eps", name, eps_BT.sum())
        sums.add("normalised", name, torch.tensor(eps_BT.numel()))
        if square_BTX.ndim == 3:  # a norm on each head has one dimension more; its axis is never cut
            sums.add("share", name, (square_BTX / square_BTX.sum(-1, keepdim=True).clamp_min(_TINY)).sum((0, 1)))

    return add


def _add_activation(source: Source, *, statistics: _Statistics, head_dim: int, sums: _Sums) -> Callable[[Tensor], None]:
    name = source.readers[0]
    if source.axis is Axis.HIDDEN:
        return lambda activation_BTD: sums.add("hidden", name, statistics.hidden(activation_BTD))
    if source.axis is Axis.INTERMEDIATE:
        return lambda activation_BTF: sums.add("neurons", name, statistics.neurons(activation_BTF))
    return lambda activation_BTQ: sums.add("heads", name, statistics.heads(torch.unflatten(activation_BTQ, -1, (-1, head_dim))))


def _add_experts(layer: int, *, architecture: Architecture, statistics: _Statistics, sums: _Sums, length: int) -> Callable[..., None]:
    """What each expert of a layer does, under the name of the weight that reads its neurons."""
    (reader,) = (source.readers[0] for source in architecture.family.sources if source.axis is Axis.INTERMEDIATE)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden_ND, top_k_index, top_k_weights = inputs
        for one in run_experts(module, hidden_ND, top_k_index=top_k_index, top_k_weights=top_k_weights):
            name = reader.format(layer=layer, expert=one.expert)
            output_ND = nn.functional.linear(one.neurons_NF, module.get_parameter("down_proj")[one.expert])
            neurons_BTF, output_BTD = (_in_sequences(values, tokens_N=one.tokens_N, length=length, of=len(hidden_ND)) for values in (one.neurons_NF, output_ND))
            sums.add("neurons", name, statistics.neurons(neurons_BTF))
            sums.add("experts", name, statistics.experts(output_BTD.unsqueeze(2)))
            sums.add("routed", _stem(name), torch.tensor(len(one.tokens_N)))

    return hook


def _in_sequences(values_NX: Tensor, *, tokens_N: Tensor, length: int, of: int) -> Tensor:
    """activation_BTX, float32, of all tokens: zero on those that the expert did not get."""
    all_NX = values_NX.new_zeros(of, values_NX.shape[1], dtype=torch.float32).index_copy(0, tokens_N, values_NX.float())
    return torch.unflatten(all_NX, 0, (-1, length))


def _add_cosine(name: str, *, sums: _Sums) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output_BTD: Tensor) -> None:
        sums.add("cosine", name, nn.functional.cosine_similarity(inputs[0].float(), output_BTD.float(), dim=-1).sum())

    return hook


def layer_modules(architecture: Architecture) -> list[str]:
    """Module path of every layer, read off the names of its weights."""
    template = next(weight.name for weight in architecture.weights if weight.per_layer)
    stem = template.partition("{layer}")[0]
    return [f"{stem}{layer}" for layer in range(architecture.shape.num_hidden_layers)]


def _stem(name: str) -> str:
    """What the names of all weights of one expert have in common."""
    return name.rsplit(".", 2)[0]


def _energy(model: PreTrainedModel, architecture: Architecture, sums: _Sums, num_tokens: int) -> Importance:
    weights, routed = by_file_names(model.state_dict(), architecture=architecture), sums.of("routed")

    def neurons(name: str) -> Tensor:
        return sums.get("neurons", name) / num_tokens * _column_energy(weights[name])

    def heads(name: str) -> Tensor:
        # E||W_h a_h||^2 is the inner product of the head's Gram of activations with that of its columns
        weight_DHE = torch.unflatten(weights[name].float(), -1, (-1, architecture.shape.head_dim))
        gram_HEE = torch.einsum("dhe,dhf->hef", weight_DHE, weight_DHE).double()
        return (gram_HEE * sums.get("heads", name) / num_tokens).sum((1, 2)).clamp_min(0)

    def reading(reader: str) -> Tensor:
        return _column_energy(weights[reader]) * (routed[_stem(reader)] / num_tokens if _stem(reader) in routed else 1)

    def hidden(source: Source) -> Tensor:
        energy_D = sums.get("hidden", source.readers[0]) / num_tokens * sum(reading(reader) for reader in source.readers)
        return energy_D / energy_D.sum().clamp_min(torch.finfo(torch.float64).tiny)

    return _collect(architecture, sums, num_tokens, hidden=hidden, neurons=neurons, heads=heads, experts=lambda name: sums.get("experts", name) / num_tokens)


def _as_summed(model: PreTrainedModel, architecture: Architecture, sums: _Sums, num_tokens: int) -> Importance:
    return _collect(
        architecture,
        sums,
        num_tokens,
        hidden=lambda source: sums.get("hidden", source.readers[0]) / num_tokens,
        neurons=lambda name: sums.get("neurons", name) / num_tokens,
        heads=lambda name: sums.get("heads", name) / num_tokens,
        experts=lambda name: sums.get("experts", name) / num_tokens,
    )


def _root(model: PreTrainedModel, architecture: Architecture, sums: _Sums, num_tokens: int) -> Importance:
    return _collect(
        architecture,
        sums,
        num_tokens,
        hidden=lambda source: sums.get("hidden", source.readers[0]).sqrt(),
        neurons=lambda name: sums.get("neurons", name).sqrt(),
        heads=lambda name: sums.get("heads", name).sqrt(),
        experts=lambda name: sums.get("experts", name).sqrt(),
    )


def _collect(
    architecture: Architecture,
    sums: _Sums,
    num_tokens: int,
    *,
    hidden: Callable[[Source], Tensor],
    neurons: Callable[[str], Tensor],
    heads: Callable[[str], Tensor],
    experts: Callable[[str], Tensor],
) -> Importance:
    """Scores per weight, stacked over the layers; hidden channels are summed over the sources."""
    num_layers = architecture.shape.num_hidden_layers
    sources: dict[Axis, list[Source]] = {axis: [] for axis in Axis}
    for source in checkpoint_sources(architecture, num_hidden_layers=num_layers):
        sources[source.axis].append(source)
    neurons_LF = torch.stack([neurons(source.readers[0]) for source in sources[Axis.INTERMEDIATE]]).cpu()
    experts_LX = None
    if architecture.shape.num_experts:
        neurons_LF = torch.unflatten(neurons_LF, 0, (num_layers, -1))
        experts_LX = torch.stack([experts(source.readers[0]) for source in sources[Axis.INTERMEDIATE]]).reshape(num_layers, -1).cpu()
    cosine_L = torch.stack([sums.get("cosine", name) for name in layer_modules(architecture)]) / num_tokens
    return Importance(
        hidden_D=torch.stack([hidden(source) for source in sources[Axis.HIDDEN]]).sum(0).cpu(),
        neurons_LF=neurons_LF,
        heads_LH=torch.stack([heads(source.readers[0]) for source in sources[Axis.QUERY]]).cpu(),
        block_influence_L=(1 - cosine_L).clamp_min(0).cpu(),
        norm_energy={name: (share_X / share_X.sum()).cpu() for name, share_X in sums.of("share").items()},
        norm_eps={name: float(total / sums.get("normalised", name)) for name, total in sums.of("eps").items()},
        experts_LX=experts_LX,
    )


def _column_energy(weight: Tensor) -> Tensor:
    """Squared norm of every column: how loudly a weight reads each of its inputs."""
    return weight.detach().float().square().sum(0).double()


def _square_sum(activation_BTX: Tensor) -> Tensor:
    return activation_BTX.square().sum((0, 1))


def _head_gram(activation_BTHE: Tensor) -> Tensor:
    return torch.einsum("bthe,bthf->hef", activation_BTHE, activation_BTHE)


def _absolute_sum(activation_BTX: Tensor) -> Tensor:
    return activation_BTX.abs().sum((0, 1))


def _mean_then_square(activation_BTX: Tensor) -> Tensor:
    return activation_BTX.abs().mean(1).square().sum(0)


def _of_norms(statistic: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A head is as large as its output is long."""
    return lambda activation_BTHE: statistic(activation_BTHE.norm(dim=-1))


def _statistics(statistic: Callable[[Tensor], Tensor], *, finish: Callable[[PreTrainedModel, Architecture, _Sums, int], Importance]) -> _Statistics:
    """A method that does the same on every axis."""
    return _Statistics(hidden=statistic, neurons=statistic, heads=_of_norms(statistic), experts=_of_norms(statistic), finish=finish)


_METHODS: Mapping[str, _Statistics] = {
    "energy": _Statistics(hidden=_square_sum, neurons=_square_sum, heads=_head_gram, experts=_of_norms(_square_sum), finish=_energy),
    "l2_mean": _statistics(_mean_then_square, finish=_root),
    "mean_mean": _statistics(_absolute_sum, finish=_as_summed),
    "second_moment": _statistics(_square_sum, finish=_as_summed),
}
