"""The losses, from the final hidden states through the head in chunks of tokens, so that tokens x vocabulary never exists whole.

Does not know what it trains or how; the loop is in distillation.py, what a student is trained towards in objective.py.

Shape suffixes: N or T tokens, C tokens of a chunk, B batch, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nas import memory
from nas.compress.linear import linear

LogitLoss = Literal["forward_kl", "reverse_kl", "js", "mse", "cosine"]
"""Distances of the student's logits from the teacher's, as in arXiv 2407.14679, A.3."""

Criterion = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""(the tokens of a chunk, their student logits_CV in float32, which it may overwrite)
-> (the sum of the chunk's losses, its derivative by those logits: grad_CV, float32)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """What turns the final hidden state into logits: cap(scale * (hidden W^T + b)), with cap(z) = softcap * tanh(z / softcap)."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    """1 / `logits_scaling` of Granite."""
    softcap: float | None = None
    """`final_logit_softcapping` of Gemma 2."""

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """logits_NV, in the dtype of the matrix product."""
        logits_NV = linear(hidden_ND, self.weight_VD, self.bias_V)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def detach(self) -> Head:
        """The same head as a constant."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return Head(weight_VD=self.weight_VD.detach(), bias_V=bias_V, scale=self.scale, softcap=self.softcap)


def head_of(model: Any) -> Head:
    """The head of a transformers causal language model: its output table, and what its config does to the logits."""
    table: nn.Linear = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    scale = 1.0 / getattr(model.config, "logits_scaling", 1.0)
    return Head(weight_VD=table.weight, bias_V=table.bias, scale=scale, softcap=softcap)


def final_hidden(model: Any, tokens_BT: Tensor) -> Tensor:
    """What the head reads, after the last norm: hidden_ND with N = B * T."""
    hidden_BTD: Tensor = model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return hidden_BTD.flatten(0, 1)


def forward_kl(student_logits_TV: Tensor, teacher_logits_TV: Tensor) -> Tensor:
    """KL(teacher || student) per token, in nats, float32, temperature 1.

    Returns:
        kl_T, >= 0 up to rounding.
    Source: the logit loss that Minitron ends up with, arXiv:2407.14679 table 15.
    """
    teacher_TV = torch.log_softmax(teacher_logits_TV.float(), dim=-1)
    student_TV = torch.log_softmax(student_logits_TV.float(), dim=-1)
    return (teacher_TV.exp() * (teacher_TV - student_TV)).sum(dim=-1)


def logit_loss(
    hidden_ND: Tensor,
    head: Head,
    *,
    teacher_hidden_ND: Tensor,
    teacher_head: Head,
    loss: LogitLoss = "forward_kl",
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Mean over the tokens of a distance between the logits, from the final hidden states; logits exist for `chunk_tokens` tokens at a time.

    Args:
        loss: forward_kl: KL(teacher || student). reverse_kl: KL(student || teacher). js: Jensen-Shannon divergence. mse: mean over the vocabulary of
            the squared difference. cosine: 1 - cosine similarity of the two rows of logits.
        temperature: both logits are divided by it, and the loss multiplied by its square, so that the gradient keeps its scale (Hinton et al.,
            arXiv 1503.02531, section 2).
    """
    distance, factor = _DISTANCES[loss], temperature**2

    def criterion(chunk: slice, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        teacher_CV = teacher_head.logits(teacher_hidden_ND[chunk]).float()
        if temperature == 1.0:
            return distance(logits_CV, teacher_CV)
        total, grad_CV = distance(logits_CV / temperature, teacher_CV / temperature)
        return total * factor, grad_CV.mul_(temperature)  # temperature^2, and 1 / temperature of the inner derivative

    return chunked_loss(hidden_ND, head, criterion=criterion, chunk_tokens=chunk_tokens)


def _forward_kl(logits_CV: Tensor, teacher_CV: Tensor) -> tuple[Tensor, Tensor]:
    """d/dz = q - p, for the student's q and the teacher's p."""
    log_q_CV, log_p_CV = torch.log_softmax(logits_CV, dim=-1), torch.log_softmax(teacher_CV, dim=-1)
    p_CV = torch.exp(log_p_CV, out=teacher_CV)
    total = torch.dot(p_CV.view(-1), log_p_CV.sub_(log_q_CV).view(-1))
    return total, log_q_CV.exp_().sub_(p_CV)


def _reverse_kl(logits_CV: Tensor, teacher_CV: Tensor) -> tuple[Tensor, Tensor]:
    """d/dz = q (log q - log p - KL)."""
    log_q_CV, log_p_CV = torch.log_softmax(logits_CV, dim=-1), torch.log_softmax(teacher_CV, dim=-1)
    q_CV = log_q_CV.exp()
    difference_CV = log_q_CV.sub_(log_p_CV)
    kl_C1 = (q_CV * difference_CV).sum(dim=-1, keepdim=True)
    return kl_C1.sum(), difference_CV.sub_(kl_C1).mul_(q_CV)


def _js(logits_CV: Tensor, teacher_CV: Tensor) -> tuple[Tensor, Tensor]:
    """With m = (p + q) / 2: (KL(p || m) + KL(q || m)) / 2; d/dq = log(q / m) / 2."""
    log_q_CV, log_p_CV = torch.log_softmax(logits_CV, dim=-1), torch.log_softmax(teacher_CV, dim=-1)
    log_m_CV = torch.logaddexp(log_q_CV, log_p_CV).sub_(math.log(2.0))
    q_CV, to_middle_CV = log_q_CV.exp(), log_q_CV.sub_(log_m_CV)
    kl_C1 = (q_CV * to_middle_CV).sum(dim=-1, keepdim=True)
    total = 0.5 * (kl_C1.sum() + (log_p_CV.exp() * log_p_CV.sub_(log_m_CV)).sum())
    return total, to_middle_CV.sub_(kl_C1).mul_(q_CV).mul_(0.5)


def _mse(logits_CV: Tensor, teacher_CV: Tensor) -> tuple[Tensor, Tensor]:
    difference_CV = logits_CV.sub_(teacher_CV)
    vocab_size = difference_CV.shape[1]
    return difference_CV.square().sum() / vocab_size, difference_CV.mul_(2.0 / vocab_size)


def _cosine(logits_CV: Tensor, teacher_CV: Tensor) -> tuple[Tensor, Tensor]:
    """d/dz = (c z / |z| - t / |t|) / |z|, for the similarity c of z and t."""
    norm_C1 = logits_CV.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    student_CV, teacher_CV = logits_CV.div_(norm_C1), teacher_CV / teacher_CV.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    similarity_C1 = (student_CV * teacher_CV).sum(dim=-1, keepdim=True)
    return (1.0 - similarity_C1).sum(), student_CV.mul_(similarity_C1).sub_(teacher_CV).div_(norm_C1)


_DISTANCES: dict[LogitLoss, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "js": _js,
    "mse": _mse,
    "cosine": _cosine,
}
"""(student logits_CV, teacher logits_CV: float32, both may be written over) -> the sum over the tokens, and its derivative by the student's logits."""


def cross_entropy(hidden_ND: Tensor, head: Head, *, labels_N: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Mean cross-entropy over the tokens, from the final hidden states; logits exist for `chunk_tokens` tokens at a time."""

    def criterion(chunk: slice, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        student_CV = torch.log_softmax(logits_CV, dim=-1)
        label_C1 = labels_N[chunk].unsqueeze(1)
        total = -student_CV.gather(1, label_C1).sum()
        grad_CV = student_CV.exp_()
        return total, grad_CV.scatter_add_(1, label_C1, grad_CV.new_full((1, 1), -1.0).expand_as(label_C1))

    return chunked_loss(hidden_ND, head, criterion=criterion, chunk_tokens=chunk_tokens)


def chunked_loss(hidden_ND: Tensor, head: Head, *, criterion: Criterion, chunk_tokens: int | None = None) -> Tensor:
    """Mean over the tokens of a loss on the logits; logits exist for `chunk_tokens` tokens at a time, forwards and backwards.

    Args:
        criterion: the loss of a chunk and its derivative; called without gradients, once per chunk, first to last.
    """
    loss: Tensor = _ChunkedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, head, criterion, chunk_tokens)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """The loss and its gradient in one pass.

    The gradient is computed in `forward`, so that each chunk's logits are made once and dropped, and matmuls follow autocast there.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: Head, criterion: Criterion, chunk_tokens: int | None) -> Tensor:
        num_tokens = len(hidden_ND)
        hidden_grad_ND = torch.empty_like(hidden_ND)
        weight_grad_VD = torch.zeros_like(weight_VD)
        bias_grad_V = None if bias_V is None else torch.zeros_like(bias_V)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for chunk in token_chunks(num_tokens, head=head, chunk_tokens=chunk_tokens):
            chunk_total, grad_CV = _through_the_cap(head, hidden_ND[chunk], chunk=chunk, criterion=criterion)
            total += chunk_total
            hidden_grad_ND[chunk] = (grad_CV @ weight_VD).div_(num_tokens)
            if torch.is_autocast_enabled(hidden_ND.device.type):
                weight_grad_VD += grad_CV.t() @ hidden_ND[chunk]
            else:  # without a product as large as the head beside its sum
                weight_grad_VD.addmm_(grad_CV.t(), hidden_ND[chunk])
            if bias_grad_V is not None:
                bias_grad_V += grad_CV.sum(dim=0)
        # Not `save_for_backward`, whose tensors must not be written over: the head's gradient is as large as the head.
        ctx.gradients = hidden_grad_ND, weight_grad_VD.div_(num_tokens), None if bias_grad_V is None else bias_grad_V.div_(num_tokens)
        return total / num_tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        hidden_grad_ND, weight_grad_VD, bias_grad_V = ctx.gradients
        del ctx.gradients  # a second way back would multiply them twice: it fails instead
        return hidden_grad_ND.mul_(grad), weight_grad_VD.mul_(grad), None if bias_grad_V is None else bias_grad_V.mul_(grad), None, None, None


def _through_the_cap(head: Head, hidden_CD: Tensor, *, chunk: slice, criterion: Criterion) -> tuple[Tensor, Tensor]:
    """The criterion's loss of a chunk, and its derivative by hidden W^T + b. The cap's own derivative is 1 - tanh^2 = 1 - (logits / softcap)^2."""
    if head.softcap is None:
        total, grad_CV = criterion(chunk, head.logits(hidden_CD).float())
    else:
        logits_CV = head.logits(hidden_CD).float()
        slope_CV = (logits_CV / head.softcap).square_().neg_().add_(1.0)  # first: the criterion may write over its logits
        total, grad_CV = criterion(chunk, logits_CV)
        grad_CV.mul_(slope_CV)
    return total, grad_CV if head.scale == 1.0 else grad_CV.mul_(head.scale)


def token_chunks(num_tokens: int, *, head: Head, chunk_tokens: int | None) -> Iterator[slice]:
    """Slices of `chunk_tokens`; None: as many tokens as their logits' memory allows on the head's device."""
    size = chunk_tokens or memory.chunk_tokens(vocab_size=len(head.weight_VD), device=head.weight_VD.device.type)
    for first in range(0, num_tokens, size):
        yield slice(first, min(num_tokens, first + size))
