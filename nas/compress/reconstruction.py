"""What a sliced student's weights lost with the removed columns, put back in closed form: least squares on the teacher's second moments.

    columns  each weight that reads neurons, heads or the residual stream takes over what the removed inputs told it, as far as the
             kept ones predict it: W_S + W_R G_RS (G_SS + damping)^-1 for the kept inputs S, the removed R and their moments G
    stream   where the family allows it, a narrower residual stream is not the most important channels but the directions with the most
             energy (`SecondMoments.basis_DD`): the embedding and what writes the stream are projected on them, what reads it is fitted to them
             A rotated norm has one gain, and how much of a matrix is its gain is free: `NormGains`
    gaps     the MLP before removed layers is fitted to what it added and what they added

Damping shrinks to the plain slice (in the student's own basis), not to zero. The teacher's activations stand for the student's: a weight is
fitted to what its inputs should be, not to the errors that the layers below still make and distillation mends.
Source: least squares on calibration moments as in SparseGPT and SliceGPT (arXiv 2301.00774, 2401.15024); one basis for the whole stream, so that the
student stays a plain model; measured in LOG.md.

Shapes: D hidden, F intermediate, X a source's axis, Y = X' what the student keeps of it, O rows of a weight.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from nas.compress.held_out import evaluate_kl
from nas.compress.hidden_states import StreamMap
from nas.compress.second_moments import SecondMoments, absorbs_gaps, gaps_of, last_norm, measures_gain_free, neuron_reader, stream_scale
from nas.compress.slicing import NormFactor, build_student, check_sliceable, kept_indices, kept_ranges, model_of, norm_factors, slice_student, student_config
from nas.compress.sorting import Sorting
from nas.compress.teacher import WEIGHTS_FILE, checkpoint_sources, checkpoint_weights
from nas.families import Axis, Side, Source, Weight
from nas.shape import Shape

DAMPINGS = (1e-3, 1e-1)
"""Tried on the held-out tokens, as shares of the moments' mean diagonal."""
_MOST_HELD_OUT_TOKENS = 4096
_ROUNDING = 2.0**-22
"""A moment matrix stored in float32 is off by up to this share of its mean diagonal, times its size: the least damping that keeps it positive."""

NormGains = Literal["energy", "teacher"]
"""The gain of a rotated layer's norm, and with it how large the weights behind it are; the student's function is the same. energy: the root mean square of
its normalised input, so that the weights take over the teacher's gains. teacher: of the teacher's gains, which leaves the weights as large as the
teacher's: an optimizer's step, whose size is its rate's and not the weight's, is then the same share of them in every student (LOG.md)."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """What reconstruction did to one student."""

    kept: bool = False
    """False: the student is the plain slice."""
    rotated: bool = False
    """The residual stream's channels are no longer channels of the teacher."""
    gains: NormGains = "energy"
    damping: float | None = None
    """The one that was best on the held-out tokens; None: nothing was fitted."""
    loss_before: float | None = None
    """Of the plain slice on the held-out calibration tokens, nats per token; None: not measured."""
    loss_after: float | None = None
    """Of the best reconstruction, whether or not it was kept; None: not measured, or not finite."""
    reason: str


def split_calibration(blocks_NT: Tensor) -> tuple[Tensor, Tensor]:
    """The calibration blocks on which moments are measured, and the last eighth (at most 4,096 tokens) on which the result is checked.

    A single block is used for both.
    """
    held_out = max(1, min(len(blocks_NT) // 8, math.ceil(_MOST_HELD_OUT_TOKENS / blocks_NT.shape[1])))
    return blocks_NT[: max(1, len(blocks_NT) - held_out)], blocks_NT[-held_out:]


def reconstruct_student(
    sorting: Sorting,
    shape: Shape,
    *,
    moments: SecondMoments,
    held_out_NT: Tensor,
    dtype: str,
    device: str,
    batch_size: int,
    gains: NormGains = "energy",
    dampings: Sequence[float] = DAMPINGS,
) -> tuple[PreTrainedModel, Reconstruction]:
    """The better of the plain slice and the reconstructed one on held-out tokens, as a model in training mode.

    Args:
        held_out_NT: tokens on which nothing was measured.
        batch_size: blocks per forward pass.
    Raises:
        InvalidSpec: as `slice_student`. NotFound, CorruptFile: the moments are not there or damaged.
    """

    def loss(state: tuple[dict[str, Tensor], dict[str, Any]]) -> float:
        model = model_of(state[0], config=state[1], dtype=dtype, device=device)
        return evaluate_kl(model, teacher=None, blocks_NT=held_out_NT, batch_size=batch_size).loss

    if shape == sorting.architecture.shape:
        return build_student(sorting, shape, dtype=dtype, device=device), Reconstruction(reason="nothing was removed")
    before = loss(slice_student(sorting, shape))
    losses = {damping: loss(reconstruct(sorting, shape, moments=moments, damping=damping, device=device)) for damping in dampings}
    best = min(losses, key=lambda damping: losses[damping] if math.isfinite(losses[damping]) else math.inf)
    kept = losses[best] < before
    result = Reconstruction(
        kept=kept,
        rotated=kept and _rotates(sorting, shape, moments=moments),
        gains=gains,
        damping=best,
        loss_before=before,
        loss_after=losses[best] if math.isfinite(losses[best]) else None,
        reason="lower held-out loss than the plain slice" if kept else "the plain slice has the lower held-out loss",
    )
    logger.info("reconstruction of %s: %s", shape.key, result.reason, extra={"action": "reconstruct", **asdict(result)})
    return rebuild_student(sorting, shape, moments=moments, result=result, dtype=dtype, device=device), result


def rebuild_student(
    sorting: Sorting, shape: Shape, *, moments: SecondMoments | None, result: Reconstruction | None, dtype: str, device: str
) -> PreTrainedModel:
    """The student that `reconstruct_student` found, without measuring again; None: the plain slice."""
    if result is None or not result.kept:
        return build_student(sorting, shape, dtype=dtype, device=device)
    assert moments is not None
    assert result.damping is not None
    state, config = reconstruct(sorting, shape, moments=moments, damping=result.damping, gains=result.gains, device=device)
    return model_of(state, config=config, dtype=dtype, device=device)


def _rotates(sorting: Sorting, shape: Shape, *, moments: SecondMoments) -> bool:
    return moments.basis_DD is not None and shape.hidden_size < sorting.architecture.shape.hidden_size


def reconstruct(
    sorting: Sorting, shape: Shape, *, moments: SecondMoments, damping: float, gains: NormGains = "energy", device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict (on the CPU, in the dtype of the sorted teacher's file) and config of the student, reconstructed whether that helps or not.

    Args:
        damping: share of the mean diagonal of the kept inputs' moments; large: the plain slice.
        device: where the linear systems are solved, in float64 where it has that.
    """
    check_sliceable(sorting, shape)
    return _Fit(sorting, shape, moments=moments, damping=damping, gains=gains, device=device).run()


def load_reconstruction(path: Path) -> Reconstruction | None:
    """What was settled and written as JSON; None: nothing yet."""
    return Reconstruction(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def kept_of(sorting: Sorting, shape: Shape, *, result: Reconstruction | None) -> dict[str, Any]:
    """`kept_indices`; a rotated stream is no choice of channels: null."""
    return kept_indices(sorting, shape) | ({"hidden_channels": None} if result is not None and result.rotated else {})


def stream_map(sorting: Sorting, shape: Shape, *, moments: SecondMoments | None) -> StreamMap:
    """What the residual stream of a student is of the *sorted* teacher's; without moments, of a plain slice."""
    if moments is None or not _rotates(sorting, shape, moments=moments):
        return StreamMap.selection(torch.arange(shape.hidden_size))
    with safe_open(sorting.folder / WEIGHTS_FILE, framework="pt") as file:
        gain_D = file.get_tensor(last_norm(sorting.architecture)).double() + int(sorting.architecture.family.gain_minus_one)
    map_YD = _projection(sorting, shape, moments=moments, gain_D=gain_D).map_YX
    # Behind the last norm the teacher has its gain on the normalised stream, the student only a constant. No gain: that channel says nothing there.
    undone_D = torch.where(gain_D == 0, 0.0, 1 / gain_D)
    return StreamMap(stream=map_YD.t().float().contiguous(), final=(map_YD * undone_D).t().float().contiguous())


def _projection(sorting: Sorting, shape: Shape, *, moments: SecondMoments, gain_D: Tensor) -> _Projection:
    """Args: gain_D: of the last norm, float64."""
    assert moments.basis_DD is not None
    scale_D = stream_scale(gain_D if sorting.architecture.tie_word_embeddings else None, hidden_size=len(moments.basis_DD))
    kept_DY = moments.basis_DD[:, : shape.hidden_size].double()
    return _Projection(map_YX=(scale_D[:, None] * kept_DY).t(), inverse_XY=kept_DY / scale_D[:, None])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Selection:
    """The student's activation is the teacher's at these positions."""

    index_Y: Tensor

    def columns(self, weight_OX: Tensor) -> Tensor:
        """The weight as the student would have it without a fit."""
        return weight_OX[:, self.index_Y]

    def project(self, moment_OX: Tensor) -> Tensor:
        """E[o x'] from E[o x]."""
        return moment_OX[:, self.index_Y]

    def rows(self, weight_OX: Tensor) -> Tensor:
        return weight_OX[self.index_Y]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Projection:
    """The student's activation is `map_YX` times the teacher's."""

    map_YX: Tensor
    inverse_XY: Tensor
    """map_YX @ inverse_XY is the identity."""

    def columns(self, weight_OX: Tensor) -> Tensor:
        return weight_OX @ self.inverse_XY

    def project(self, moment_OX: Tensor) -> Tensor:
        return moment_OX @ self.map_YX.t()

    def rows(self, weight_OX: Tensor) -> Tensor:
        return self.map_YX @ weight_OX


class _Fit:
    """One student's weights, source by source."""

    def __init__(self, sorting: Sorting, shape: Shape, *, moments: SecondMoments, damping: float, gains: NormGains, device: str) -> None:
        self.sorting, self.shape, self.moments, self.damping, self.gains = sorting, shape, moments, damping, gains
        self.moved_gain: dict[str, float] = {}
        """Norm -> what its readers are multiplied by, and its gain is divided by."""
        self.device, self.dtype = device, torch.float32 if device.startswith("mps") else torch.float64
        self.architecture, self.layers = sorting.architecture, sorting.layers[shape.num_hidden_layers]
        self.names = {  # in the teacher -> in the student
            weight.name.format(layer=self.layers[layer], expert=expert) if layer is not None else name: name
            for name, weight, layer, expert in checkpoint_weights(self.architecture, num_hidden_layers=len(self.layers), num_experts=shape.num_experts)
        }
        self.weights: Mapping[str, Weight] = {
            name: weight for name, weight, _, _ in checkpoint_weights(self.architecture, num_hidden_layers=self.architecture.shape.num_hidden_layers)
        }
        gaps = gaps_of(self.layers, num_hidden_layers=self.architecture.shape.num_hidden_layers) if absorbs_gaps(self.architecture) else []
        self.gaps = {neuron_reader(self.architecture).format(layer=gap[0]): gap for gap in gaps}

    def run(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state, config = slice_student(self.sorting, self.shape)
        with safe_open(self.sorting.folder / WEIGHTS_FILE, framework="pt") as file:
            self.file = file
            self.stream = self._stream()
            if isinstance(self.stream, _Projection):
                config = self._rotate(state)
            for source in checkpoint_sources(self.architecture, num_hidden_layers=self.architecture.shape.num_hidden_layers):
                if source.readers[0] in self.names:
                    self._fit(source, state)
        return state, config

    def _read(self, name: str) -> Tensor:
        weight: Tensor = self.file.get_tensor(name)
        return weight.to(self.device, self.dtype)

    def _stream(self) -> _Selection | _Projection:
        if not _rotates(self.sorting, self.shape, moments=self.moments):
            return _Selection(index_Y=torch.arange(self.shape.hidden_size, device=self.device))
        projection = _projection(self.sorting, self.shape, moments=self.moments, gain_D=self.file.get_tensor(last_norm(self.architecture)).double())
        return _Projection(map_YX=projection.map_YX.to(self.device, self.dtype), inverse_XY=projection.inverse_XY.to(self.device, self.dtype))

    def _rotate(self, state: dict[str, Tensor]) -> dict[str, Any]:
        """The embedding, the norms and the biases on the rotated stream; the weights that read it are fitted afterwards. Returns the config."""
        factors = norm_factors(self.sorting, self.shape)
        for source in checkpoint_sources(self.architecture, num_hidden_layers=self.architecture.shape.num_hidden_layers):
            if source.norm in factors:
                # x' = P x is normalised by its own mean square: the gain takes it back to P times the normalised x.
                gram_YY = self.stream.rows(self.stream.project(self.moments.gram(source).to(self.device, self.dtype)))
                square = float(gram_YY.diagonal().mean())
                factors[source.norm] = NormFactor(gain=math.sqrt(square), eps=square)
                self.moved_gain[source.norm] = self._moved_gain(source.norm, square=square)
                state[self.names[source.norm]] = torch.full_like(state[self.names[source.norm]], math.sqrt(square) / self.moved_gain[source.norm])
        fitted = {reader for source in self.architecture.family.sources for reader in source.readers}
        for teacher_name, name in self.names.items():
            weight = self.weights[teacher_name]
            if weight.is_norm or weight.name in fitted or (Axis.HIDDEN,) not in weight.sides:
                continue
            tensor = self._read(teacher_name)
            rotated = self.stream.project(tensor) if tensor.ndim == 2 else self.stream.rows(tensor[:, None])[:, 0]
            state[name] = rotated.to("cpu", state[name].dtype)
        return student_config(self.sorting, self.shape, factors=factors, dtype=next(iter(state.values())).dtype)

    def _moved_gain(self, norm: str, *, square: float) -> float:
        """Args: square: of the gain that undoes the normalisation."""
        if self.gains == "energy" or not self.weights[norm].per_layer:  # behind the last norm is the head, which may be the embeddings too
            return 1.0
        teacher = float(self._read(norm).square().mean().sqrt())
        return math.sqrt(square) / teacher if teacher > 0 else 1.0

    def _fit(self, source: Source, state: dict[str, Tensor]) -> None:
        kept, gap = self._kept(source), self._gap(source)
        full = self.architecture.sizes(self.architecture.shape)[source.axis]
        is_whole = isinstance(kept, _Selection) and len(kept.index_Y) == full
        if is_whole and gap is None and not isinstance(self.stream, _Projection):
            return
        gain_D = self._gain(source)
        gram_XX = self.moments.gram(source).to(self.device, self.dtype)
        if gain_D is not None and isinstance(kept, _Selection):
            gram_XX = gain_D[:, None] * gram_XX * gain_D
        gram_XY = kept.project(gram_XX)
        del gram_XX
        gram_YY = kept.rows(gram_XY)
        factor_YY = None if is_whole and gap is None else self._factor(gram_YY)
        for teacher_name in (reader for reader in source.readers if reader in self.names):
            weight_OX = self._rows(self._read(teacher_name), side=self.weights[teacher_name].sides[0])
            if gain_D is not None and isinstance(kept, _Projection):
                weight_OX = weight_OX * gain_D
            fitted_OY = kept.columns(weight_OX)
            if factor_YY is not None:
                missing_OY = weight_OX @ gram_XY - fitted_OY @ gram_YY
                if gap is not None:
                    missing_OY += self._rows(kept.project(gap), side=(Axis.HIDDEN,))
                fitted_OY = fitted_OY + torch.cholesky_solve(missing_OY.t(), factor_YY).t()
            name = self.names[teacher_name]
            fitted_OY = fitted_OY * self.moved_gain.get(source.norm or "", 1.0)
            state[name] = fitted_OY.to("cpu", state[name].dtype).contiguous()

    def _kept(self, source: Source) -> _Selection | _Projection:
        return self.stream if source.axis is Axis.HIDDEN else _Selection(index_Y=self._index((source.axis,)))

    def _index(self, side: Side) -> Tensor:
        ranges = kept_ranges(side, architecture=self.architecture, shape=self.shape)
        return torch.cat([torch.arange(kept.start, kept.stop) for kept in ranges]).to(self.device)

    def _rows(self, weight_OX: Tensor, *, side: Side) -> Tensor:
        if side == (Axis.HIDDEN,):
            return self.stream.rows(weight_OX)
        return weight_OX if side == (Axis.VOCAB,) else weight_OX[self._index(side)]

    def _gap(self, source: Source) -> Tensor | None:
        """What the layers removed behind this MLP added, as the MLP's own output has to be: before the family's constant on it."""
        if source.readers[0] not in self.gaps:
            return None
        multiplier = float(self.sorting.config.get("residual_multiplier") or 1.0)
        return self.moments.gap(self.gaps[source.readers[0]]).to(self.device, self.dtype) / multiplier

    def _gain(self, source: Source) -> Tensor | None:
        """The gain between a gain-free moment and what the readers multiply; None: the moment is of that already."""
        if not measures_gain_free(source, architecture=self.architecture):
            return None
        assert source.norm is not None
        return self._read(source.norm) + int(self.architecture.family.gain_minus_one)

    def _factor(self, gram_YY: Tensor) -> Tensor:
        """Cholesky factor of the damped moments."""
        size = len(gram_YY)
        damping = max(self.damping, _ROUNDING * size) * max(float(gram_YY.diagonal().mean()), 1e-30)
        factor_YY: Tensor = torch.linalg.cholesky(gram_YY + damping * torch.eye(size, device=self.device, dtype=self.dtype))
        return factor_YY
