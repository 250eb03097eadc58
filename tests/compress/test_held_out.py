"""Held-out likelihood equals its plain definition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from nas.compress.held_out import evaluate_kl
from nas.compress.losses import forward_kl
from tests.compress.training_values import tiny_blocks, tiny_model


@pytest.fixture
def teacher() -> LlamaForCausalLM:
    return tiny_model(seed=0, hidden_size=24)


@pytest.fixture
def blocks_NT() -> Tensor:
    return tiny_blocks()


def test_the_teacher_is_at_no_distance_from_itself(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    held_out = evaluate_kl(copy.deepcopy(teacher), teacher=teacher, blocks_NT=blocks_NT, batch_size=5)
    assert held_out.kl_N is not None
    assert held_out.kl_N.shape == held_out.loss_N.shape == (22,)
    assert held_out.kl_N.abs().max() < 1e-6


def test_held_out_numbers_are_those_of_plain_torch(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    student = tiny_model(seed=1)
    held_out = evaluate_kl(student, teacher=teacher, blocks_NT=blocks_NT, batch_size=5)
    with torch.no_grad():
        logits_BTV, teacher_BTV = student(blocks_NT.long()).logits, teacher(blocks_NT.long()).logits
    loss_N = functional.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), blocks_NT[:, 1:].long(), reduction="none").mean(1).double()
    kl_N = forward_kl(logits_BTV, teacher_BTV).mean(1).double()
    torch.testing.assert_close(held_out.loss_N, loss_N, atol=1e-5, rtol=0)
    torch.testing.assert_close(held_out.kl_N, kl_N, atol=1e-5, rtol=0)
    assert held_out.kl == pytest.approx(kl_N.mean().item(), abs=1e-5)
    assert held_out.loss_standard_error == pytest.approx((loss_N.std() / 22**0.5).item(), abs=1e-5)


def test_held_out_numbers_do_not_depend_on_the_batch_size(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    student = tiny_model(seed=1)
    one, all_at_once = (evaluate_kl(student, teacher=teacher, blocks_NT=blocks_NT, batch_size=size) for size in (1, 100))
    torch.testing.assert_close(one.kl_N, all_at_once.kl_N, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.loss_N, all_at_once.loss_N, atol=1e-5, rtol=0)
