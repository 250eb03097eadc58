"""Which layers each depth keeps: measured on calibration tokens, forward passes only.

What the bare cut costs says little about what it costs after training: on stories260K the layer whose removal hurts most is the one to
remove (LOG.md). A student learns quickly whatever a linear map of its residual stream, or its own embedding table, can make up for. So by
default each gap is bridged first, by least squares from the stream before it to the stream behind it, and the KL that is left decides.

Shapes: B batch, T tokens, N = B x T, D hidden, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nas.architecture import Architecture, read_architecture
from nas.compress.importance import Importance, layer_modules
from nas.compress.losses import Head, final_hidden, forward_kl, head_of, token_chunks
from nas.errors import InvalidSpec, Problem
from nas.families import Axis

DepthMethod = Literal["bridged_damage", "damage", "contiguous", "block_influence", "task"]

DEPTH_TOKENS = 16_384
"""Calibration tokens that order layer sets: each of many sets is a pass over them, and a difference worth acting on shows in far fewer."""
_RIDGE = 0.01
"""Damping of a bridge towards leaving the stream as it is, relative to each channel's variance. From .001 to .1 the same layers are chosen."""
_TOKEN_PRIOR = 4.0
"""Occurrences at which half of a token's own mean residual is believed."""

Damage = Callable[[tuple[int, ...]], float]


def choose_layers(
    model: PreTrainedModel,
    *,
    method: DepthMethod,
    importance: Importance,
    depths: Sequence[int],
    blocks_BT: Tensor,
    batch_size: int,
    by_task: Callable[[Damage], Damage] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> dict[int, tuple[int, ...]]:
    """For every depth the layers to keep, ascending.

    `bridged_damage`: the smallest KL once the gaps are bridged, among contiguous cuts and a greedy one. `damage`: the same for the bare cut.
    `contiguous`: the contiguous cut with the smallest KL (arXiv 2408.11796). `block_influence`: the layers with the lowest 1 - cos(in, out)
    go (arXiv 2407.14679, 2.2). `task`: the smallest of what `by_task` measures, among contiguous cuts and a greedy one.

    Args:
        model: in evaluation mode; left as it was.
        blocks_BT: calibration tokens; `DEPTH_TOKENS` of them are used.
        by_task: makes the damage on tasks, which this package cannot score, out of the bare cut's KL, which decides ties.
        report: told (sets measured, most sets that can be).
    """
    num_hidden_layers = len(importance.block_influence_L)
    if method == "block_influence":
        ranked = torch.argsort(importance.block_influence_L, descending=True, stable=True).tolist()
        return {depth: tuple(sorted(ranked[:depth])) for depth in depths}
    few_BT = blocks_BT[: max(2, DEPTH_TOKENS // blocks_BT.shape[1])]
    damage = (bridged_damage if method == "bridged_damage" else layer_damage)(model, blocks_BT=few_BT, batch_size=batch_size)
    if method == "task":
        if by_task is None:
            raise InvalidSpec(Problem(field="depth", expected="a method that needs no tasks", got=method))
        damage = by_task(damage)
    return select_layers(num_hidden_layers=num_hidden_layers, depths=depths, damage=damage, greedy=method != "contiguous", report=report)


def select_layers(
    *,
    num_hidden_layers: int,
    depths: Sequence[int],
    damage: Damage,
    greedy: bool = True,
    report: Callable[[int, int], None] | None = None,
) -> dict[int, tuple[int, ...]]:
    """For every depth the layers to keep: the smallest damage among all contiguous cuts and, with `greedy`, a greedy one.

    Independent scores per layer pick scattered layers and do badly, contiguous blocks alone miss scattered redundancy
    (arXiv 2408.11796 measures both); so both kinds are candidates and are measured as a whole. The greedy set removes the
    least damaging layer from the previous greedy set. Ties go to the first: cuts from the lowest layer up, then greedy.

    Args:
        depths: 1..num_hidden_layers; the full depth keeps all and is not measured.
        damage: of the model that keeps just these layers; smaller is better; asked once per set. NaN counts as the worst.
        report: told (sets measured, most sets that can be) after each measurement.
    """
    measured: dict[tuple[int, ...], float] = {}
    shallowest = min(depths, default=num_hidden_layers)
    most = sum(depth + 1 for depth in set(depths) if depth < num_hidden_layers)
    most += sum(depth + 1 for depth in range(shallowest, num_hidden_layers)) if greedy else 0

    def measure(kept: tuple[int, ...]) -> float:
        if kept not in measured:
            value = damage(kept)
            measured[kept] = math.inf if math.isnan(value) else value
            if report is not None:
                report(len(measured), most)
        return measured[kept]

    selected = {}
    scattered = everything = tuple(range(num_hidden_layers))
    for depth in range(num_hidden_layers, shallowest - 1, -1):
        if greedy and depth < num_hidden_layers:
            scattered = min((scattered[:index] + scattered[index + 1 :] for index in range(len(scattered))), key=measure)
        if depth in depths:
            removed = num_hidden_layers - depth
            cuts = [everything[:start] + everything[start + removed :] for start in range(depth + 1)]
            selected[depth] = min([*cuts, scattered] if greedy else cuts, key=measure) if removed else everything
    return selected


def layer_damage(model: PreTrainedModel, *, blocks_BT: Tensor, batch_size: int) -> Damage:
    """A function kept layers -> mean KL(teacher || teacher with only those layers) per token, in nats.

    The teacher's last hidden states are kept in memory (tokens x hidden); its log-probabilities are made from them chunk
    by chunk, as tokens x vocabulary rarely fits. Not for concurrent use: it takes layers out of `model` for the moment.

    Args:
        model: in evaluation mode.
        blocks_BT: token ids without padding.
    """
    architecture = read_architecture(model.config.to_dict())
    batches = [batch_BT.to(model.device) for batch_BT in torch.split(blocks_BT, batch_size)]
    head = head_of(model)

    with torch.inference_mode():
        teacher_ND = [final_hidden(model, batch_BT) for batch_BT in batches]

    @torch.inference_mode()
    def damage(kept: tuple[int, ...]) -> float:
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        with only_layers(model, kept=kept, architecture=architecture):
            for batch_BT, expected_ND in zip(batches, teacher_ND, strict=True):
                total += _divergence(expected_ND, final_hidden(model, batch_BT), head=head)
        return float(total) / blocks_BT.numel()

    return damage


def bridged_damage(model: PreTrainedModel, *, blocks_BT: Tensor, batch_size: int) -> Damage:
    """A function kept layers -> mean KL(teacher || teacher with only those layers and a bridge over every gap) per token, in nats.

    A bridge is the affine map that takes the teacher's stream before the gap closest to the one behind it; where the gap begins at the embedding,
    each token of the vocabulary also has its own offset, since a student can write that into its table. Bridges are fitted on the first half of
    the blocks, the KL is measured on the second. The first half's streams stay in the host's memory: L x tokens x D in the model's dtype.

    Args:
        model: in evaluation mode.
        blocks_BT: token ids without padding; at least two blocks, and for a fit that means something more tokens than the model has channels.
    """
    architecture = read_architecture(model.config.to_dict())
    half = len(blocks_BT) // 2
    bridges = _Bridges(model, blocks_BT=blocks_BT[:half], batch_size=batch_size, architecture=architecture)
    bare = layer_damage(model, blocks_BT=blocks_BT[half:], batch_size=batch_size)

    @torch.inference_mode()
    def damage(kept: tuple[int, ...]) -> float:
        with bridges.over(kept):
            return bare(kept)

    return damage


@contextmanager
def only_layers(model: PreTrainedModel, *, kept: tuple[int, ...], architecture: Architecture) -> Iterator[None]:
    """The model with only these layers, for as long as the context lasts; its config's lists follow, as forward reads them by position."""
    assert all(before < after for before, after in pairwise(kept)), f"layers must be ascending, got {kept}"
    names = layer_modules(architecture)
    parent_name, _, attribute = names[0].rpartition(".")[0].rpartition(".")
    parent = model.get_submodule(parent_name)
    layers = getattr(parent, attribute)
    lists = {key: getattr(model.config, key) for key in architecture.family.layer_lists}
    setattr(parent, attribute, nn.ModuleList([model.get_submodule(names[layer]) for layer in kept]))
    for key, values in lists.items():
        setattr(model.config, key, [values[layer] for layer in kept])
    try:
        yield
    finally:
        setattr(parent, attribute, layers)
        for key, values in lists.items():
            setattr(model.config, key, values)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Bridge:
    """stream -> (stream - mean_in) W + mean_out, and for a gap at the embedding an offset of each token."""

    weight_DD: Tensor
    mean_in_D: Tensor
    mean_out_D: Tensor
    offsets: tuple[Tensor, Tensor] | None
    """rows_V and offset_UD: the row of each token of the vocabulary; those that were not seen share the last one, of zeros."""

    def to(self, device: torch.device) -> _Bridge:
        offsets = None if self.offsets is None else (self.offsets[0].to(device), self.offsets[1].to(device))
        return _Bridge(weight_DD=self.weight_DD.to(device), mean_in_D=self.mean_in_D.to(device), mean_out_D=self.mean_out_D.to(device), offsets=offsets)

    def __call__(self, stream_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        bridged_BTD = (stream_BTD.float() - self.mean_in_D) @ self.weight_DD + self.mean_out_D
        if self.offsets is not None:
            rows_V, offset_UD = self.offsets
            bridged_BTD = bridged_BTD + offset_UD[rows_V[tokens_BT]]
        return bridged_BTD.to(stream_BTD.dtype)


class _Bridges:
    """The teacher's streams on some tokens, and the bridges that were fitted to them. Both in the host's memory: a device has the teacher to hold."""

    def __init__(self, model: PreTrainedModel, *, blocks_BT: Tensor, batch_size: int, architecture: Architecture) -> None:
        self.model, self.num_layers = model, architecture.shape.num_hidden_layers
        final = next(weight.name for weight in architecture.weights if weight.is_norm and not weight.per_layer and weight.sides == ((Axis.HIDDEN,),))
        self.modules = [model.get_submodule(name) for name in (*layer_modules(architecture), final.rpartition(".")[0])]
        """Stream l is the input of module l: of a layer, or of the norm behind the last one."""
        self.tokens_N = blocks_BT.flatten()
        self.bridges: dict[tuple[int, int], _Bridge] = {}
        parts: list[list[Tensor]] = [[] for _ in self.modules]
        with ExitStack() as stack, torch.inference_mode():
            for module, part in zip(self.modules, parts, strict=True):
                stack.enter_context(_hooked(module, lambda _, inputs, part=part: part.append(inputs[0].flatten(0, 1).cpu())))
            for batch_BT in torch.split(blocks_BT, batch_size):
                model.base_model(input_ids=batch_BT.to(model.device), use_cache=False)
        self.streams_ND = [torch.cat(part) for part in parts]

    @contextmanager
    def over(self, kept: tuple[int, ...]) -> Iterator[None]:
        """The model bridges the gaps between these layers while the context lasts, if it has just them."""
        tokens: list[Tensor] = []

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            tokens[:] = [kwargs["input_ids"]]

        with ExitStack() as stack:
            handle = self.model.base_model.register_forward_pre_hook(remember, with_kwargs=True)
            stack.callback(handle.remove)
            for before, after in pairwise((-1, *kept, self.num_layers)):
                if after - before > 1:
                    bridge = self._bridge(before + 1, after).to(self.model.device)
                    cross = lambda _, inputs, bridge=bridge: (bridge(inputs[0], tokens[0]), *inputs[1:])  # noqa: E731
                    stack.enter_context(_hooked(self.modules[after], cross))
            yield

    def _bridge(self, start: int, end: int) -> _Bridge:
        if (start, end) not in self.bridges:
            if len(self.bridges) >= 2 * self.num_layers:  # D x D each; one that is needed again is fitted again
                del self.bridges[next(iter(self.bridges))]
            device = self.model.device
            before_ND, after_ND = self.streams_ND[start].to(device), self.streams_ND[end].to(device)
            tokens_N = self.tokens_N.to(device, torch.int64) if start == 0 else None
            self.bridges[start, end] = _fit(before_ND, after_ND, tokens_N=tokens_N, vocab_size=self.model.config.vocab_size).to(torch.device("cpu"))
        return self.bridges[start, end]


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _fit(in_ND: Tensor, out_ND: Tensor, *, tokens_N: Tensor | None, vocab_size: int) -> _Bridge:
    """Least squares from one stream to a later one, damped towards leaving it as it is; in float64."""
    in_ND, out_ND = in_ND.double(), out_ND.double()
    mean_in_D, mean_out_D = in_ND.mean(0), out_ND.mean(0)
    centred_ND, change_ND = in_ND - mean_in_D, out_ND - mean_out_D - (in_ND - mean_in_D)
    moment_DD = centred_ND.t() @ centred_ND
    damping_D = _RIDGE * moment_DD.diagonal()
    # A channel that never varies has no variance to be damped by; the floor keeps the factorisation safe.
    moment_DD.diagonal().add_(damping_D + damping_D.mean() * 1e-6 + torch.finfo(torch.float64).tiny)
    weight_DD = torch.cholesky_solve(centred_ND.t() @ change_ND, torch.linalg.cholesky(moment_DD))
    offsets = None
    if tokens_N is not None:
        offsets = _token_means(change_ND - centred_ND @ weight_DD, tokens_N=tokens_N, vocab_size=vocab_size)
    weight_DD.diagonal().add_(1.0)
    return _Bridge(weight_DD=weight_DD.float(), mean_in_D=mean_in_D.float(), mean_out_D=mean_out_D.float(), offsets=offsets)


def _token_means(residual_ND: Tensor, *, tokens_N: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Mean residual of each token that occurs, shrunk towards zero by how seldom it does; see `_Bridge.offsets`."""
    seen_U, row_N, count_U = torch.unique(tokens_N, return_inverse=True, return_counts=True)
    sums_UD = residual_ND.new_zeros(len(seen_U) + 1, residual_ND.shape[1]).index_add_(0, row_N, residual_ND)
    sums_UD[:-1] /= count_U[:, None] + _TOKEN_PRIOR
    rows_V = torch.full((vocab_size,), len(seen_U), device=tokens_N.device)
    rows_V[seen_U] = torch.arange(len(seen_U), device=tokens_N.device)
    return rows_V, sums_UD.float()


def _divergence(teacher_ND: Tensor, student_ND: Tensor, *, head: Head) -> Tensor:
    """Sum over the tokens of KL(teacher || student) of the next-token distributions, float64."""
    total = torch.zeros((), dtype=torch.float64, device=teacher_ND.device)
    for chunk in token_chunks(len(teacher_ND), head=head, chunk_tokens=None):
        total += forward_kl(head.logits(student_ND[chunk]), head.logits(teacher_ND[chunk])).sum(dtype=torch.float64)
    return total
