from __future__ import annotations

import pytest

from nas.errors import TeacherUnavailable
from nas.families import FAMILIES, Axis, read_architecture

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


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_weight_that_a_row_mentions_is_in_its_table(family):
    names = {weight.name for weight in family.weights}
    readers = {reader for readers in family.hidden_readers.values() for reader in readers}

    assert {*family.hidden_readers, *readers, family.neuron_reader, family.head_reader} <= names
    assert len(names) == len(family.weights)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_norm_has_readers_over_the_hidden_axis(family):
    axes = {weight.name: weight.axes for weight in family.weights}

    assert set(family.hidden_readers) == {weight.name for weight in family.weights if weight.is_norm}
    assert all(axes[reader][1] == Axis.HIDDEN for readers in family.hidden_readers.values() for reader in readers)
    assert axes[family.neuron_reader][1] == Axis.INTERMEDIATE
    assert axes[family.head_reader][1] == Axis.QUERY


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
        ({"model_type": "gpt2"}, "model_type: expected one of llama .*, got 'gpt2'"),
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
