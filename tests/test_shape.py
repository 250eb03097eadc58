from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.errors import InvalidSpec
from nas.shape import Shape

VALUES = {
    "num_hidden_layers": 5,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
SHAPE = Shape(**VALUES)
sizes = st.integers(1, 200)
shapes = st.builds(
    lambda queries, groups, **others: Shape(num_attention_heads=queries * groups, num_key_value_heads=groups, **others),
    queries=st.integers(1, 8),
    groups=st.integers(1, 8),
    num_hidden_layers=sizes,
    hidden_size=sizes,
    intermediate_size=sizes,
    head_dim=sizes,
)


@settings(max_examples=50, deadline=None)
@given(shapes)
def test_a_shape_survives_its_dictionary(shape):
    assert Shape.from_dict(shape.as_dict()) == shape


@settings(max_examples=100, deadline=None)
@given(shapes, shapes)
def test_equal_shapes_and_only_they_have_equal_keys(first, second):
    assert (first.key == second.key) == (first == second)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("wrong", [0, -1, 1.0, "8", True, None])
def test_every_number_must_be_a_positive_integer(name, wrong):
    with pytest.raises(InvalidSpec) as caught:
        Shape(**{**VALUES, name: wrong})

    assert [(problem.field, problem.expected, problem.got) for problem in caught.value.problems] == [(name, "an integer of at least 1", repr(wrong))]


def test_query_heads_must_divide_among_the_kv_heads():
    with pytest.raises(InvalidSpec, match="num_attention_heads: expected a multiple of num_key_value_heads=7, got 24"):
        replace(SHAPE, num_attention_heads=24, num_key_value_heads=7)


def test_unknown_and_missing_names_are_both_told():
    values = {name: value for name, value in VALUES.items() if name != "head_dim"}

    with pytest.raises(InvalidSpec) as caught:
        Shape.from_dict({**values, "n_embd": 64})

    assert [problem.field for problem in caught.value.problems] == ["n_embd", "head_dim"]


def test_head_dim_is_not_derived_from_the_width():
    assert replace(SHAPE, hidden_size=48).head_dim == 8
    assert SHAPE.query_heads_per_kv == 2


def test_a_dense_shape_says_nothing_of_experts():
    assert "num_experts" not in SHAPE.as_dict()
    assert replace(SHAPE, num_experts=4).as_dict() == {**SHAPE.as_dict(), "num_experts": 4}
    assert replace(SHAPE, num_experts=4).key == f"{SHAPE.key}-X4"
    assert Shape.from_dict({**VALUES, "num_experts": None}) == SHAPE
    with pytest.raises(InvalidSpec, match="num_experts: expected an integer of at least 1, got 0"):
        replace(SHAPE, num_experts=0)
