"""Plans are remembered, and nobody can tell: what is remembered is what would be worked out again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from nas import pricing
from nas.errors import BudgetInfeasible, InvalidSpec
from nas.pricing import price
from nas.spec import SearchSpec, parse_spec

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
WIDER = {**CONFIG, "hidden_size": 128}


def a_spec(**changes: Any) -> SearchSpec:
    fields = {
        "teacher": "tiny",
        "corpus": {"parts": [{"name": "stories"}], "sequence_length": 128},
        "tasks": [{"name": "pairs"}],
        "budget": {"max_fraction": 0.6},
        **changes,
    }
    return parse_spec(json.dumps(fields))


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    pricing._price.cache_clear()
    yield
    pricing._price.cache_clear()


def test_searches_that_differ_in_label_labels_and_seed_are_priced_once() -> None:
    specs = [a_spec(), a_spec(label="a sweep"), a_spec(labels={"team": "a"}), *(a_spec(seed=seed) for seed in range(20))]

    priced = [price(spec, config=CONFIG) for spec in specs]

    assert pricing._price.cache_info().misses == 1
    assert all(plan == priced[0][1] for _, plan in priced)
    assert [spec for spec, _ in priced] == specs  # each has its own label and seed


CHANGES: list[dict[str, Any]] = [
    {},
    {"budget": {"max_fraction": 0.5}},
    {"more_budgets": [{"max_fraction": 0.4}]},
    {"space": {"hidden_size": {"multiple": 32}}},
    {"sampler": {"max_trials": 7}},
    {"controls": {"anchors": False}},
    {"rungs": {"num_trained": 2}},
    {"rungs": {"total_tokens": 50_000_000}},
    {"distillation": {"batch_size": 4}},
    {"distillation": {"signals": "off"}},
    {"compression": {"reconstruction": False}},
    {"corpus": {"parts": [{"name": "stories"}], "sequence_length": 64}},
    {"resources": {"gpus": 1}},
    {"preset": "minitron"},
]


def test_whatever_was_priced_before_a_plan_is_that_of_its_own_spec_and_teacher() -> None:
    cases = [(a_spec(**changes), config) for changes in CHANGES for config in (CONFIG, WIDER)]
    alone = []
    for spec, config in cases:
        pricing._price.cache_clear()
        alone.append(price(spec, config=config))

    together = [price(spec, config=config) for spec, config in (*cases, *reversed(cases))]

    assert together == [*alone, *reversed(alone)]
    assert len({json.dumps(plan) for _, plan in alone}) == len(cases)


def test_what_all_rungs_may_take_is_the_first_rungs_of_a_remembered_spec_too() -> None:
    specs = [a_spec(rungs={"total_tokens": 50_000_000}, seed=seed) for seed in (1, 2)]

    first, again = (price(spec, config=CONFIG)[0] for spec in specs)

    assert first.rungs.first_tokens == again.rungs.first_tokens != specs[0].rungs.first_tokens
    assert (first.seed, again.seed) == (1, 2)


def test_what_somebody_does_to_a_plan_nobody_else_sees() -> None:
    _, plan = price(a_spec(), config=CONFIG)
    before = json.dumps(plan)
    plan["budgets"][0]["anchors"].clear()

    assert json.dumps(price(a_spec(), config=CONFIG)[1]) == before


@pytest.mark.parametrize(
    ("changes", "error"), [({"budget": {"max_parameters": 10}}, BudgetInfeasible), ({"space": {"hidden_size": {"max": 4096}}}, InvalidSpec)]
)
def test_a_refusal_is_told_every_time(changes: dict[str, Any], error: type[InvalidSpec]) -> None:
    told = []
    for _ in range(2):
        with pytest.raises(error) as refused:
            price(a_spec(**changes), config=CONFIG)
        told.append(str(refused.value))

    assert told[0] == told[1]
