"""What a loss needs of a teacher: its final hidden states and its head, from the model as it runs or from what it once gave (signals.py).

Shape suffixes: B blocks of a batch, T tokens of a block, M tokens of a batch (B x T), D hidden.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from nas.compress.losses import Head, final_hidden, head_of


class TeacherOutputs(Protocol):
    """A teacher, as far as losses on its logits are concerned."""

    @property
    def head(self) -> Head:
        """On the student's device, without gradients."""

    def hidden(self, tokens_BT: Tensor, *, rows_B: Tensor) -> Tensor:
        """hidden_MD, after the last norm, on the student's device, without gradients.

        Args:
            tokens_BT: int64, on the student's device.
            rows_B: which blocks these are, on the CPU.
        """


class RunningTeacher:
    """A model on the student's device, in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model.eval()

    @property
    def head(self) -> Head:
        return head_of(self._model).detach()

    @torch.no_grad()
    def hidden(self, tokens_BT: Tensor, *, rows_B: Tensor) -> Tensor:
        return final_hidden(self._model, tokens_BT)


def outputs_of(teacher: nn.Module | TeacherOutputs) -> TeacherOutputs:
    """The outputs of a teacher that is given as a model or as outputs."""
    return RunningTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
