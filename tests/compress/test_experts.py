from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nas.architecture import read_architecture
from nas.compress.experts import by_file_names, expert_modules, fuse_experts, run_experts
from nas.compress.importance import measure_importance
from nas.compress.sorting import make_order
from tests.compress.family_models import KINDS, file_weights, random_model

EXPERTS = [kind for kind in KINDS if "num_experts_per_tok" in KINDS[kind]]
every_kind = pytest.mark.parametrize("kind", EXPERTS)
DOWN = {"mixtral": "model.layers.{}.block_sparse_moe.experts.{}.w2.weight", "qwen3_moe": "model.layers.{}.mlp.experts.{}.down_proj.weight"}


def down_projection(model: PreTrainedModel, *, layer: int, expert: int) -> Tensor:
    return file_weights(model)[DOWN[model.config.model_type].format(layer, expert)]


def outputs(model: PreTrainedModel, tokens_BT: Tensor, *, layer: int) -> Tensor:
    """What the experts of a layer add to the stream."""
    seen: list[Tensor] = []
    handle = model.model.layers[layer].mlp.register_forward_hook(lambda module, inputs, output_BTD: seen.append(output_BTD))
    with torch.no_grad():
        model(tokens_BT)
    handle.remove()
    return seen[0]


@every_kind
def test_the_names_of_the_file_are_views_and_lead_back_to_the_module(kind: str) -> None:
    model = random_model(kind)
    architecture = read_architecture(model.config.to_dict())
    state = model.state_dict()

    named = by_file_names(state, architecture=architecture)
    again = dict(named)
    fuse_experts(again, architecture=architecture)

    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert by_file_names(named, architecture=architecture).keys() == named.keys()
    expert = architecture.shape.num_experts - 1
    assert down_projection(model, layer=1, expert=expert).data_ptr() == model.model.layers[1].mlp.experts.down_proj[expert].data_ptr()


@every_kind
def test_the_experts_together_are_the_module(kind: str, random_tokens: Callable[..., Tensor]) -> None:
    model = random_model(kind)
    (module, *_) = expert_modules(model, architecture=read_architecture(model.config.to_dict()))
    hidden_ND = torch.randn(40, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, weights, index = model.model.layers[0].mlp.gate(hidden_ND)
        expected_ND = module(hidden_ND, index, weights)

        total_ND = torch.zeros_like(expected_ND)
        for one in run_experts(module, hidden_ND, top_k_index=index, top_k_weights=weights):
            total_ND.index_add_(0, one.tokens_N, one.neurons_NF @ module.down_proj[one.expert].t())

    torch.testing.assert_close(total_ND, expected_ND, rtol=1e-4, atol=1e-5)


@every_kind
def test_an_expert_and_its_neurons_are_worth_the_output_that_goes_with_them(kind: str, random_tokens: Callable[..., Tensor]) -> None:
    model, tokens_BT = random_model(kind), random_tokens(rows=6)
    importance = measure_importance(model, blocks_BT=tokens_BT, method="energy", batch_size=4)
    whole_BTD = outputs(model, tokens_BT, layer=1)
    assert importance.experts_LX is not None

    for columns, expected in ((slice(None), importance.experts_LX[1, 2]), ([5], importance.neurons_LF[1, 2, 5])):
        changed = random_model(kind)
        down_projection(changed, layer=1, expert=2)[:, columns] = 0
        lost = (outputs(changed, tokens_BT, layer=1) - whole_BTD).square().sum(-1).mean()
        assert float(expected) == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("method", ["energy", "l2_mean", "mean_mean", "second_moment"])
def test_an_expert_that_gets_no_token_is_worth_nothing_and_goes_first(method: str, random_tokens: Callable[..., Tensor]) -> None:
    model, tokens_BT = random_model("mixtral"), random_tokens(rows=6)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 1.0
        model.model.layers[0].self_attn.o_proj.weight[3] = 0
        model.model.layers[0].post_attention_layernorm.weight[3] = 1.0
        model.model.layers[0].mlp.gate.weight[:, 3] = 0
        model.model.layers[0].mlp.gate.weight[1, 3] = -1e3

    importance = measure_importance(model, blocks_BT=tokens_BT, method=method, batch_size=4)
    order = make_order(importance, read_architecture(model.config.to_dict()).shape)

    assert importance.experts_LX is not None
    assert order.experts_LX is not None
    assert (importance.experts_LX[0] == 0).nonzero().flatten().tolist() == [1]
    assert order.experts_LX[0, -1] == 1
    assert bool((importance.neurons_LF[0, 1] == 0).all())


def test_the_batch_size_changes_no_score(random_tokens: Callable[..., Tensor]) -> None:
    model, tokens_BT = random_model("qwen3_moe"), random_tokens(rows=6)
    for method in ("energy", "l2_mean"):
        first, second = (measure_importance(model, blocks_BT=tokens_BT, method=method, batch_size=size) for size in (2, 6))
        torch.testing.assert_close(first.experts_LX, second.experts_LX, rtol=1e-4, atol=0)
        torch.testing.assert_close(first.neurons_LF, second.neurons_LF, rtol=1e-4, atol=1e-12)
