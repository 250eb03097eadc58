from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nas.architecture import Architecture
from nas.cost import count_parameters
from nas.errors import InvalidSpec
from nas.estimate import Speed, TaskWork, describe_space, estimate_seconds, explain_shape, likely_tokens, planned_work, rung_work, task_work, with_first_tokens
from nas.shape import Shape
from nas.space import SearchSpace
from nas.spec import BudgetSpec, ControlSpec, CorpusPart, CorpusSpec, DistillationSpec, EvaluationSpec, ResourceSpec, RungSpec, SearchSpec, SpaceSpec, TaskSpec

TEACHER = Shape(num_hidden_layers=5, hidden_size=64, intermediate_size=172, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
ARCHITECTURE = Architecture(model_type="llama", shape=TEACHER, vocab_size=512, tie_word_embeddings=True, attention_bias=False, mlp_bias=False)
SPACE = SearchSpace(ARCHITECTURE, space=SpaceSpec(), budget=BudgetSpec(max_fraction=0.6))
POINTS = [
    {"flops_per_token": 1e6, "trained_per_second": 1e4, "scored_per_second": 4e4},
    {"flops_per_token": 1e8, "trained_per_second": 400.0, "scored_per_second": 1600.0},
]
shapes = st.builds(
    lambda layers, hidden, mlp, groups, queries, experts: Shape(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=mlp, num_attention_heads=groups * queries, num_key_value_heads=groups,
        head_dim=8, num_experts=experts,
    ),
    *[st.integers(1, 10**4)] * 5,
    st.none() | st.integers(1, 64),
)  # fmt: skip


def spec(**changes: object) -> SearchSpec:
    fields = {
        "teacher": "tiny",
        "corpus": CorpusSpec(parts=(CorpusPart(name="words"),), sequence_length=128),
        "tasks": (TaskSpec(name="choice"),),
        "budget": BudgetSpec(max_fraction=0.6),
        **changes,
    }
    return SearchSpec(**fields)  # type: ignore[arg-type]


@given(shape=shapes)
def test_a_shape_is_read_back_from_its_key(shape: Shape) -> None:
    assert Shape.from_key(shape.key) == shape


@pytest.mark.parametrize("text", ["", "L4", "L4-D56-F144-H4-K4-E8 ", "L4-D56-F144-H5-K4-E8", "L0-D56-F144-H4-K4-E8", "L٤-D56-F144-H4-K4-E8", "x" * 10_000])
def test_what_is_no_key_of_a_shape_is_refused(text: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        Shape.from_key(text)
    assert len(str(refused.value)) < 500


def test_of_several_shapes_the_impossible_one_is_named() -> None:
    with pytest.raises(InvalidSpec, match="shape L4-D56-F144-H5-K4-E8: num_attention_heads: expected a multiple of num_key_value_heads=4, got 5"):
        Shape.from_key("L4-D56-F144-H5-K4-E8")


def test_the_extremes_are_the_smallest_and_the_largest_of_all_legal_shapes() -> None:
    counts = [count_parameters(ARCHITECTURE, shape).total for shape in SPACE.shapes()]
    smallest, largest = SPACE.extremes()
    assert (SPACE.parameters(smallest), SPACE.parameters(largest)) == (min(counts), max(counts))


def test_a_space_is_described_by_legal_shapes() -> None:
    described = describe_space(SPACE)
    legal = {shape.key for shape in SPACE.shapes()}
    assert described["count"] == len(legal)
    assert {example["key"] for example in [*described["examples"], described["smallest"], described["largest"]]} <= legal


def test_a_shape_that_is_not_legal_is_told_every_rule_that_it_breaks() -> None:
    asked = explain_shape(SPACE, Shape.from_key("L6-D60-F172-H8-K4-E16"))
    assert not asked["legal"]
    assert {problem["field"] for problem in asked["problems"]} >= {"num_hidden_layers", "head_dim", "hidden_size", "parameters"}
    legal = next(SPACE.shapes())
    facts = {"key": legal.key, "shape": legal.as_dict(), "parameters": SPACE.parameters(legal)}
    assert explain_shape(SPACE, legal) == {**facts, "legal": True, "proposed": True, "problems": []}


@given(
    searched=st.integers(1, 500),
    forced=st.integers(0, 6),
    controls=st.integers(0, 5),
    keep=st.floats(0.05, 1),
    growth=st.floats(1, 4),
    trained=st.integers(1, 5),
)
def test_no_rung_sees_more_trials_than_the_one_below_and_ties_only_add(
    searched: int, forced: int, controls: int, keep: float, growth: float, trained: int
) -> None:
    assume(forced <= searched)
    wanted = spec(rungs=RungSpec(keep=keep, max_tie_growth=growth, num_trained=trained), controls=ControlSpec(num_random=controls))
    work = rung_work(wanted, searched=searched, forced=forced)
    assert work[0].expected == work[0].at_most == searched + controls
    for below, above in pairwise(work):
        assert forced + controls <= above.expected <= above.at_most <= below.at_most
        assert above.expected <= below.expected


def test_twenty_shapes_and_three_anchors_by_hand() -> None:
    wanted = spec(rungs=RungSpec(num_trained=3, keep_untrained=0.75, keep=0.34, max_tie_growth=2.0))
    work = rung_work(wanted, searched=23, forced=3)

    assert [(step.expected, step.at_most) for step in work] == [(23, 23), (18, 18), (9, 15), (6, 13)]


def test_repeats_are_paid_for_at_every_rung_where_there_is_an_anchor() -> None:
    wanted, without = spec(controls=ControlSpec(num_repeats=2)), spec()
    budgets = [*plans([(20, 3)]), {**plans([(10, 0)])[0], "anchors": {}}]

    work, less = (planned_work(one, budgets=budgets) for one in (wanted, without))

    assert work["max_trials"] == less["max_trials"] + 2
    assert [step["expected"] for step in work["rungs"]] == [step["expected"] + 2 for step in less["rungs"]]
    whole = sum(step["tokens"] for step in work["rungs"])
    assert work["max_distillation_tokens"] == less["max_distillation_tokens"] + 2 * whole
    assert work["expected_distillation_tokens"] == less["expected_distillation_tokens"] + 2 * whole


def plans(fields: list[tuple[int, int]]) -> list[dict[str, Any]]:
    return [{"searched": searched, "forced": forced, "anchors": {"uniform": {}}} for searched, forced in fields]


def long_tokens(wanted: SearchSpec, *, first_tokens: int, fields: list[tuple[int, int]]) -> int:
    rungs = RungSpec(first_tokens=first_tokens, **{name: getattr(wanted.rungs, name) for name in ("factor", "num_trained", "keep", "max_tie_growth")})
    longer = spec(rungs=rungs, distillation=wanted.distillation)
    return sum(likely_tokens(rung_work(longer, searched=searched, forced=forced)) for searched, forced in fields)


@settings(max_examples=60, deadline=None)
@given(
    fields=st.lists(st.tuples(st.integers(1, 200), st.integers(0, 10)).filter(lambda pair: pair[0] >= pair[1]), min_size=1, max_size=3),
    factor=st.integers(2, 8),
    trained=st.integers(1, 4),
    keep=st.floats(0.05, 1.0),
    growth=st.floats(1.0, 3.0),
    total=st.integers(10**6, 10**12),
)
def test_the_derived_rungs_fit_the_total_and_one_more_step_would_not(
    fields: list[tuple[int, int]], factor: int, trained: int, keep: float, growth: float, total: int
) -> None:
    step = 4 * 128
    rungs = RungSpec(factor=factor, num_trained=trained, keep=keep, max_tie_growth=growth, total_tokens=total)
    wanted = spec(rungs=rungs, distillation=DistillationSpec(batch_size=4))
    try:
        derived = with_first_tokens(wanted, plans=plans(fields))
    except InvalidSpec:
        assert long_tokens(wanted, first_tokens=2 * step, fields=fields) > total
        return

    assert derived.rungs.first_tokens % step == 0
    assert long_tokens(derived, first_tokens=derived.rungs.first_tokens, fields=fields) <= total
    assert long_tokens(derived, first_tokens=derived.rungs.first_tokens + step, fields=fields) > total
    assert with_first_tokens(derived, plans=plans(fields)) == derived


def test_a_total_below_two_steps_is_refused_with_what_would_do() -> None:
    with pytest.raises(InvalidSpec, match=r"rungs\.total_tokens: expected at least") as refused:
        with_first_tokens(spec(rungs=RungSpec(total_tokens=1000)), plans=plans([(12, 2)]))
    least = int(str(refused.value).split("at least ")[1].split(",")[0])

    assert with_first_tokens(spec(rungs=RungSpec(total_tokens=least)), plans=plans([(12, 2)])).rungs.first_tokens == 2 * 16 * 128


def test_without_a_total_the_first_rung_stays() -> None:
    wanted = spec(rungs=RungSpec(first_tokens=12345))

    assert with_first_tokens(wanted, plans=plans([(5, 0)])) == wanted


@given(flops=st.floats(1e5, 1e9), tokens=st.floats(1, 1e12))
def test_time_grows_with_tokens_and_size_and_meets_the_measured_points(flops: float, tokens: float) -> None:
    speed = Speed(points=POINTS)
    assert speed.train_seconds(2 * tokens, flops=flops) == pytest.approx(2 * speed.train_seconds(tokens, flops=flops))
    assert speed.train_seconds(tokens, flops=1.01 * flops) > speed.train_seconds(tokens, flops=flops)
    for point in POINTS:
        assert speed.score_seconds(tokens, flops=point["flops_per_token"]) == pytest.approx(tokens / point["scored_per_second"])


def test_more_workers_shorten_the_wall_time_and_no_device_time() -> None:
    one, two = spec(), spec(resources=ResourceSpec(max_parallel_trials=2))
    seconds = [
        estimate_seconds(
            wanted, spaces=[SPACE], work=rung_work(wanted, searched=24, forced=3), tasks=TaskWork(rungs=1e5, held_out=1e6), speed=Speed(points=POINTS)
        )
        for wanted in (one, two)
    ]
    assert seconds[0]["device_seconds"] == seconds[1]["device_seconds"]
    assert seconds[1]["wall_seconds"]["expected"] < seconds[0]["wall_seconds"]["expected"]
    searching = [found["wall_seconds"]["expected"] - found["prepare_seconds"] for found in seconds]
    assert searching[0] == pytest.approx(2 * searching[1], rel=1e-3)


def test_held_out_documents_bound_the_confirmation_only() -> None:
    cards = [{"num_documents": 1000, "bytes_per_document": 270.0}]
    everything = task_work(spec(), cards=cards, vocab_size=2**10)
    bounded = task_work(spec(evaluation=EvaluationSpec(held_out_documents=100)), cards=cards, vocab_size=2**10)
    assert everything == TaskWork(rungs=pytest.approx(200 * 100), held_out=pytest.approx(800 * 100))
    assert bounded == TaskWork(rungs=pytest.approx(200 * 100), held_out=pytest.approx(100 * 100))
    assert math.isclose(task_work(spec(), cards=[{"num_documents": 10}], vocab_size=512).rungs, 0.0)
