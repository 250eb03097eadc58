"""What a student is trained towards. The loop in distillation.py knows nothing of it but this protocol.

Shape suffixes: N tokens of a batch, B batch, T tokens of a block, D hidden.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from nas.compress.losses import LogitLoss, cross_entropy, final_hidden, head_of, logit_loss
from nas.compress.teacher_outputs import TeacherOutputs, outputs_of


class Objective(Protocol):
    """A loss on a batch, and what is learned beside the student to compute it."""

    @property
    def facts(self) -> dict[str, Any]:
        """What makes it this objective, as plain JSON: a run does not go on from a state that another one made."""

    def weights(self) -> dict[str, nn.Parameter]:
        """Learned beside the student, on its device: optimised and kept in the checkpoint with it. Usually none."""

    def loss(self, student: nn.Module, tokens_BT: Tensor, *, rows_B: Tensor) -> Tensor:
        """Mean loss per token of a batch, with its gradient.

        Args:
            tokens_BT: int64, on the student's device.
            rows_B: which blocks of `blocks_NT` these are, on the CPU.
        """


class NextToken:
    """Cross-entropy of the next token: no teacher."""

    facts: ClassVar[dict[str, Any]] = {"loss": "cross_entropy"}

    def weights(self) -> dict[str, nn.Parameter]:
        return {}

    def loss(self, student: nn.Module, tokens_BT: Tensor, *, rows_B: Tensor) -> Tensor:
        hidden_ND = final_hidden(student, tokens_BT[:, :-1])
        return cross_entropy(hidden_ND, head_of(student), labels_N=tokens_BT[:, 1:].flatten())


class TeacherLogits:
    """A distance to the logits of a teacher that runs beside the student, or of its stored outputs."""

    def __init__(self, teacher: nn.Module | TeacherOutputs, *, loss: LogitLoss = "forward_kl", temperature: float = 1.0) -> None:
        """
        Args:
            teacher: a model on the student's device, which is put into eval mode, or outputs of one on the blocks that are trained on.
            loss, temperature: as for `logit_loss`.
        """
        self.teacher, self.loss_name, self.temperature = outputs_of(teacher), loss, temperature
        self.facts: dict[str, Any] = {"loss": loss, "temperature": temperature}

    def weights(self) -> dict[str, nn.Parameter]:
        return {}

    def loss(self, student: nn.Module, tokens_BT: Tensor, *, rows_B: Tensor) -> Tensor:
        return logit_loss(
            final_hidden(student, tokens_BT),
            head_of(student),
            teacher_hidden_ND=self.teacher.hidden(tokens_BT, rows_B=rows_B),
            teacher_head=self.teacher.head,
            loss=self.loss_name,
            temperature=self.temperature,
        )
