"""Scores equal their definitions, worked out the slow way; what is silent or unread scores 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nas.compress.importance import Importance, Method, measure_importance
from nas.errors import InvalidSpec, TeacherUnavailable
from tests.compress.family_models import random_model

METHODS = get_args(Method)


def record(model: LlamaForCausalLM, tokens_BT: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every module that takes a tensor."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                seen[name] = inputs[0], output

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        model(tokens_BT, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def scores(importance: Importance) -> list[Tensor]:
    return [importance.hidden_D, importance.neurons_LF, importance.heads_LH, importance.block_influence_L, *importance.norm_energy.values()]


def readers(model: LlamaForCausalLM) -> dict[str, list[Tensor]]:
    """Norm module -> the matrices that read it."""
    named = {"model.norm": [model.lm_head.weight]}
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        named[f"model.layers.{index}.input_layernorm"] = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        named[f"model.layers.{index}.post_attention_layernorm"] = [mlp.gate_proj.weight, mlp.up_proj.weight]
    return named


def test_energy_of_a_neuron_is_the_mean_square_of_what_it_writes(model: LlamaForCausalLM, random_tokens: Callable[..., Tensor]) -> None:
    tokens_BT = random_tokens(rows=4)
    seen = record(model, tokens_BT)
    importance = measure_importance(model, blocks_BT=tokens_BT, method="energy", batch_size=4)
    for index, layer in enumerate(model.model.layers):
        input_BTF = seen[f"model.layers.{index}.mlp.down_proj"][0]
        written_BTFD = input_BTF[..., None] * layer.mlp.down_proj.weight.T
        torch.testing.assert_close(importance.neurons_LF[index].float(), written_BTFD.square().sum(-1).mean((0, 1)), rtol=1e-4, atol=1e-6)


def test_energy_of_a_head_is_the_mean_square_of_what_it_writes(model: LlamaForCausalLM, random_tokens: Callable[..., Tensor]) -> None:
    tokens_BT = random_tokens(rows=4)
    seen = record(model, tokens_BT)
    importance = measure_importance(model, blocks_BT=tokens_BT, method="energy", batch_size=4)
    head_dim = model.config.head_dim
    for index, layer in enumerate(model.model.layers):
        input_BTQ = seen[f"model.layers.{index}.self_attn.o_proj"][0]
        for head in range(model.config.num_attention_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            written_BTD = input_BTQ[..., part] @ layer.self_attn.o_proj.weight[:, part].T
            torch.testing.assert_close(importance.heads_LH[index, head].float(), written_BTD.square().sum(-1).mean(), rtol=1e-4, atol=1e-6)


def test_energy_of_a_channel_is_what_its_readers_get_and_every_norm_counts_the_same(model: LlamaForCausalLM, random_tokens: Callable[..., Tensor]) -> None:
    tokens_BT = random_tokens(rows=4)
    seen = record(model, tokens_BT)
    expected_D = torch.zeros(model.config.hidden_size)
    for name, matrices in readers(model).items():
        energy_D = seen[name][1].square().mean((0, 1)) * torch.cat(matrices).square().sum(0)
        expected_D += energy_D / energy_D.sum()
    importance = measure_importance(model, blocks_BT=tokens_BT, method="energy", batch_size=4)
    torch.testing.assert_close(importance.hidden_D.float(), expected_D, rtol=1e-4, atol=1e-6)


def test_l2_mean_is_the_l2_norm_over_the_batch_of_the_mean_over_the_sequence(model: LlamaForCausalLM, random_tokens: Callable[..., Tensor]) -> None:
    tokens_BT = random_tokens(rows=4)
    seen = record(model, tokens_BT)
    importance = measure_importance(model, blocks_BT=tokens_BT, method="l2_mean", batch_size=2)
    hidden_D = sum(seen[name][1].abs().mean(1).norm(dim=0) for name in readers(model))
    torch.testing.assert_close(importance.hidden_D.float(), hidden_D, rtol=1e-4, atol=1e-6)
    for index in range(model.config.num_hidden_layers):
        neurons_F = seen[f"model.layers.{index}.mlp.down_proj"][0].abs().mean(1).norm(dim=0)
        torch.testing.assert_close(importance.neurons_LF[index].float(), neurons_F, rtol=1e-4, atol=1e-6)
        attention_BTHE = seen[f"model.layers.{index}.self_attn.o_proj"][0].unflatten(-1, (-1, model.config.head_dim))
        torch.testing.assert_close(importance.heads_LH[index].float(), attention_BTHE.norm(dim=-1).mean(1).norm(dim=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "power"), [("mean_mean", 1), ("second_moment", 2)])
def test_the_other_scores_are_means_over_all_tokens(model: LlamaForCausalLM, random_tokens: Callable[..., Tensor], method: Any, power: int) -> None:
    tokens_BT = random_tokens(rows=4)
    seen = record(model, tokens_BT)
    importance = measure_importance(model, blocks_BT=tokens_BT, method=method, batch_size=3)
    hidden_D = sum(seen[name][1].abs().pow(power).mean((0, 1)) for name in readers(model))
    torch.testing.assert_close(importance.hidden_D.float(), hidden_D, rtol=1e-4, atol=1e-6)
    for index in range(model.config.num_hidden_layers):
        neurons_F = seen[f"model.layers.{index}.mlp.down_proj"][0].abs().pow(power).mean((0, 1))
        torch.testing.assert_close(importance.neurons_LF[index].float(), neurons_F, rtol=1e-4, atol=1e-6)
        heads_BTHE = seen[f"model.layers.{index}.self_attn.o_proj"][0].unflatten(-1, (-1, model.config.head_dim))
        torch.testing.assert_close(importance.heads_LH[index].float(), heads_BTHE.norm(dim=-1).pow(power).mean((0, 1)), rtol=1e-4, atol=1e-6)


def test_the_mean_over_the_batch_and_its_l2_norm_differ_where_sequences_do(
    random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]
) -> None:
    """A control: with one sequence they are the same order, with several they are not the same scores."""
    model, tokens_BT = random_llama(), random_tokens(rows=4)
    l2, mean = (measure_importance(model, blocks_BT=tokens_BT, method=method, batch_size=4).neurons_LF for method in ("l2_mean", "mean_mean"))
    single = [measure_importance(model, blocks_BT=tokens_BT[:1], method=method, batch_size=1).neurons_LF for method in ("l2_mean", "mean_mean")]
    torch.testing.assert_close(single[0] / single[0].sum(), single[1] / single[1].sum())
    assert not torch.allclose(l2 / l2.sum(), mean / mean.sum(), rtol=1e-4)


def test_norm_energy_is_the_mean_share_of_each_channel(model: LlamaForCausalLM, random_tokens: Callable[..., Tensor]) -> None:
    tokens_BT = random_tokens(rows=4)
    seen = record(model, tokens_BT)
    importance = measure_importance(model, blocks_BT=tokens_BT, method="energy", batch_size=4)
    assert set(importance.norm_energy) == {f"{name}.weight" for name in readers(model)}
    for name, share_D in importance.norm_energy.items():
        square_BTD = seen[name.removesuffix(".weight")][0].square()
        torch.testing.assert_close(share_D.float(), (square_BTD / square_BTD.sum(-1, keepdim=True)).mean((0, 1)), rtol=1e-4, atol=1e-6)
        assert float(share_D.sum()) == pytest.approx(1)


def test_block_influence_is_one_minus_the_cosine_across_the_layer(model: LlamaForCausalLM, random_tokens: Callable[..., Tensor]) -> None:
    tokens_BT = random_tokens(rows=4)
    seen = record(model, tokens_BT)
    importance = measure_importance(model, blocks_BT=tokens_BT, method="energy", batch_size=4)
    for index in range(model.config.num_hidden_layers):
        before_BTD, after_BTD = seen[f"model.layers.{index}"]
        expected = 1 - nn.functional.cosine_similarity(before_BTD, after_BTD, dim=-1).mean()
        assert float(importance.block_influence_L[index]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_size_does_not_change_the_scores(random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor], method: Any) -> None:
    model, tokens_BT = random_llama(), random_tokens(rows=7)
    whole, parts = (measure_importance(model, blocks_BT=tokens_BT, method=method, batch_size=size) for size in (7, 3))
    for first, second in zip(scores(whole), scores(parts), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-9)


def test_silent_and_unread_units_score_zero(random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]) -> None:
    model = random_llama()
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.mlp.down_proj.weight[:, 3] = 0  # loud, and nobody reads it
        layer.mlp.up_proj.weight[5] = 0  # read, and silent
        layer.self_attn.o_proj.weight[:, 8:16] = 0  # head 1 is loud, and nobody reads it
        layer.self_attn.v_proj.weight[8:] = 0  # KV head 1, that is heads 2 and 3, is read, and silent
    importance = measure_importance(model, blocks_BT=random_tokens(rows=4), method="energy", batch_size=4)
    assert (importance.neurons_LF[1] == 0).nonzero().flatten().tolist() == [3, 5]
    assert (importance.heads_LH[1] == 0).nonzero().flatten().tolist() == [1, 2, 3]
    assert bool((importance.neurons_LF[0] > 0).all())
    assert bool((importance.heads_LH[0] > 0).all())


def test_no_hook_is_left_behind(random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]) -> None:
    model = random_llama()
    measure_importance(model, blocks_BT=random_tokens(rows=2), method="energy", batch_size=2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_unknown_method_is_refused(random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]) -> None:
    with pytest.raises(InvalidSpec, match="importance: expected energy or l2_mean or mean_mean or second_moment, got 'magnitude'"):
        measure_importance(random_llama(), blocks_BT=random_tokens(rows=1), method="magnitude", batch_size=1)  # type: ignore[arg-type]


def test_activations_that_are_not_finite_are_refused(random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]) -> None:
    model = random_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(TeacherUnavailable, match="expected finite activations"):
        measure_importance(model, blocks_BT=random_tokens(rows=1), method="energy", batch_size=1)


def test_what_a_centring_norm_subtracts_is_no_energy(random_tokens: Callable[..., Tensor]) -> None:
    model, tokens_BT = random_model("nemotron"), random_tokens(rows=4)
    before = measure_importance(model, blocks_BT=tokens_BT, method="energy", batch_size=4)
    with torch.no_grad():
        model.model.embed_tokens.weight += 3.0  # the same on every channel: a LayerNorm does not see it
    after = measure_importance(model, blocks_BT=tokens_BT, method="energy", batch_size=4)
    for name, share_D in before.norm_energy.items():
        torch.testing.assert_close(after.norm_energy[name], share_D, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(after.hidden_D, before.hidden_D, rtol=1e-3, atol=1e-6)


def test_only_norms_over_an_axis_that_can_be_cut_have_shares(random_tokens: Callable[..., Tensor]) -> None:
    for kind, absent in (("qwen3", {"q_norm", "k_norm"}), ("gemma3", {"q_norm", "k_norm"}), ("olmo2", set())):
        importance = measure_importance(random_model(kind), blocks_BT=random_tokens(rows=2), method="energy", batch_size=2)
        without = {name.split(".")[-2] for name in importance.norm_eps.keys() - importance.norm_energy.keys()}
        assert without == absent, kind


def test_the_part_of_a_divisor_that_is_eps(random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]) -> None:
    model, tokens_BT = random_llama(rms_norm_eps=0.05), random_tokens(rows=4)
    seen = record(model, tokens_BT)
    importance = measure_importance(model, blocks_BT=tokens_BT, method="energy", batch_size=2)
    for name, part in importance.norm_eps.items():
        square_BT = seen[name.removesuffix(".weight")][0].square().mean(-1)
        assert part == pytest.approx(float((0.05 / (square_BT + 0.05)).mean()), rel=1e-4)
