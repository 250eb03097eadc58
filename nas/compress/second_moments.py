"""Second moments of the sorted teacher's activations: all that reconstruction.py needs of the calibration text. Forward passes only.

    gram    of each source (families.py): E[z z'] of what its readers multiply; for an expert over the tokens that it gets, its neurons times the
            router's weight, zero on all others. Behind a norm that does not centre, of the
            normalised stream before the gain, which every gain and every basis can be put on afterwards
    gap     of each place where a depth removes layers: E[d a'], with a the neurons of the layer before it and d what the
            removed layers add to the stream
    basis   directions of the residual stream from most to least energy: eigenvectors of the mean Gram of the streams

Sums are float64 on a CPU and float32 elsewhere; stored as float32, one file per moment, read one at a time.

Shapes: B batch, T tokens, D hidden, F intermediate, X the axis of a source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nas.architecture import Architecture
from nas.compress.experts import expert_modules, run_experts
from nas.compress.importance import layer_modules
from nas.compress.manifest import load_tensors, save_tensors
from nas.compress.sorting import Sorting
from nas.compress.teacher import checkpoint_sources
from nas.errors import TeacherUnavailable
from nas.families import Axis, Source
from nas.files import withdraw

MOMENTS = "moments"
"""Name of the manifest that makes a folder of moments whole; its tensor is the basis."""

HELD_BYTES = 2**32
"""Most bytes of moments that are summed in one pass over the calibration text."""
Gap = tuple[int, int]
"""(a layer that stays, the next that stays, or the number of layers behind the last), with removed layers between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondMoments:
    """Moments on disk, in the order of the sorted teacher's axes."""

    folder: Path
    basis_DD: Tensor | None
    """Orthonormal, columns from most to least energy of the stream, on the scale of `stream_scale`; None: this family's stream cannot be rotated."""

    def gram(self, source: Source) -> Tensor:
        """gram_XX, float32."""
        return load_tensors(self.folder, name=_gram_name(source))[0]["moment"]

    def gap(self, gap: Gap) -> Tensor:
        """gap_DF, float32."""
        return load_tensors(self.folder, name=_gap_name(gap))[0]["moment"]


def measures_gain_free(source: Source, *, architecture: Architecture) -> bool:
    """Whether a source's moments are those of the normalised stream before the gain."""
    return source.axis is Axis.HIDDEN and source.norm is not None and not architecture.family.norms_centre


def gaps_of(layers: tuple[int, ...], *, num_hidden_layers: int) -> list[Gap]:
    """Where layers are gone behind one that stays."""
    return [(before, after) for before, after in pairwise((*layers, num_hidden_layers)) if after > before + 1]


def stream_scale(tied_gain_D: Tensor | None, *, hidden_size: int) -> Tensor:
    """scale_D, float64: what a rotated stream is scaled by first. The root of the last norm's gain where the head is tied, else 1.

    A tied head reads the stream with the table E that also wrote it. With the stream Q' S x for S = diag(gain) ** 0.5, and E S Q as the table,
    the logits are E S Q Q' S x: the teacher's E diag(gain) x within the span that Q keeps.
    """
    return torch.ones(hidden_size, dtype=torch.float64) if tied_gain_D is None else tied_gain_D.detach().cpu().double().sqrt()


def load_moments(folder: Path) -> SecondMoments:
    """What `measure_moments` left.

    Raises:
        NotFound: the folder was never finished. CorruptFile: the manifest is damaged.
    """
    tensors, _ = load_tensors(folder, name=MOMENTS)
    return SecondMoments(folder=folder, basis_DD=tensors.get("basis_DD"))


@torch.no_grad()
def measure_moments(
    model: PreTrainedModel,
    *,
    sorting: Sorting,
    blocks_BT: Tensor,
    folder: Path,
    batch_size: int,
    max_bytes: int = HELD_BYTES,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> SecondMoments:
    """Measure all moments of a sorted teacher and write them.

    Args:
        model: of `sorting`'s folder, in evaluation mode.
        blocks_BT: token ids without padding.
        max_bytes: held at once; what does not fit is measured in further passes over the blocks.
        report: told (passes done, all passes); may raise to stop.
    Raises:
        TeacherUnavailable: an activation is not finite.
    """
    withdraw(folder / f"{MOMENTS}.json")
    passes = list(_passes(sorting, element_size=8 if model.device.type == "cpu" else 4, max_bytes=max_bytes))
    stream_DD: Tensor | None = None
    for index, (sources, gaps) in enumerate(passes):
        report(index, len(passes))
        sums: dict[str, Tensor] = {}
        with _listening(model, sorting=sorting, sources=sources, gaps=gaps, sums=sums):
            for batch_BT in torch.split(blocks_BT, batch_size):
                model.base_model(input_ids=batch_BT.to(model.device, torch.int64), use_cache=False)
        for name, moment in sums.items():
            if not bool(moment.isfinite().all()):
                raise TeacherUnavailable(f"second moments of {name}: expected finite activations on the calibration text, got NaN or infinity; try float32")
            save_tensors(folder, name=name, tensors={"moment": (moment / blocks_BT.numel()).float().cpu()}, facts={})
        for source in sources:
            if source.axis is Axis.HIDDEN:
                gram_DD = sums[_gram_name(source)].double().cpu()
                stream_DD = gram_DD if stream_DD is None else stream_DD + gram_DD
    assert stream_DD is not None
    gain_D = model.get_parameter(last_norm(sorting.architecture)).detach() if sorting.architecture.tie_word_embeddings else None
    basis_DD = _basis(stream_DD, gain_D=gain_D) if can_rotate(sorting.architecture, gain_D=gain_D) else None
    save_tensors(folder, name=MOMENTS, tensors={} if basis_DD is None else {"basis_DD": basis_DD}, facts={"tokens": blocks_BT.numel()})
    return SecondMoments(folder=folder, basis_DD=basis_DD)


def can_rotate(architecture: Architecture, *, gain_D: Tensor | None) -> bool:
    """Whether a linear map of the residual stream leaves the function to first order: every reader is behind a norm that averages the plain square,
    and no norm follows a writer. A tied head asks for a last norm whose gains are all positive (see `stream_scale`).
    """
    family = architecture.family
    hidden = [source for source in family.sources if source.axis is Axis.HIDDEN]
    writers = {weight.name for weight in family.weights if weight.sides[0] == (Axis.HIDDEN,)}
    plain = not family.norms_centre and not family.embedding_grows_with_width and not writers & set(family.output_norms)
    return plain and all(source.norm is not None for source in hidden) and (gain_D is None or bool((gain_D > 0).all()))


def last_norm(architecture: Architecture) -> str:
    """The gain of the norm before the head."""
    (name,) = (source.norm for source in architecture.family.sources if source.norm and "{layer}" not in source.norm)
    return name


def _basis(stream_DD: Tensor, *, gain_D: Tensor | None) -> Tensor:
    scale_D = stream_scale(gain_D, hidden_size=len(stream_DD))
    basis_DD: Tensor = torch.linalg.eigh(scale_D[:, None] * stream_DD * scale_D)[1]
    return basis_DD.flip(1)


def _gram_name(source: Source) -> str:
    return f"gram.{source.readers[0]}"


def _gap_name(gap: Gap) -> str:
    return f"gap.{gap[0]}-{gap[1]}"


def _passes(sorting: Sorting, *, element_size: int, max_bytes: int) -> Iterator[tuple[list[Source], list[Gap]]]:
    """What is measured together, pass by pass."""
    architecture, depth = sorting.architecture, sorting.architecture.shape.num_hidden_layers
    sizes = architecture.sizes(architecture.shape)
    wanted: list[tuple[Source | Gap, int]] = [(source, sizes[source.axis] ** 2) for source in checkpoint_sources(architecture, num_hidden_layers=depth)]
    if absorbs_gaps(architecture):
        gaps = {gap for layers in sorting.layers.values() for gap in gaps_of(layers, num_hidden_layers=depth)}
        wanted += [(gap, sizes[Axis.HIDDEN] * sizes[Axis.INTERMEDIATE]) for gap in sorted(gaps)]
    batch: list[Source | Gap] = []
    held = 0
    for item, elements in wanted:
        if batch and held + elements * element_size > max_bytes:
            yield _split(batch)
            batch, held = [], 0
        batch.append(item)
        held += elements * element_size
    yield _split(batch)


def _split(items: list[Source | Gap]) -> tuple[list[Source], list[Gap]]:
    return [item for item in items if isinstance(item, Source)], [item for item in items if not isinstance(item, Source)]


def absorbs_gaps(architecture: Architecture) -> bool:
    """Whether there is one MLP whose output reaches the stream through nothing but a constant, so that it can be fitted to what removed layers added."""
    return not architecture.family.expert_keys and neuron_reader(architecture) not in architecture.family.output_norms


def neuron_reader(architecture: Architecture) -> str:
    """The weight that reads the MLP's neurons, with `{layer}` (and `{expert}`) in its name."""
    (reader,) = (source.readers[0] for source in architecture.family.sources if source.axis is Axis.INTERMEDIATE)
    return reader


@contextmanager
def _listening(model: PreTrainedModel, *, sorting: Sorting, sources: list[Source], gaps: list[Gap], sums: dict[str, Tensor]) -> Iterator[None]:
    """Hooks that add up the moments, for as long as the context lasts."""
    architecture = sorting.architecture
    handles = []
    for layer, module in enumerate(expert_modules(model, architecture=architecture)):
        if own := _expert_sources(layer, architecture=architecture, sources=sources):
            handles.append(module.register_forward_pre_hook(_add_experts(own, sums=sums)))
    for source in sources:
        if source.axis is Axis.INTERMEDIATE and architecture.family.expert_keys:
            continue
        add = _adder(_gram_name(source), sums=sums)
        if measures_gain_free(source, architecture=architecture):
            eps = float(getattr(model.config, architecture.family.eps_key))
            handles.append(
                _module_of(model, source.norm).register_forward_pre_hook(lambda module, inputs, add=add, eps=eps: add(_normalised(inputs[0], eps=eps)))
            )
        elif source.norm is not None:
            handles.append(_module_of(model, source.norm).register_forward_hook(lambda module, inputs, output_BTD, add=add: add(output_BTD.float())))
        else:
            handles.append(_module_of(model, source.readers[0]).register_forward_pre_hook(lambda module, inputs, add=add: add(inputs[0].float())))
    reader, modules = neuron_reader(architecture), layer_modules(architecture)
    kept: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    for layer in {before for before, _ in gaps}:
        neurons = _module_of(model, reader.format(layer=layer))
        handles.append(neurons.register_forward_pre_hook(lambda module, inputs, layer=layer: kept.update({layer: inputs[0].float()})))
        handles.append(
            model.get_submodule(modules[layer]).register_forward_hook(lambda module, inputs, output_BTD, layer=layer: outputs.update({layer: output_BTD}))
        )
    for before, after in gaps:
        add = _adder(_gap_name((before, after)), sums=sums)
        handles.append(
            model.get_submodule(modules[after - 1]).register_forward_hook(
                lambda module, inputs, output_BTD, before=before, add=add: add((output_BTD - outputs[before]).float(), kept[before])
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _expert_sources(layer: int, *, architecture: Architecture, sources: list[Source]) -> dict[int, Source]:
    """Expert -> what its neurons are a source for, as far as it is among the sources."""
    reader, by_name = neuron_reader(architecture), {source.readers[0]: source for source in sources}
    names = {expert: reader.format(layer=layer, expert=expert) for expert in range(architecture.shape.num_experts or 0)}
    return {expert: by_name[name] for expert, name in names.items() if name in by_name}


def _add_experts(sources: dict[int, Source], *, sums: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden_ND, top_k_index, top_k_weights = inputs
        for one in run_experts(module, hidden_ND, top_k_index=top_k_index, top_k_weights=top_k_weights):
            if one.expert in sources:
                _adder(_gram_name(sources[one.expert]), sums=sums)(one.neurons_NF.float()[None])

    return hook


def _adder(name: str, *, sums: dict[str, Tensor]) -> Callable[..., None]:
    """Adds the moment of one batch: of an activation with itself, or with another."""

    def add(left_BTX: Tensor, right_BTY: Tensor | None = None) -> None:
        left_NX = left_BTX.flatten(0, 1)
        moment_XY = left_NX.t() @ (left_NX if right_BTY is None else right_BTY.flatten(0, 1))
        moment_XY = moment_XY.double() if moment_XY.device.type == "cpu" else moment_XY
        sums[name] = sums[name].add_(moment_XY) if name in sums else moment_XY

    return add


def _normalised(stream_BTD: Tensor, *, eps: float) -> Tensor:
    stream_BTD = stream_BTD.float()
    return stream_BTD * torch.rsqrt(stream_BTD.square().mean(-1, keepdim=True) + eps)


def _module_of(model: PreTrainedModel, weight: str | None) -> nn.Module:
    assert weight is not None
    module: nn.Module = model.get_submodule(weight.rpartition(".")[0])
    return module
