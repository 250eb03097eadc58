"""The losses, from the final hidden states through the head in chunks of tokens, so that tokens x vocabulary never exists whole.

Does not know what it trains or how; the loop is in distillation.py, what a student is trained towards in objective.py.

Shape suffixes: N or T tokens, C tokens of a chunk, B batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**27}
"""Logits held at once, in elements: a megabyte on the CPU, half a GiB on CUDA."""
_MIN_CHUNK_TOKENS = 256
"""The head's gradient is read and written once per chunk, so a large vocabulary needs some tokens to pay for it. On a CPU the
time per token is flat from 64 to 1024 tokens per chunk (vocabularies of 512 to 32,000)."""

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
        logits_NV = hidden_ND @ self.weight_VD.t()
        if self.bias_V is not None:
            logits_NV = logits_NV + self.bias_V
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def input_gradient(self, grad_CV: Tensor, logits_CV: Tensor) -> Tensor:
        """The derivative by hidden W^T + b out of that by the logits; works in place on `grad_CV`.

        The cap's derivative is 1 - tanh^2 = 1 - (logits / softcap)^2.
        """
        if self.softcap is not None:
            grad_CV.mul_(1.0 - (logits_CV / self.softcap).square())
        return grad_CV if self.scale == 1.0 else grad_CV.mul_(self.scale)

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


def kl_loss(hidden_ND: Tensor, head: Head, *, teacher_hidden_ND: Tensor, teacher_head: Head, chunk_tokens: int | None = None) -> Tensor:
    """Mean of `forward_kl` over the tokens, from the final hidden states; logits exist for `chunk_tokens` tokens at a time."""

    def criterion(chunk: slice, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        student_CV = torch.log_softmax(logits_CV, dim=-1)
        teacher_CV = torch.log_softmax(teacher_head.logits(teacher_hidden_ND[chunk]).float(), dim=-1)
        p_CV = teacher_CV.exp()
        total = torch.dot(p_CV.view(-1), teacher_CV.sub_(student_CV).view(-1))
        return total, student_CV.exp_().sub_(p_CV)

    return chunked_loss(hidden_ND, head, criterion=criterion, chunk_tokens=chunk_tokens)


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
            logits_CV = head.logits(hidden_ND[chunk]).float()
            # The criterion may write over its logits, which the cap's derivative still needs.
            chunk_total, grad_CV = criterion(chunk, logits_CV if head.softcap is None else logits_CV.clone())
            total += chunk_total
            grad_CV = head.input_gradient(grad_CV, logits_CV)
            hidden_grad_ND[chunk] = (grad_CV @ weight_VD).div_(num_tokens)
            weight_grad_VD += grad_CV.t() @ hidden_ND[chunk]
            if bias_grad_V is not None:
                bias_grad_V += grad_CV.sum(dim=0)
        ctx.save_for_backward(hidden_grad_ND, weight_grad_VD.div_(num_tokens), None if bias_grad_V is None else bias_grad_V.div_(num_tokens))
        return total / num_tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        hidden_grad_ND, weight_grad_VD, bias_grad_V = ctx.saved_tensors
        return hidden_grad_ND * grad, weight_grad_VD * grad, None if bias_grad_V is None else bias_grad_V * grad, None, None, None


def token_chunks(num_tokens: int, *, head: Head, chunk_tokens: int | None) -> Iterator[slice]:
    """Slices of `chunk_tokens`; None: as many tokens as their logits' memory allows on the head's device."""
    vocab_size = len(head.weight_VD)
    size = chunk_tokens or max(_MIN_CHUNK_TOKENS, _CHUNK_ELEMENTS.get(head.weight_VD.device.type, _CHUNK_ELEMENTS["cpu"]) // vocab_size)
    for first in range(0, num_tokens, size):
        yield slice(first, min(num_tokens, first + size))
