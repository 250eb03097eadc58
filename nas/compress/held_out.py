"""The likelihood of a student on blocks that nothing was trained on.

Shape suffixes: N blocks, or tokens of a batch, B batch, T tokens of a block, C tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas.compress.losses import final_hidden, forward_kl, head_of, token_chunks
from nas.compress.teacher_outputs import TeacherOutputs, outputs_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Likelihood on blocks that were not trained on, float64."""

    kl_N: Tensor | None
    """Per block, mean KL(teacher || student) over its T positions, nats per token; None without a teacher."""
    loss_N: Tensor
    """Per block, mean cross-entropy of its T - 1 next tokens, nats per token."""

    @property
    def kl(self) -> float | None:
        return None if self.kl_N is None else float(self.kl_N.mean())

    @property
    def kl_standard_error(self) -> float | None:
        return None if self.kl_N is None else _standard_error(self.kl_N)

    @property
    def loss(self) -> float:
        return float(self.loss_N.mean())

    @property
    def loss_standard_error(self) -> float:
        return _standard_error(self.loss_N)


@torch.no_grad()
def evaluate_kl(student: nn.Module, *, teacher: nn.Module | TeacherOutputs | None, blocks_NT: Tensor, batch_size: int) -> HeldOut:
    """KL to the teacher and cross-entropy of the student, per block. Models are evaluated in the dtype they have.

    Args:
        teacher: a model, or outputs of one of which row i belongs to `blocks_NT[i]`.
    """
    device = next(student.parameters()).device
    kl: list[Tensor] = []
    loss: list[Tensor] = []
    student.eval()
    outputs = None if teacher is None else outputs_of(teacher)
    for rows_B in torch.split(torch.arange(len(blocks_NT)), batch_size):
        tokens_BT = blocks_NT[rows_B].to(device, torch.int64)
        num_blocks, num_tokens = tokens_BT.shape
        labels_N = tokens_BT.roll(-1, dims=1).flatten()
        hidden_ND, head = final_hidden(student, tokens_BT), head_of(student)
        teacher_ND = None if outputs is None else outputs.hidden(tokens_BT, rows_B=rows_B)
        kl_N = torch.empty(num_blocks * num_tokens, device=device)
        loss_N = torch.empty_like(kl_N)
        for chunk in token_chunks(len(hidden_ND), head=head, chunk_tokens=None):
            logits_CV = head.logits(hidden_ND[chunk]).float()
            loss_N[chunk] = nn.functional.cross_entropy(logits_CV, labels_N[chunk], reduction="none")
            if outputs is not None and teacher_ND is not None:
                kl_N[chunk] = forward_kl(logits_CV, outputs.head.logits(teacher_ND[chunk]))
        loss.append(loss_N.view(num_blocks, num_tokens)[:, :-1].double().mean(dim=1).cpu())
        kl.append(kl_N.view(num_blocks, num_tokens).double().mean(dim=1).cpu())
    return HeldOut(kl_N=None if teacher is None else torch.cat(kl), loss_N=torch.cat(loss))


def _standard_error(values_N: Tensor) -> float:
    return float(values_N.std() / math.sqrt(len(values_N))) if len(values_N) > 1 else math.nan
