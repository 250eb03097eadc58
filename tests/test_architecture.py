from __future__ import annotations

import dataclasses

import pytest

from nas.architecture import read_architecture
from nas.errors import TeacherUnavailable

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}


def test_the_config_of_multi_head_attention_may_leave_out_kv_heads_and_head_dim():
    config = {name: value for name, value in CONFIG.items() if name != "num_key_value_heads"}

    shape = read_architecture(config).shape

    assert shape.num_key_value_heads == 8
    assert shape.head_dim == 8


def test_an_explicit_head_dim_stands():
    assert read_architecture({**CONFIG, "head_dim": 16}).shape.head_dim == 16


def test_a_tied_head_and_absent_biases_are_not_among_the_weights():
    tied = {weight.name for weight in read_architecture(CONFIG).weights}
    untied = {weight.name for weight in read_architecture({**CONFIG, "tie_word_embeddings": False, "attention_bias": True}).weights}

    assert untied - tied == {"lm_head.weight"} | {f"model.layers.{{layer}}.self_attn.{name}_proj.bias" for name in "qkvo"}
    assert not tied - untied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: expected one of gemma2, .*, smollm3, got 'gpt2'; a new family is one row of nas/families.py: its weights"),
        ({"model_type": None}, "got None"),
        ({"hidden_size": None}, "config.json: hidden_size: expected an integer of at least 1, got None"),
        ({"num_key_value_heads": 3}, "num_attention_heads: expected a multiple of num_key_value_heads=3, got 8"),
        ({"intermediate_size": 0}, "intermediate_size: expected an integer of at least 1, got 0"),
        ({"vocab_size": "512"}, "vocab_size: expected an integer of at least 1, got '512'"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(change, message):
    with pytest.raises(TeacherUnavailable, match=message):
        read_architecture({**CONFIG, "head_dim": 8, **change})


def test_a_missing_number_is_named():
    config = {name: value for name, value in CONFIG.items() if name != "vocab_size"}

    with pytest.raises(TeacherUnavailable, match="expected the key 'vocab_size', got none"):
        read_architecture(config)


def test_a_width_that_transformers_would_refuse_is_not_legal():
    llama = read_architecture(CONFIG)
    long_rope = {"model_type": "phi3", "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.75, "long_factor": [1.0] * 3}}
    phi = read_architecture({**CONFIG, **long_rope})

    assert llama.allows(hidden_size=48, num_attention_heads=8)
    assert not llama.allows(hidden_size=44, num_attention_heads=8)
    assert read_architecture({**CONFIG, "model_type": "mistral"}).allows(hidden_size=44, num_attention_heads=8)
    assert phi.allows(hidden_size=48, num_attention_heads=6)
    assert not phi.allows(hidden_size=48, num_attention_heads=8)
    for architecture, hidden_size in ((llama, 44), (phi, 48)):
        (problem,) = architecture.refusals(dataclasses.replace(architecture.shape, hidden_size=hidden_size))
        assert problem.field == "hidden_size"
        assert architecture.model_type in problem.expected
    assert llama.refusals(llama.shape) == phi.refusals(phi.shape) == ()


MIXTRAL = {**CONFIG, "model_type": "mixtral", "intermediate_size": 176, "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE = {**CONFIG, "model_type": "qwen3_moe", "moe_intermediate_size": 48, "num_experts": 16, "num_experts_per_tok": 4}


def test_the_width_of_an_expert_and_their_number_stand_under_the_familys_own_keys():
    mixtral, qwen = read_architecture(MIXTRAL), read_architecture({**QWEN3_MOE, "num_local_experts": 16})

    assert (mixtral.shape.intermediate_size, mixtral.shape.num_experts, mixtral.num_experts_per_tok) == (176, 8, 2)
    assert (qwen.shape.intermediate_size, qwen.shape.num_experts, qwen.num_experts_per_tok) == (48, 16, 4)
    smaller = dataclasses.replace(qwen.shape, intermediate_size=40, num_experts=5)
    values = {**QWEN3_MOE, **qwen.config_values(smaller)}
    assert {key: values[key] for key in ("intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts")} == {
        "intermediate_size": 172,
        "moe_intermediate_size": 40,
        "num_experts": 5,
        "num_local_experts": 5,
    }
    assert read_architecture(values).shape == smaller
    assert read_architecture(CONFIG).config_values(read_architecture(CONFIG).shape)["intermediate_size"] == 172


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_sparse_step": 2}, r"decoder_sparse_step: expected 1 \(dense layers between those with experts are not supported\), got 2"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers: expected \[\] .*, got \[0\]"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok: expected 1 to 16, the number of experts, got 17"),
        ({"moe_intermediate_size": 44}, "intermediate_size: expected a multiple of 8, as transformers' qwen3_moe runs no other, got 44"),
        ({"num_experts": 0}, "num_experts: expected an integer of at least 1, got 0"),
    ],
)
def test_a_mixture_that_the_row_does_not_cover_is_refused_by_name(change, message):
    assert read_architecture({**QWEN3_MOE, "decoder_sparse_step": 1, "mlp_only_layers": []}).shape == read_architecture(QWEN3_MOE).shape
    with pytest.raises(TeacherUnavailable, match=message):
        read_architecture({**QWEN3_MOE, **change})


def test_a_shape_has_experts_where_its_family_has_and_not_fewer_than_a_token_needs():
    mixtral, llama = read_architecture(MIXTRAL), read_architecture(CONFIG)

    def refused(architecture, **changes):
        return [str(problem) for problem in architecture.refusals(dataclasses.replace(architecture.shape, **changes))]

    assert refused(mixtral, num_experts=2) == []
    assert refused(mixtral, num_experts=1) == ["num_experts: expected at least num_experts_per_tok=2, got 1"]
    assert refused(mixtral, num_experts=None) == ["num_experts: expected a number (mixtral has experts), got None"]
    assert refused(llama, num_experts=4) == ["num_experts: expected none (llama is dense), got 4"]
    assert refused(mixtral, intermediate_size=172) == ["intermediate_size: expected a multiple of 8, as transformers' mixtral runs no other, got 172"]
