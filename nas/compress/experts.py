"""Mixtures of experts: from the checkpoint's tensors, each expert's own, to the fused parameters of transformers' modules and back; and what each expert does.

The families' table speaks of the file's names. A dense family has no other names, and passes through here unchanged.

Shapes: N tokens, D hidden, F intermediate, X experts, R rows of all the weights that one parameter holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nas.architecture import Architecture
from nas.families import Weight


def by_file_names(state: Mapping[str, Tensor], *, architecture: Architecture) -> dict[str, Tensor]:
    """A module's state under the checkpoint's names: views of the same memory. What has these names already stays.

    Args:
        architecture: of the state's own shape.
    """
    named, sizes = dict(state), architecture.sizes(architecture.shape)
    for parameter, weights, layer in _renamed(architecture):
        if parameter not in named:
            continue
        tensor = named.pop(parameter)
        if not weights[0].per_expert:
            named[weights[0].name.format(layer=layer)] = tensor
            continue
        lengths = [weight.lengths(sizes)[0] for weight in weights]
        for expert, rows_RX in enumerate(tensor):
            for weight, rows in zip(weights, rows_RX.split(lengths), strict=True):
                named[weight.name.format(layer=layer, expert=expert)] = rows
    return named


def fuse_experts(state: dict[str, Tensor], *, architecture: Architecture) -> None:
    """Put a checkpoint's tensors under the names of transformers' module, in place: no more than one fused parameter is in memory twice.

    Args:
        architecture: of the state's own shape.
    """
    for parameter, weights, layer in _renamed(architecture):
        if weights[0].per_expert:
            experts = range(architecture.shape.num_experts or 0)
            state[parameter] = torch.stack([torch.cat([state.pop(weight.name.format(layer=layer, expert=expert)) for weight in weights]) for expert in experts])
        else:
            state[parameter] = state.pop(weights[0].name.format(layer=layer))


def _renamed(architecture: Architecture) -> Iterator[tuple[str, list[Weight], int]]:
    """Every parameter of the module that the file calls otherwise, with the weights that it holds and its layer."""
    held: dict[str, list[Weight]] = {}
    for weight in architecture.weights:
        if weight.name in architecture.family.parameters:
            held.setdefault(architecture.family.parameters[weight.name], []).append(weight)
    for parameter, weights in held.items():
        for layer in range(architecture.shape.num_hidden_layers):
            yield parameter.format(layer=layer), weights, layer


def expert_modules(model: PreTrainedModel, *, architecture: Architecture) -> list[nn.Module]:
    """The module with all experts of each layer; none in a dense family."""
    fused = [parameter for weight, parameter in architecture.family.parameters.items() if "{expert}" in weight][:1]
    layers = range(architecture.shape.num_hidden_layers)
    return [model.get_submodule(parameter.rpartition(".")[0].format(layer=layer)) for parameter in fused for layer in layers]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routed:
    """One expert on the tokens that were sent to it."""

    expert: int
    tokens_N: Tensor
    """Their positions."""
    neurons_NF: Tensor
    """What its down projection reads, times the router's weight: the projection of it is what the expert adds to the stream."""


@torch.no_grad()
def run_experts(module: nn.Module, hidden_ND: Tensor, *, top_k_index: Tensor, top_k_weights: Tensor) -> Iterator[Routed]:
    """Every expert of a module, one after the other, those without tokens too; the module's own forward pass shows none of this.

    Args:
        module: transformers' fused experts.
        hidden_ND, top_k_index, top_k_weights: its inputs.
    """
    gate_up_XRD, activate = module.get_parameter("gate_up_proj"), module.get_submodule("act_fn")
    for expert in range(len(gate_up_XRD)):
        tokens_N, place_N = torch.where(top_k_index == expert)
        gate_NF, up_NF = nn.functional.linear(hidden_ND[tokens_N], gate_up_XRD[expert]).chunk(2, dim=-1)
        weight_N = top_k_weights[tokens_N, place_N].to(up_NF.dtype)
        yield Routed(expert=expert, tokens_N=tokens_N, neurons_NF=activate(gate_NF) * up_NF * weight_N[:, None])
