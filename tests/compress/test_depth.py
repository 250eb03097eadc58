"""Which layers stay: those whose loss costs least, once what is easily made up for is made up for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nas.compress.depth import DepthMethod, bridged_damage, choose_layers, layer_damage, select_layers
from nas.compress.importance import measure_importance
from nas.errors import InvalidSpec


def additive(cost_L: list[float]) -> Callable[[tuple[int, ...]], float]:
    return lambda kept: sum(cost for layer, cost in enumerate(cost_L) if layer not in kept)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7))
@settings(max_examples=40, deadline=None)
def test_with_additive_damage_the_cheapest_layers_go(cost_L: list[int]) -> None:
    num_layers = len(cost_L)
    selected = select_layers(num_hidden_layers=num_layers, depths=range(1, num_layers + 1), damage=additive(list(map(float, cost_L))))
    for depth, kept in selected.items():
        assert len(kept) == depth
        assert list(kept) == sorted(set(kept))
        assert additive(list(map(float, cost_L)))(kept) == sum(sorted(cost_L)[: num_layers - depth])


def test_a_block_that_only_goes_together_is_found() -> None:
    def damage(kept: tuple[int, ...]) -> float:
        return 0.0 if kept == (0, 1, 5) else float(6 - len(kept)) + 0.1 * (0 not in kept)

    assert select_layers(num_hidden_layers=6, depths=[3], damage=damage) == {3: (0, 1, 5)}


def test_the_full_depth_is_not_measured_and_no_set_is_measured_twice() -> None:
    asked: list[tuple[int, ...]] = []
    told: list[tuple[int, int]] = []

    def damage(kept: tuple[int, ...]) -> float:
        asked.append(kept)
        return additive([5, 0, 3, 0, 4])(kept)

    selected = select_layers(num_hidden_layers=5, depths=[5, 3, 2], damage=damage, report=lambda done, most: told.append((done, most)))
    assert selected == {5: (0, 1, 2, 3, 4), 3: (0, 2, 4), 2: (0, 4)}
    assert len(asked) == len(set(asked)) == len(told)
    assert tuple(range(5)) not in asked
    assert [done for done, _ in told] == list(range(1, len(asked) + 1))
    assert len(asked) <= told[0][1]
    assert select_layers(num_hidden_layers=5, depths=[5], damage=damage) == {5: (0, 1, 2, 3, 4)}


def test_a_tie_goes_to_the_first_and_nan_is_the_worst() -> None:
    assert select_layers(num_hidden_layers=4, depths=[2], damage=lambda kept: 1.0) == {2: (2, 3)}
    assert select_layers(num_hidden_layers=4, depths=[3], damage=lambda kept: 1.0 if 2 not in kept else math.nan) == {3: (0, 1, 3)}


def plain_divergence(teacher_BTV: Tensor, student_BTV: Tensor) -> float:
    teacher, student = teacher_BTV.double().log_softmax(-1), student_BTV.double().log_softmax(-1)
    return float((teacher.exp() * (teacher - student)).sum(-1).mean())


def test_damage_is_the_mean_divergence_from_the_teacher(
    model: LlamaForCausalLM, random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]
) -> None:
    tokens_BT = random_tokens(rows=5)
    damage = layer_damage(model, blocks_BT=tokens_BT, batch_size=2)
    assert damage((0, 1, 2)) == 0
    with torch.no_grad():
        teacher_BTV = model(tokens_BT).logits
        for kept in [*combinations(range(3), 2), (1,)]:
            shallow = random_llama(**{**model.config.to_dict(), "num_hidden_layers": len(kept)})
            state = {name: tensor for name, tensor in model.state_dict().items() if "layers." not in name}
            for new, old in enumerate(kept):
                state |= {f"model.layers.{new}.{name}": tensor for name, tensor in model.model.layers[old].state_dict().items()}
            shallow.load_state_dict(state)
            assert damage(kept) == pytest.approx(plain_divergence(teacher_BTV, shallow(tokens_BT).logits), rel=1e-4)


def test_measuring_damage_leaves_the_model_as_it_was(random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]) -> None:
    model = random_llama()
    layers = model.model.layers
    damage = layer_damage(model, blocks_BT=random_tokens(rows=2), batch_size=2)
    damage((0, 2))
    assert model.model.layers is layers

    def fail(module: nn.Module, inputs: object) -> None:
        raise MemoryError

    handle = model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        damage((0,))
    handle.remove()
    assert model.model.layers is layers
    assert damage((0, 1, 2)) == 0


def test_scattered_identity_layers_are_found(random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]) -> None:
    model = random_llama(num_hidden_layers=7)
    with torch.no_grad():
        for layer in (1, 3, 6):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    damage = layer_damage(model, blocks_BT=random_tokens(rows=4), batch_size=4)
    first, again = (select_layers(num_hidden_layers=7, depths=[4, 6], damage=damage) for _ in range(2))
    assert first[4] == (0, 2, 4, 5)
    assert first[6] == (0, 2, 3, 4, 5, 6)
    assert first == again


def test_without_greedy_only_contiguous_cuts_are_measured() -> None:
    asked: list[tuple[int, ...]] = []

    def damage(kept: tuple[int, ...]) -> float:
        asked.append(kept)
        return additive([0, 9, 0, 9, 9])(kept)

    assert select_layers(num_hidden_layers=5, depths=[3], damage=damage, greedy=False) == {3: (2, 3, 4)}
    assert sorted(asked) == [(0, 1, 2), (0, 1, 4), (0, 3, 4), (2, 3, 4)]


@torch.no_grad()
def with_constant_layer(random_llama: Callable[..., LlamaForCausalLM], *, layer: int) -> LlamaForCausalLM:
    """A layer that adds the same loud vector to every token: missing it costs much, and one offset makes up for it."""
    model = random_llama(num_hidden_layers=4, mlp_bias=True)
    block = model.model.layers[layer]
    block.self_attn.o_proj.weight.zero_()
    block.mlp.down_proj.weight.zero_()
    block.mlp.down_proj.bias.mul_(8.0)
    return model


@pytest.mark.parametrize("layer", range(4))
def test_a_layer_that_writes_a_constant_is_bridged(random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor], layer: int) -> None:
    model, tokens_BT = with_constant_layer(random_llama, layer=layer), random_tokens(rows=16)
    kept = tuple(other for other in range(4) if other != layer)
    assert layer_damage(model, blocks_BT=tokens_BT, batch_size=8)(kept) > 0.1
    assert bridged_damage(model, blocks_BT=tokens_BT, batch_size=8)(kept) < 1e-3


def test_a_first_layer_that_sees_only_its_own_token_is_bridged_by_the_embedding(
    random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]
) -> None:
    model, tokens_BT = random_llama(num_hidden_layers=3), random_tokens(rows=256)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    bare, bridged = (measure(model, blocks_BT=tokens_BT, batch_size=32)((1, 2)) for measure in (layer_damage, bridged_damage))
    assert bridged < 0.05 * bare


def test_bridges_change_the_choice(random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]) -> None:
    """A control: the bare cut keeps the loud layer that does nothing."""
    model, tokens_BT = with_constant_layer(random_llama, layer=1), random_tokens(rows=16)
    importance = measure_importance(model, blocks_BT=tokens_BT, method="energy", batch_size=8)
    chosen = {
        method: choose_layers(model, method=method, importance=importance, depths=[3], blocks_BT=tokens_BT, batch_size=8)[3]
        for method in ("bridged_damage", "damage", "block_influence")
    }
    assert chosen["bridged_damage"] == (0, 2, 3)
    assert 1 in chosen["damage"]
    assert 1 in chosen["block_influence"]


def test_two_gaps_are_bridged_and_the_batch_size_does_not_matter(model: LlamaForCausalLM, random_tokens: Callable[..., Tensor]) -> None:
    tokens_BT = random_tokens(rows=64)
    several, one = (bridged_damage(model, blocks_BT=tokens_BT, batch_size=size) for size in (5, 32))
    assert several((0, 1, 2)) == one((0, 1, 2)) == 0
    assert several((1,)) == pytest.approx(one((1,)), rel=1e-4)
    assert 0 < several((1,)) < layer_damage(model, blocks_BT=tokens_BT[32:], batch_size=32)((1,))


def test_few_tokens_and_dead_channels_can_be_bridged(random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]) -> None:
    """The moments are then of low rank, and exactly singular."""
    model = random_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :4] = 0
    damage = bridged_damage(model, blocks_BT=random_tokens(rows=2, length=8), batch_size=1)
    assert all(math.isfinite(damage(kept)) for kept in [(1, 2), (0, 2), (0, 1), (2,)])


def test_bridges_leave_the_model_as_it_was(random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]) -> None:
    model, tokens_BT = random_llama(), random_tokens(rows=4)
    with torch.no_grad():
        before = model(tokens_BT).logits
        bridged_damage(model, blocks_BT=tokens_BT, batch_size=2)((1,))
        assert torch.equal(model(tokens_BT).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["bridged_damage", "damage", "contiguous", "block_influence"])
def test_every_method_keeps_as_many_layers_as_asked_for(
    random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor], method: DepthMethod
) -> None:
    model, tokens_BT = random_llama(num_hidden_layers=5), random_tokens(rows=4)
    importance = measure_importance(model, blocks_BT=tokens_BT, method="energy", batch_size=4)
    layers = choose_layers(model, method=method, importance=importance, depths=[2, 4, 5], blocks_BT=tokens_BT, batch_size=4)
    assert {depth: len(set(kept)) for depth, kept in layers.items()} == {2: 2, 4: 4, 5: 5}
    assert all(list(kept) == sorted(kept) for kept in layers.values())
    gaps = [after - before for before, after in pairwise((-1, *layers[2], 5)) if after - before > 1]
    assert method != "contiguous" or gaps == [4]


def test_block_influence_drops_the_layers_that_turn_the_stream_least(
    random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]
) -> None:
    model, tokens_BT = random_llama(num_hidden_layers=4), random_tokens(rows=4)
    importance = replace(measure_importance(model, blocks_BT=tokens_BT, method="energy", batch_size=4), block_influence_L=torch.tensor([0.3, 0.1, 0.4, 0.2]))
    layers = choose_layers(model, method="block_influence", importance=importance, depths=[3, 2], blocks_BT=tokens_BT, batch_size=4)
    assert layers == {3: (0, 2, 3), 2: (0, 2)}


def test_a_method_by_task_needs_someone_who_can_score(random_llama: Callable[..., LlamaForCausalLM], random_tokens: Callable[..., Tensor]) -> None:
    model, tokens_BT = random_llama(), random_tokens(rows=2)
    importance = measure_importance(model, blocks_BT=tokens_BT, method="energy", batch_size=2)
    ask = partial(choose_layers, model, method="task", importance=importance, depths=[2], blocks_BT=tokens_BT, batch_size=2)
    with pytest.raises(InvalidSpec, match="depth: expected a method that needs no tasks, got task"):
        ask()
    assert ask(by_task=lambda kl: lambda kept: -kl(kept)) == {2: max(combinations(range(3), 2), key=layer_damage(model, blocks_BT=tokens_BT, batch_size=2))}
