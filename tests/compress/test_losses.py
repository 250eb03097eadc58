"""The chunked losses equal their plain definitions, in value and in gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from nas.compress.losses import Head, LogitLoss, cross_entropy, final_hidden, forward_kl, head_of, logit_loss


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


def jensen_shannon(q_TV: Tensor, p_TV: Tensor) -> Tensor:
    m_TV = (p_TV + q_TV) / 2
    return ((p_TV * (p_TV / m_TV).log()).sum(-1) + (q_TV * (q_TV / m_TV).log()).sum(-1)) / 2


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda z_TV, t_TV: functional.kl_div(z_TV.log_softmax(-1), t_TV.log_softmax(-1), log_target=True, reduction="none").sum(-1),
    "reverse_kl": lambda z_TV, t_TV: functional.kl_div(t_TV.log_softmax(-1), z_TV.log_softmax(-1), log_target=True, reduction="none").sum(-1),
    "js": lambda z_TV, t_TV: jensen_shannon(z_TV.softmax(-1), t_TV.softmax(-1)),
    "mse": lambda z_TV, t_TV: functional.mse_loss(z_TV, t_TV, reduction="none").mean(-1),
    "cosine": lambda z_TV, t_TV: 1.0 - functional.cosine_similarity(z_TV, t_TV, dim=-1),
}
"""(student's, teacher's logits) -> loss_T, as torch defines it."""


@pytest.mark.parametrize("loss", PLAIN)
@pytest.mark.parametrize(("chunk_tokens", "temperature"), [(1, 1.0), (5, 2.0), (13, 0.5), (100, 1.0), (None, 1.0)])
def test_every_distance_and_its_gradient_equal_plain_autograd(loss: LogitLoss, chunk_tokens: int | None, temperature: float) -> None:
    hidden_ND, head_VD = normal(13, 8, seed=0).requires_grad_(), normal(17, 8, seed=1).requires_grad_()
    teacher_hidden_ND, teacher_head_VD = normal(13, 6, seed=2), normal(17, 6, seed=3)
    plain = PLAIN[loss](hidden_ND @ head_VD.t() / temperature, teacher_hidden_ND @ teacher_head_VD.t() / temperature).mean() * temperature**2
    chunked = logit_loss(
        hidden_ND,
        Head(weight_VD=head_VD),
        teacher_hidden_ND=teacher_hidden_ND,
        teacher_head=Head(weight_VD=teacher_head_VD),
        loss=loss,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    torch.testing.assert_close(chunked, plain, atol=1e-5, rtol=1e-5)
    for found, expected in zip(gradients(chunked, hidden_ND, head_VD), gradients(plain, hidden_ND, head_VD), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", PLAIN)
def test_every_distance_is_zero_at_the_teacher_and_finite_far_from_it(loss: LogitLoss) -> None:
    hidden_ND, head_VD = normal(9, 8, seed=0), normal(17, 8, seed=1)
    head = Head(weight_VD=head_VD)
    assert logit_loss(hidden_ND, head, teacher_hidden_ND=hidden_ND, teacher_head=head, loss=loss).abs() < 1e-6
    far_ND = (1e4 * hidden_ND).requires_grad_()  # probabilities of zero
    distance = logit_loss(far_ND, head, teacher_hidden_ND=-hidden_ND, teacher_head=head, loss=loss)
    assert torch.isfinite(distance)
    assert torch.isfinite(gradients(distance, far_ND)[0]).all()


@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 100, None])
def test_chunked_cross_entropy_equals_plain_autograd(chunk_tokens: int | None) -> None:
    hidden_ND, head_VD = normal(13, 8, seed=0).requires_grad_(), normal(17, 8, seed=1).requires_grad_()
    labels_N = torch.randint(17, (13,), generator=torch.Generator().manual_seed(2))
    plain = functional.cross_entropy(hidden_ND @ head_VD.t(), labels_N)
    chunked = cross_entropy(hidden_ND, Head(weight_VD=head_VD), labels_N=labels_N, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(chunked, plain, atol=1e-5, rtol=1e-5)
    for found, expected in zip(gradients(chunked, hidden_ND, head_VD), gradients(plain, hidden_ND, head_VD), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden_ND, head_VD = normal(4, 8, seed=0).requires_grad_(), normal(17, 8, seed=1)
    logit_loss(hidden_ND, Head(weight_VD=head_VD), teacher_hidden_ND=normal(4, 8, seed=2), teacher_head=Head(weight_VD=head_VD)).backward()  # type: ignore[no-untyped-call]
    assert hidden_ND.grad is not None
    assert head_VD.grad is None


def test_under_autocast_the_loss_stays_float32_and_near() -> None:
    hidden_ND, head_VD = normal(64, 32, seed=0).requires_grad_(), normal(50, 32, seed=1, scale=0.2).requires_grad_()
    teacher: Any = {"teacher_hidden_ND": normal(64, 16, seed=2), "teacher_head": Head(weight_VD=normal(50, 16, seed=3, scale=0.2))}
    exact = logit_loss(hidden_ND, Head(weight_VD=head_VD), **teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = logit_loss(hidden_ND, Head(weight_VD=head_VD), **teacher)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.01)
    for found, expected in zip(gradients(rounded, hidden_ND, head_VD), gradients(exact, hidden_ND, head_VD), strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.03 * expected.norm()


# --- heads that do more than multiply


@pytest.mark.parametrize(
    "parts",
    [{"scale": 0.25}, {"softcap": 2.0}, {"softcap": 2.0, "scale": 3.0, "bias_V": True}, {"bias_V": True}],
    ids=["scaled", "capped", "all", "biased"],
)
@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_the_gradient_through_any_head_is_that_of_autograd(parts: dict[str, Any], loss: str) -> None:
    hidden_ND, weight_VD, bias_V = normal(13, 8, seed=0).requires_grad_(), normal(17, 8, seed=1).requires_grad_(), normal(17, seed=4).requires_grad_()
    head = Head(weight_VD=weight_VD, **{**parts, **({"bias_V": bias_V} if "bias_V" in parts else {})})
    teacher_ND, labels_N = normal(13, 8, seed=2), torch.randint(17, (13,), generator=torch.Generator().manual_seed(2))
    teacher_head = Head(weight_VD=normal(17, 8, seed=3), softcap=head.softcap, scale=head.scale)
    if loss == "kl":
        plain = forward_kl(head.logits(hidden_ND), teacher_head.logits(teacher_ND)).mean()
        chunked = logit_loss(hidden_ND, head, teacher_hidden_ND=teacher_ND, teacher_head=teacher_head, chunk_tokens=5)
    else:
        plain = functional.cross_entropy(head.logits(hidden_ND), labels_N)
        chunked = cross_entropy(hidden_ND, head, labels_N=labels_N, chunk_tokens=5)
    torch.testing.assert_close(chunked, plain, atol=1e-5, rtol=1e-5)
    inputs = [hidden_ND, weight_VD, *([bias_V] if "bias_V" in parts else [])]
    for found, expected in zip(gradients(chunked, *inputs), gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def tiny(config: type[PretrainedConfig], model: type[PreTrainedModel], **more: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = model(config(**sizes, head_dim=8, **more)).eval()
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.5)
    return built


@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny(LlamaConfig, LlamaForCausalLM),
        lambda: tiny(Gemma2Config, Gemma2ForCausalLM, final_logit_softcapping=3.0),
        lambda: tiny(GraniteConfig, GraniteForCausalLM, logits_scaling=4.0),
    ],
    ids=["llama", "gemma2", "granite"],
)
def test_the_head_gives_the_logits_of_the_model(build: Callable[[], PreTrainedModel]) -> None:
    model, tokens_BT = build(), torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(head_of(model).logits(final_hidden(model, tokens_BT)), model(tokens_BT).logits.flatten(0, 1))


def test_a_second_way_back_fails_instead_of_giving_another_gradient() -> None:
    hidden_ND = normal(4, 8, seed=0).requires_grad_()
    loss = cross_entropy(hidden_ND, Head(weight_VD=normal(17, 8, seed=1)), labels_N=torch.zeros(4, dtype=torch.int64))
    torch.autograd.grad(loss, hidden_ND, retain_graph=True)
    with pytest.raises(AttributeError, match="gradients"):
        torch.autograd.grad(loss, hidden_ND)
