"""Training towards the teacher's residual stream beside its logits.

A student that is a slice of its teacher writes to the same residual stream, in fewer channels: some of the teacher's, or combinations of them
(`StreamMap`). What the layers that were removed would have written is the student's to make up for, so its stream behind a kept layer is compared with
the teacher's where the next kept layer begins. Minitron compares through a learned projection and behind the same layer (arXiv 2407.14679, A.3);
both were measured to be worse here (LOG.md).

Shape suffixes: N tokens of a batch, B batch, T tokens of a block, D hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from nas.compress.losses import LogitLoss, final_hidden, head_of, logit_loss
from nas.compress.teacher_outputs import TeacherOutputs, outputs_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamMap:
    """What the student's residual stream is of its teacher's: either the indices of channels, int64 of the student's width, or a matrix DY
    whose columns are the student's channels."""

    stream: Tensor
    """Between the layers."""
    final: Tensor
    """Behind the last norm, whose gains a matrix undoes or keeps."""

    @classmethod
    def selection(cls, channels_Y: Tensor) -> StreamMap:
        return cls(stream=channels_Y, final=channels_Y)

    def to(self, device: torch.device) -> StreamMap:
        return StreamMap(stream=self.stream.to(device), final=self.final.to(device))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.stream.cpu().numpy().tobytes() + self.final.cpu().numpy().tobytes()).hexdigest()[:12]


class TeacherStates:
    """A distance to the teacher's logits, and the mean cosine distance to its residual stream.

    The second is scaled to be as large as the first, by their ratio in each micro batch (Minitron's dynamic alpha; twice or three times as large was
    better for some cuts and worse than the logits alone for others, LOG.md). The value that is returned is that of the logits alone, so that it
    compares with other runs; the gradient is that of both.
    """

    def __init__(
        self,
        teacher: nn.Module | TeacherOutputs,
        *,
        onto: StreamMap,
        layers: Sequence[int] | None = None,
        loss: LogitLoss = "forward_kl",
        temperature: float = 1.0,
    ) -> None:
        """
        Args:
            teacher: a model on the student's device, which is put into eval mode; without `layers` also stored outputs of one.
            onto: what the student's hidden channels are of this teacher's.
            layers: which of the teacher's layers the student's are, ascending: the streams behind all of them are compared.
                None: the final hidden state alone, which is what the head reads and what stored outputs hold.
            loss, temperature: of the logits, as for `logit_loss`.
        """
        if layers is not None and not isinstance(teacher, nn.Module):
            raise ValueError("teacher: expected a model, whose layers run, got stored outputs, which hold the final hidden state alone")
        self._model = teacher.eval() if isinstance(teacher, nn.Module) else None
        self._outputs, self._layers = outputs_of(teacher), None if layers is None else tuple(layers)
        self._onto = onto.to(self._outputs.head.weight_VD.device)
        self._loss, self._temperature = loss, temperature
        self.facts: dict[str, Any] = {
            "loss": loss,
            "temperature": temperature,
            "hidden_states": "last" if layers is None else list(layers),
            "channels": onto.digest,
        }

    def weights(self) -> dict[str, nn.Parameter]:
        return {}

    def loss(self, student: nn.Module, tokens_BT: Tensor, *, rows_B: Tensor) -> Tensor:
        logits, distances = self.distances(student, tokens_BT, rows_B=rows_B)
        hidden = torch.stack(distances).mean()
        weighted = hidden * (logits / hidden.clamp_min(1e-8)).detach()
        return logits + weighted - weighted.detach()

    def distances(self, student: nn.Module, tokens_BT: Tensor, *, rows_B: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss on the logits, and the mean cosine distance behind each layer that is compared."""
        expected = self._teacher_states(tokens_BT, rows_B=rows_B)
        found = [final_hidden(student, tokens_BT)] if self._layers is None else _states(student, tokens_BT)[1:]
        logits = logit_loss(
            found[-1],
            head_of(student),
            teacher_hidden_ND=expected[-1],
            teacher_head=self._outputs.head,
            loss=self._loss,
            temperature=self._temperature,
        )
        maps = [self._onto.stream] * (len(found) - 1) + [self._onto.final]
        distances = [
            1.0 - cosine_similarity(state_ND.float(), _mapped(teacher_ND.float(), onto), dim=1).mean()
            for state_ND, teacher_ND, onto in zip(found, expected, maps, strict=True)
        ]
        return logits, distances

    @torch.no_grad()
    def _teacher_states(self, tokens_BT: Tensor, *, rows_B: Tensor) -> list[Tensor]:
        """hidden_ND where each kept layer but the first begins, and in the end."""
        if self._layers is None:
            return [self._outputs.hidden(tokens_BT, rows_B=rows_B)]
        states = _states(self._model, tokens_BT)
        return [*(states[layer] for layer in self._layers[1:]), states[-1]]


def _mapped(state_ND: Tensor, onto: Tensor) -> Tensor:
    return state_ND.index_select(1, onto) if onto.ndim == 1 else state_ND @ onto


def _states(model: Any, tokens_BT: Tensor) -> list[Tensor]:
    """hidden_ND in front of every layer, and after the last norm."""
    outputs = model.base_model(input_ids=tokens_BT, use_cache=False, output_hidden_states=True)
    return [state_BTD.flatten(0, 1) for state_BTD in outputs.hidden_states]
