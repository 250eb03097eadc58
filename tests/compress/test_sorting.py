"""A sorted teacher is the same function; the layers that stay are those whose loss costs least."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nas.compress.importance import Importance
from nas.compress.sorting import Sorting, layer_damage, load_sorting, make_order, select_layers
from nas.errors import CorruptFile, NotFound
from nas.shape import Shape

SHAPE = Shape(num_hidden_layers=2, hidden_size=12, intermediate_size=5, num_attention_heads=6, num_key_value_heads=3, head_dim=4)


def importance_of(*, heads_LH: list[list[float]], hidden_D: list[float] | None = None) -> Importance:
    return Importance(
        hidden_D=torch.tensor(hidden_D or [0.0] * SHAPE.hidden_size),
        neurons_LF=torch.zeros(SHAPE.num_hidden_layers, SHAPE.intermediate_size),
        heads_LH=torch.tensor(heads_LH),
        block_influence_L=torch.zeros(SHAPE.num_hidden_layers),
        norm_energy={},
        norm_eps={},
    )


def test_groups_are_ordered_by_the_sum_of_their_queries() -> None:
    order = make_order(importance_of(heads_LH=[[1, 0, 3, 4, 2, 9], [5, 5, 0, 1, 1, 0]]), SHAPE)
    assert order.kv_groups_LK.tolist() == [[2, 1, 0], [0, 1, 2]]
    assert order.queries_LKG.tolist() == [[[1, 0], [1, 0], [0, 1]], [[0, 1], [1, 0], [0, 1]]]
    assert order.heads(0).tolist() == [[5, 4], [3, 2], [0, 1]]
    assert order.heads(1).tolist() == [[0, 1], [3, 2], [4, 5]]


def test_ties_keep_the_original_order() -> None:
    order = make_order(importance_of(heads_LH=[[0] * 6] * 2, hidden_D=[1.0, 2.0] * 6), SHAPE)
    assert order.hidden_D.tolist() == [1, 3, 5, 7, 9, 11, 0, 2, 4, 6, 8, 10]
    assert order.neurons_LF.tolist() == [list(range(5))] * 2
    assert order.heads(0).flatten().tolist() == list(range(6))


def test_every_order_is_a_permutation(sorting: Sorting) -> None:
    order, shape = sorting.order, sorting.architecture.shape
    for indices, size in (
        (order.hidden_D[None], shape.hidden_size),
        (order.neurons_LF, shape.intermediate_size),
        (order.kv_groups_LK, shape.num_key_value_heads),
        (order.queries_LKG.flatten(0, 1), shape.query_heads_per_kv),
    ):
        assert indices.sort(-1).values.tolist() == [list(range(size))] * len(indices)


def test_the_norm_energy_follows_the_sorted_channels(model: LlamaForCausalLM, sorting: Sorting, random_tokens: Callable[..., Tensor]) -> None:
    hidden_BTD = model.model.embed_tokens(random_tokens(rows=16, seed=1)).detach()
    share_D = (hidden_BTD.square() / hidden_BTD.square().sum(-1, keepdim=True)).mean((0, 1))
    torch.testing.assert_close(sorting.norm_energy["model.layers.0.input_layernorm.weight"].float(), share_D[sorting.order.hidden_D])


def test_a_flipped_bit_is_noticed(random_llama: Callable[..., LlamaForCausalLM], sort_on_disk: Callable[..., Sorting], tmp_path: Path) -> None:
    folder = sort_on_disk(random_llama(), folder=tmp_path).folder
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"model\.safetensors: expected sha256"):
        load_sorting(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptFile, match="got no file"):
        load_sorting(folder)
    (folder / "sorting.json").unlink()
    with pytest.raises(NotFound):
        load_sorting(folder)


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


def test_a_sorting_can_be_moved(sorting: Sorting, tmp_path: Path) -> None:
    moved = sorting.folder.rename(tmp_path / "moved")
    try:
        loaded = load_sorting(moved)
    finally:
        moved.rename(sorting.folder)
    assert dataclasses.replace(loaded, folder=sorting.folder).layers == sorting.layers
