"""The losses, from the final hidden states through the head in chunks of tokens, so that tokens x vocabulary never exists whole.

Does not know what it trains or how; the loop is in distillation.py.

Shape suffixes: N or T tokens, C tokens of a chunk, B batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**27}
"""Logits held at once, in elements: a megabyte on the CPU, half a GiB on CUDA."""
_MIN_CHUNK_TOKENS = 256
"""The head's gradient is read and written once per chunk, so a large vocabulary needs some tokens to pay for it. On a CPU the
time per token is flat from 64 to 1024 tokens per chunk (vocabularies of 512 to 32,000)."""


def forward_kl(student_logits_TV: Tensor, teacher_logits_TV: Tensor) -> Tensor:
    """KL(teacher || student) per token, in nats, float32, temperature 1.

    Returns:
        kl_T, >= 0 up to rounding.
    Source: the logit loss that Minitron ends up with, arXiv:2407.14679 table 15.
    """
    teacher_TV = torch.log_softmax(teacher_logits_TV.float(), dim=-1)
    student_TV = torch.log_softmax(student_logits_TV.float(), dim=-1)
    return (teacher_TV.exp() * (teacher_TV - student_TV)).sum(dim=-1)


def kl_loss(hidden_ND: Tensor, head_VD: Tensor, *, teacher_hidden_ND: Tensor, teacher_head_VD: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Mean of `forward_kl` over the tokens, from the final hidden states; logits exist for `chunk_tokens` tokens at a time."""
    loss: Tensor = _ChunkedLoss.apply(hidden_ND, head_VD, None, teacher_hidden_ND, teacher_head_VD, chunk_tokens)  # type: ignore[no-untyped-call]
    return loss


def cross_entropy(hidden_ND: Tensor, head_VD: Tensor, *, labels_N: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Mean cross-entropy over the tokens, from the final hidden states; logits exist for `chunk_tokens` tokens at a time."""
    loss: Tensor = _ChunkedLoss.apply(hidden_ND, head_VD, labels_N, None, None, chunk_tokens)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Either loss and its gradient in one pass: d loss / d logits is q - p, or q - one_hot(label), over the number of tokens.

    The gradient is computed in `forward`, so that each chunk's logits are made once and dropped, and matmuls follow autocast there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor | None,
        teacher_hidden_ND: Tensor | None,
        teacher_head_VD: Tensor | None,
        chunk_tokens: int | None,
    ) -> Tensor:
        num_tokens = len(hidden_ND)
        hidden_grad_ND = torch.empty_like(hidden_ND)
        head_grad_VD = torch.zeros_like(head_VD)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for chunk in token_chunks(num_tokens, head_VD=head_VD, chunk_tokens=chunk_tokens):
            student_CV = torch.log_softmax((hidden_ND[chunk] @ head_VD.t()).float(), dim=-1)
            if labels_N is not None:
                label_C1 = labels_N[chunk].unsqueeze(1)
                total -= student_CV.gather(1, label_C1).sum()
                grad_CV = student_CV.exp_()
                grad_CV.scatter_add_(1, label_C1, grad_CV.new_full((1, 1), -1.0).expand_as(label_C1))
            else:
                assert teacher_hidden_ND is not None
                assert teacher_head_VD is not None
                teacher_CV = torch.log_softmax((teacher_hidden_ND[chunk] @ teacher_head_VD.t()).float(), dim=-1)
                p_CV = teacher_CV.exp()
                total += torch.dot(p_CV.view(-1), teacher_CV.sub_(student_CV).view(-1))
                grad_CV = student_CV.exp_().sub_(p_CV)
            hidden_grad_ND[chunk] = (grad_CV @ head_VD).div_(num_tokens)
            head_grad_VD += grad_CV.t() @ hidden_ND[chunk]
        ctx.save_for_backward(hidden_grad_ND, head_grad_VD.div_(num_tokens))
        return total / num_tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden_grad_ND, head_grad_VD = ctx.saved_tensors
        return hidden_grad_ND * grad, head_grad_VD * grad, None, None, None, None


def final_hidden(model: Any, tokens_BT: Tensor) -> Tensor:
    """What the head reads, after the last norm: hidden_ND with N = B * T."""
    hidden_BTD: Tensor = model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return hidden_BTD.flatten(0, 1)


def head_weight(model: Any) -> Tensor:
    """The output table; the families we know have no bias on it."""
    head_VD: Tensor = model.get_output_embeddings().weight
    return head_VD


def token_chunks(num_tokens: int, *, head_VD: Tensor, chunk_tokens: int | None) -> Iterator[slice]:
    """Slices of `chunk_tokens`; None: as many tokens as their logits' memory allows on the head's device."""
    size = chunk_tokens or max(_MIN_CHUNK_TOKENS, _CHUNK_ELEMENTS.get(head_VD.device.type, _CHUNK_ELEMENTS["cpu"]) // len(head_VD))
    for first in range(0, num_tokens, size):
        yield slice(first, min(num_tokens, first + size))
