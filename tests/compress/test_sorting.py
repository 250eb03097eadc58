"""A sorted teacher is the same function, and its files are those that were written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from nas.compress.importance import Importance
from nas.compress.manifest import load_tensors, save_tensors
from nas.compress.sorting import SORTING, Sorting, load_sorting, make_order
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


@pytest.mark.parametrize("missing", ["layers", "norm_eps", "sha256", "neurons_LF"])
def test_a_folder_of_an_older_version_is_corrupt_so_that_it_is_made_again(
    random_llama: Callable[..., LlamaForCausalLM], sort_on_disk: Callable[..., Sorting], tmp_path: Path, missing: str
) -> None:
    folder = sort_on_disk(random_llama(), folder=tmp_path).folder
    tensors, facts = load_tensors(folder, name=SORTING)
    assert missing in tensors or missing in facts
    save_tensors(
        folder,
        name=SORTING,
        tensors={key: tensor.clone() for key, tensor in tensors.items() if key != missing},
        facts={key: fact for key, fact in facts.items() if key != missing},
    )
    with pytest.raises(CorruptFile, match="as this version writes them"):
        load_sorting(folder)


def test_a_sorting_can_be_moved(sorting: Sorting, tmp_path: Path) -> None:
    moved = sorting.folder.rename(tmp_path / "moved")
    try:
        loaded = load_sorting(moved)
    finally:
        moved.rename(sorting.folder)
    assert dataclasses.replace(loaded, folder=sorting.folder).layers == sorting.layers
