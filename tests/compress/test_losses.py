"""The chunked losses equal their plain definitions, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from nas.compress.losses import cross_entropy, forward_kl, kl_loss


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 40), scale=st.sampled_from([0.01, 1.0, 30.0]))
@settings(max_examples=30, deadline=None)
def test_kl_is_not_negative_and_zero_for_equal_logits(seed: int, vocab: int, scale: float) -> None:
    student_TV, teacher_TV = normal(5, vocab, seed=seed, scale=scale), normal(5, vocab, seed=seed + 1, scale=scale)
    assert (forward_kl(student_TV, teacher_TV) >= -1e-5).all()
    assert forward_kl(teacher_TV, teacher_TV).abs().max() == 0
    assert forward_kl(teacher_TV + 3.0, teacher_TV).abs().max() < 1e-4  # a constant changes no probability


def test_kl_is_from_the_teacher_to_the_student_as_torch_defines_it() -> None:
    student_TV, teacher_TV = normal(6, 11, seed=0), normal(6, 11, seed=1)
    expected_T = functional.kl_div(student_TV.log_softmax(-1), teacher_TV.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(forward_kl(student_TV, teacher_TV), expected_T)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3.0 * loss, inputs)  # the factor checks that the incoming gradient is used


@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 100, None])
def test_chunked_kl_equals_plain_autograd(chunk_tokens: int | None) -> None:
    hidden_ND, head_VD = normal(13, 8, seed=0).requires_grad_(), normal(17, 8, seed=1).requires_grad_()
    teacher_hidden_ND, teacher_head_VD = normal(13, 6, seed=2), normal(17, 6, seed=3)
    plain = forward_kl(hidden_ND @ head_VD.t(), teacher_hidden_ND @ teacher_head_VD.t()).mean()
    chunked = kl_loss(hidden_ND, head_VD, teacher_hidden_ND=teacher_hidden_ND, teacher_head_VD=teacher_head_VD, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(chunked, plain, atol=1e-5, rtol=1e-5)
    for found, expected in zip(gradients(chunked, hidden_ND, head_VD), gradients(plain, hidden_ND, head_VD), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 100, None])
def test_chunked_cross_entropy_equals_plain_autograd(chunk_tokens: int | None) -> None:
    hidden_ND, head_VD = normal(13, 8, seed=0).requires_grad_(), normal(17, 8, seed=1).requires_grad_()
    labels_N = torch.randint(17, (13,), generator=torch.Generator().manual_seed(2))
    plain = functional.cross_entropy(hidden_ND @ head_VD.t(), labels_N)
    chunked = cross_entropy(hidden_ND, head_VD, labels_N=labels_N, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(chunked, plain, atol=1e-5, rtol=1e-5)
    for found, expected in zip(gradients(chunked, hidden_ND, head_VD), gradients(plain, hidden_ND, head_VD), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden_ND, head_VD = normal(4, 8, seed=0).requires_grad_(), normal(17, 8, seed=1)
    kl_loss(hidden_ND, head_VD, teacher_hidden_ND=normal(4, 8, seed=2), teacher_head_VD=head_VD).backward()  # type: ignore[no-untyped-call]
    assert hidden_ND.grad is not None
    assert head_VD.grad is None


def test_under_autocast_the_loss_stays_float32_and_near() -> None:
    hidden_ND, head_VD = normal(64, 32, seed=0).requires_grad_(), normal(50, 32, seed=1, scale=0.2).requires_grad_()
    teacher = {"teacher_hidden_ND": normal(64, 16, seed=2), "teacher_head_VD": normal(50, 16, seed=3, scale=0.2)}
    exact = kl_loss(hidden_ND, head_VD, **teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = kl_loss(hidden_ND, head_VD, **teacher)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.01)
    for found, expected in zip(gradients(rounded, hidden_ND, head_VD), gradients(exact, hidden_ND, head_VD), strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.03 * expected.norm()
