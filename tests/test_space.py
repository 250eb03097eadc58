from __future__ import annotations

from dataclasses import replace
from itertools import islice, product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nas.architecture import Architecture, read_architecture
from nas.budget import measured_excess, read_workload
from nas.cost import count_costs, count_parameters
from nas.errors import BudgetInfeasible, InvalidSpec
from nas.families import FAMILIES
from nas.shape import Shape
from nas.space import Choices, SearchSpace
from nas.spec import AxisSpec, BudgetSpec, LatencySpec, SpaceSpec, WorkloadSpec

TEACHER = Shape(num_hidden_layers=5, hidden_size=64, intermediate_size=172, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
ARCHITECTURE = Architecture(model_type="llama", shape=TEACHER, vocab_size=512, tie_word_embeddings=True, attention_bias=False, mlp_bias=False)


def space(*, fraction: float = 0.6, architecture: Architecture = ARCHITECTURE, axes: SpaceSpec | None = None, **budget) -> SearchSpace:
    return SearchSpace(architecture, space=axes or SpaceSpec(), budget=BudgetSpec(max_fraction=fraction, **budget))


def counted(found: SearchSpace, shape: Shape) -> int:
    count = count_parameters(found.architecture, shape)
    return count.total if found.budget.counting == "total" else count.non_embedding


def fits(found: SearchSpace, shape: Shape) -> bool:
    """Every ceiling, and what min_use asks of one of them, from the costs of this one shape."""
    costs = count_costs(found.architecture, shape, workload=found.budget.workload)
    ceilings = found.budget.ceilings
    return all(costs[ceiling.cost] <= ceiling.maximum for ceiling in ceilings) and any(costs[ceiling.cost] >= ceiling.minimum for ceiling in ceilings)


@st.composite
def spaces(draw: st.DrawFn, *, min_mlp_fill: float | None = None) -> SearchSpace:
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    model_type = draw(st.sampled_from(sorted(FAMILIES)))
    experts = draw(st.integers(1, 9)) if FAMILIES[model_type].expert_keys else None
    multiple = FAMILIES[model_type].width_multiple
    architecture = Architecture(
        model_type=model_type,
        num_experts_per_tok=experts and draw(st.integers(1, experts)),
        shape=Shape(
            num_experts=experts,
            num_hidden_layers=draw(st.integers(1, 6)),
            hidden_size=heads * multiple * draw(st.integers(2, 8)),
            intermediate_size=multiple * draw(st.integers(8, 90)),
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=2 * draw(st.integers(1, 4)),
        ),
        vocab_size=draw(st.integers(2, 200)),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )
    workload = WorkloadSpec(batch_size=draw(st.integers(1, 9)), context_length=draw(st.integers(1, 99)), cache_dtype=draw(st.sampled_from([None, "float8"])))
    teacher = count_costs(architecture, architecture.shape, workload=read_workload(workload, architecture=architecture))
    ceilings = draw(st.sets(st.sampled_from(["max_fraction", "max_memory_bytes", "max_flops_per_token"]), min_size=1))
    shares = {name: draw(st.floats(0.3, 0.99)) for name in sorted(ceilings)}
    budget = BudgetSpec(
        **{name: share if name == "max_fraction" else int(share * teacher[name.removeprefix("max_")]) for name, share in shares.items()},
        counting=draw(st.sampled_from(["total", "non_embedding"])),
        min_use=draw(st.sampled_from([0.0, 0.8])),
        workload=workload,
    )
    axes = SpaceSpec(
        hidden_size=AxisSpec(multiple=draw(st.sampled_from([None, 1, 2, 4]))),
        intermediate_size=AxisSpec(multiple=draw(st.sampled_from([None, 1, 8]))),
        min_mlp_fill=min_mlp_fill or draw(st.floats(0.1, 1.0)),
        multiples_of=draw(st.sampled_from([None, 2, 3, 8])),
        tensor_parallel=draw(st.sampled_from([1, 2, 3])),
    )
    try:
        return SearchSpace(architecture, space=axes, budget=budget)
    except InvalidSpec:
        assume(False)
        raise


@st.composite
def choices(draw: st.DrawFn) -> Choices:
    anything = st.integers(-3, 500)
    return Choices(
        num_hidden_layers=draw(anything),
        hidden_size=draw(anything),
        num_key_value_heads=draw(anything),
        query_heads_per_kv=draw(anything),
        mlp_fill=draw(st.floats(0.0, 1.0)),
        num_experts=draw(anything),
    )


properties = settings(max_examples=40, deadline=None)


@properties
@given(spaces(), choices())
def test_resolve_gives_a_legal_shape_for_any_choices_and_always_the_same(found, raw):
    shape = found.resolve(raw)

    assert found.explain(shape) == ()
    assert fits(found, shape)
    assert shape != found.architecture.shape
    assert found.resolve(raw) == shape


@properties
@given(spaces())
def test_a_legal_shape_resolves_to_itself(found):
    for shape in list(found.shapes())[:200]:
        assert found.resolve(found.choices_of(shape)) == shape


@properties
@given(spaces())
def test_the_count_is_that_of_the_distinct_shapes_and_each_is_legal(found):
    shapes = list(found.shapes())

    assert found.count() == len(shapes) == len(set(shapes)) == len({shape.key for shape in shapes})
    assert all(found.explain(shape) == () for shape in shapes)
    assert all(fits(found, shape) for shape in shapes)
    assert found.architecture.shape not in shapes


@properties
@given(spaces(), choices(), st.integers(0, 99))
def test_resolved_and_drawn_shapes_are_among_those_listed(found, raw, seed):
    assert {found.resolve(raw), found.draw(np.random.default_rng(seed))} <= set(found.shapes())


@settings(max_examples=15, deadline=None)
@given(st.floats(0.3, 0.95), st.floats(0.0, 0.04))
def test_a_larger_budget_loses_no_architecture(fraction, more):
    """Every combination of depth, width and heads stays; its MLP only grows."""
    small, large = space(fraction=fraction), space(fraction=fraction + more)

    def widest(found: SearchSpace) -> dict[tuple[int, ...], int]:
        widths: dict[tuple[int, ...], int] = {}
        for shape in found.shapes():
            frame = (shape.num_hidden_layers, shape.hidden_size, shape.num_key_value_heads, shape.num_attention_heads)
            widths[frame] = max(widths.get(frame, 0), shape.intermediate_size)
        return widths

    before, after = widest(small), widest(large)
    assert all(after[frame] >= width for frame, width in before.items())


@properties
@given(spaces(min_mlp_fill=1e-9))
def test_the_interval_of_every_frame_is_exact(found):
    """All that fits is there, with nothing asked of the MLP's share of it; only the grid is taken from the space. Forty frames of it."""
    assume(found.count() < 50_000)
    frames = list(product(*found.axes.values()))
    frames = frames[:: max(1, len(frames) // 40)]
    grid = []
    for (layers, hidden, groups, queries, *rest), width in product(frames, found.intermediate_sizes):
        heads = {"num_attention_heads": groups * queries, "num_key_value_heads": groups, "head_dim": found.architecture.shape.head_dim}
        grid.append(Shape(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=width, num_experts=rest[0] if rest else None, **heads))

    legal = {shape for shape in grid if not found.architecture.refusals(shape) and fits(found, shape) and divides(shape, devices=found._devices)}

    assert set(found.shapes()) & set(grid) == legal


def divides(shape: Shape, *, devices: int) -> bool:
    copied = shape.num_key_value_heads < devices and devices % shape.num_key_value_heads == 0
    return shape.num_attention_heads % devices == shape.intermediate_size % devices == 0 and (copied or shape.num_key_value_heads % devices == 0)


def test_an_exhaustive_count_agrees_with_brute_force():
    found = space()
    legal = set()
    for layers in found.axes["num_hidden_layers"]:
        for hidden in found.axes["hidden_size"]:
            for groups in found.axes["num_key_value_heads"]:
                for queries in found.axes["query_heads_per_kv"]:
                    frame = [
                        Shape(
                            num_hidden_layers=layers,
                            hidden_size=hidden,
                            intermediate_size=width,
                            num_attention_heads=groups * queries,
                            num_key_value_heads=groups,
                            head_dim=8,
                        )
                        for width in found.intermediate_sizes
                    ]
                    legal |= {shape for shape in frame if not found.explain(shape) and _fills(found, shape)}

    assert set(found.shapes()) == legal


def _fills(found: SearchSpace, shape: Shape) -> bool:
    """The MLP takes its least share of the room that the budget and the teacher leave it."""
    empty, unit = (counted(found, replace(shape, intermediate_size=width)) for width in (1, 2))
    room = min((found.budget.max_parameters - empty) // (unit - empty) + 1, found.intermediate_sizes[-1])
    least = next((width for width in found.intermediate_sizes if width >= np.ceil(room * found.min_mlp_fill)), None)
    widest = max(width for width in found.intermediate_sizes if width <= room)
    return shape.intermediate_size >= min(least or widest, widest)


def test_a_budget_nothing_fits_names_the_smallest_legal_shape_and_its_parameters():
    smallest = min(space(fraction=0.99, axes=SpaceSpec(min_mlp_fill=1e-6)).shapes(), key=lambda shape: count_parameters(ARCHITECTURE, shape).total)
    parameters = count_parameters(ARCHITECTURE, smallest).total

    with pytest.raises(BudgetInfeasible) as caught:
        SearchSpace(ARCHITECTURE, space=SpaceSpec(), budget=BudgetSpec(max_parameters=parameters - 1))

    (problem,) = caught.value.problems
    assert problem.field == "budget.max_parameters"
    assert smallest.key in problem.expected
    assert str(parameters) in problem.expected
    assert problem.got == str(parameters - 1)
    assert SearchSpace(ARCHITECTURE, space=SpaceSpec(), budget=BudgetSpec(max_parameters=parameters)).count() == 1


def test_a_budget_that_is_not_below_the_teacher_is_refused():
    with pytest.raises(InvalidSpec, match=r"budget\.max_parameters: expected below the teacher's 260032 total parameters, got 260032"):
        SearchSpace(ARCHITECTURE, space=SpaceSpec(), budget=BudgetSpec(max_parameters=260_032))


def test_a_share_of_the_budget_that_no_shape_reaches_is_refused():
    coarse = SpaceSpec(num_hidden_layers=AxisSpec(max=3), hidden_size=AxisSpec(max=32))

    with pytest.raises(BudgetInfeasible, match=r"budget.min_use: expected a share that some legal shape reaches \(ceiling 247030 total parameters\)"):
        space(fraction=0.95, axes=coarse, min_use=0.99)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (SpaceSpec(hidden_size=AxisSpec(max=65)), "space.hidden_size.max: expected at most the teacher's 64, got 65"),
        (SpaceSpec(num_hidden_layers=AxisSpec(min=9)), "space.num_hidden_layers: expected a multiple of 1 between 9 and 5, got none"),
        (SpaceSpec(intermediate_size=AxisSpec(min=65, max=79, multiple=16)), "space.intermediate_size: expected a multiple of 16 between 65 and 79, got none"),
        (SpaceSpec(hidden_size=AxisSpec(min=33, max=33)), "space.hidden_size: expected"),
    ],
)
def test_a_range_without_a_value_is_refused_by_name(axes, message):
    with pytest.raises(InvalidSpec, match=message):
        space(axes=axes)


def test_the_teachers_own_value_is_legal_whatever_the_multiple():
    assert space().intermediate_sizes[-1] == 172
    assert space(axes=SpaceSpec(intermediate_size=AxisSpec(max=171))).intermediate_sizes[-1] == 160


def test_hidden_sizes_divide_by_the_heads_as_transformers_wants():
    assert all(shape.hidden_size % shape.num_attention_heads == 0 for shape in space().shapes())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_hidden_layers": 6}, "num_hidden_layers"),
        ({"hidden_size": 72}, "hidden_size"),
        ({"intermediate_size": 173}, "intermediate_size"),
        ({"num_attention_heads": 12}, "query_heads_per_kv"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"head_dim": 4}, "head_dim"),
        ({"hidden_size": 60}, "hidden_size"),
        ({}, "parameters"),
    ],
)
def test_explain_says_why_a_shape_of_the_users_cannot_be_evaluated(change, field):
    problems = space().explain(replace(TEACHER, **change))

    assert field in [problem.field for problem in problems]


def test_a_named_shape_may_lie_off_the_grid():
    shape = replace(TEACHER, num_hidden_layers=2, intermediate_size=99)

    assert shape not in set(space().shapes())
    assert not space().proposes(shape)
    assert space().explain(shape) == ()


@properties
@given(spaces(), st.data())
def test_what_is_proposed_is_what_is_listed(found, data):
    listed = list(found.shapes())
    shape = data.draw(st.sampled_from(listed))
    near = replace(shape, intermediate_size=max(1, shape.intermediate_size + data.draw(st.integers(-8, 8))))

    assert found.proposes(shape)
    assert found.proposes(near) == (near in set(listed))


@properties
@given(spaces())
def test_every_anchor_can_be_evaluated(found):
    assert all(found.explain(shape) == () for shape in found.anchors().values())


def test_the_anchors_are_what_their_names_say():
    anchors = space().anchors()

    assert anchors["depth_only"] == replace(TEACHER, num_hidden_layers=anchors["depth_only"].num_hidden_layers)
    assert anchors["width_only"].num_hidden_layers == TEACHER.num_hidden_layers
    assert anchors["width_only"].num_attention_heads == TEACHER.num_attention_heads
    assert all(count_parameters(ARCHITECTURE, shape).total <= 0.6 * 260_032 for shape in anchors.values())


def test_counting_without_the_embeddings_measures_another_budget():
    found = space(counting="non_embedding")

    assert found.budget.max_parameters == int(0.6 * (260_032 - 512 * 64))
    assert max(counted(found, shape) for shape in found.shapes()) <= found.budget.max_parameters


def test_a_fraction_that_is_too_small_is_named_as_the_user_wrote_it():
    with pytest.raises(BudgetInfeasible) as refused:
        SearchSpace(ARCHITECTURE, space=SpaceSpec(), budget=BudgetSpec(max_fraction=0.01))
    (problem,) = refused.value.problems
    assert (problem.field, problem.got) == ("budget.max_fraction", "0.01")
    SearchSpace(ARCHITECTURE, space=SpaceSpec(), budget=BudgetSpec(max_fraction=float(problem.expected.split()[2].rstrip(":"))))


def test_the_depth_only_anchor_keeps_to_a_minimum_that_the_spec_names():
    free = SearchSpace(ARCHITECTURE, space=SpaceSpec(), budget=BudgetSpec(max_fraction=0.5)).anchors()["depth_only"]
    named = SpaceSpec(num_hidden_layers=AxisSpec(min=free.num_hidden_layers + 1))
    assert "depth_only" not in SearchSpace(ARCHITECTURE, space=named, budget=BudgetSpec(max_fraction=0.5)).anchors()


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_transformers_takes_every_shape_that_a_space_proposes(model_type: str):
    """What a family's config class imposes reaches the space as legality; nothing is proposed that could not be loaded."""
    from transformers import AutoConfig

    config: dict[str, Any] = {
        "model_type": model_type,
        **TEACHER.as_dict(),
        **({"intermediate_size": 176, "moe_intermediate_size": 80, "num_experts": 8, "num_experts_per_tok": 2} if FAMILIES[model_type].expert_keys else {}),
        "hidden_size": TEACHER.num_attention_heads * TEACHER.head_dim,
        "vocab_size": 512,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }
    if model_type == "phi3":
        factors = [1.0] * (TEACHER.head_dim // 2)
        config["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    architecture = read_architecture(AutoConfig.for_model(**config).to_dict())
    space = SearchSpace(architecture, space=SpaceSpec(), budget=BudgetSpec(max_fraction=0.6))
    free = any(shape.hidden_size % shape.num_attention_heads for shape in islice(space.shapes(), 2000))

    assert free is (model_type not in ("llama", "gemma2", "gemma3_text", "phi3"))
    for shape in islice(space.shapes(), 0, None, max(1, space.count() // 25)):
        AutoConfig.for_model(**{**config, **architecture.config_values(shape)})
        assert not space.explain(shape)


EXPERTS = replace(
    ARCHITECTURE, model_type="mixtral", shape=replace(TEACHER, intermediate_size=176, num_experts=8), tie_word_embeddings=False, num_experts_per_tok=3
)


def test_the_number_of_experts_is_one_more_axis_and_never_below_what_a_token_needs():
    found = space(architecture=EXPERTS, axes=SpaceSpec(num_experts=AxisSpec(min=1, max=6)))

    assert {shape.num_experts for shape in found.shapes()} == {3, 4, 5, 6}
    assert found.axes["num_experts"] == (1, 2, 3, 4, 5, 6)
    assert {shape.num_experts for shape in space(architecture=EXPERTS).shapes()} == {4, 5, 6, 7, 8}
    assert all(shape.num_experts is None for shape in space().shapes())
    with pytest.raises(InvalidSpec, match=r"space\.num_experts: expected nothing"):
        space(axes=SpaceSpec(num_experts=AxisSpec(max=4)))


def test_every_width_of_an_expert_is_one_that_transformers_runs():
    found = space(architecture=EXPERTS, axes=SpaceSpec(hidden_size=AxisSpec(multiple=1), intermediate_size=AxisSpec(multiple=1)))

    assert all(shape.hidden_size % 8 == 0 and shape.intermediate_size % 8 == 0 for shape in islice(found.shapes(), 500))
    with pytest.raises(InvalidSpec, match=r"space\.intermediate_size: expected a value that mixtral takes"):
        space(architecture=EXPERTS, axes=SpaceSpec(intermediate_size=AxisSpec(min=170, max=175, multiple=1)))


def test_the_anchors_of_a_mixture_keep_all_experts_or_nothing_but_experts_go():
    found = space(architecture=EXPERTS)
    anchors = found.anchors()

    assert anchors["width_only"].num_experts == anchors["depth_only"].num_experts == 8
    assert anchors["experts_only"] == replace(EXPERTS.shape, num_experts=anchors["experts_only"].num_experts)
    assert found.explain(replace(EXPERTS.shape, num_experts=anchors["experts_only"].num_experts + 1))
    assert anchors["uniform"].num_experts < 8
    assert "experts_only" not in space().anchors()


def test_ceilings_hold_together_and_each_can_be_the_one_that_rules():
    teacher = count_costs(ARCHITECTURE, TEACHER, workload=space().budget.workload)
    several = {"max_memory_bytes": int(0.6 * teacher["memory_bytes"]), "max_flops_per_token": int(0.6 * teacher["flops_per_token"])}
    free = SpaceSpec(min_mlp_fill=1e-9)
    alone = [set(SearchSpace(ARCHITECTURE, space=free, budget=BudgetSpec(**{name: value})).shapes()) for name, value in several.items()]
    together = set(space(axes=free, **several).shapes())

    assert together == set.intersection(set(space(axes=free).shapes()), *alone)
    assert len({len(together), *(len(shapes) for shapes in alone)}) == 3


def test_memory_is_weights_and_cache_of_the_named_load():
    """The cache rules where it is most of the memory: fewer KV heads or layers, however small the MLP."""
    load = WorkloadSpec(batch_size=64, context_length=2048, dtype="bfloat16")
    cache = 2 * 2 * TEACHER.num_hidden_layers * TEACHER.num_key_value_heads * TEACHER.head_dim * 64 * 2048
    found = SearchSpace(ARCHITECTURE, space=SpaceSpec(), budget=BudgetSpec(max_memory_bytes=cache // 2, workload=load))

    assert all(shape.num_hidden_layers * shape.num_key_value_heads * 2 <= TEACHER.num_hidden_layers * TEACHER.num_key_value_heads for shape in found.shapes())
    (problem,) = found.explain(TEACHER)
    assert (problem.field, problem.got) == ("memory_bytes", str(cache + 2 * 260_032))


def test_every_ceiling_that_nothing_fits_is_named_with_the_smallest_shape():
    with pytest.raises(BudgetInfeasible) as refused:
        SearchSpace(ARCHITECTURE, space=SpaceSpec(), budget=BudgetSpec(max_parameters=10, max_memory_bytes=20), field="more_budgets.2")

    assert [problem.field for problem in refused.value.problems] == ["more_budgets.2.max_parameters", "more_budgets.2.max_memory_bytes"]
    assert all("of the smallest legal shape L3-D32" in problem.expected for problem in refused.value.problems)


def test_a_ceiling_that_keeps_nothing_out_is_refused_alone_and_let_pass_beside_one_that_does():
    with pytest.raises(InvalidSpec, match=r"budget\.max_memory_bytes: expected below the teacher's \d+ bytes of weights and KV cache, got 1000000000000"):
        SearchSpace(ARCHITECTURE, space=SpaceSpec(), budget=BudgetSpec(max_memory_bytes=10**12))

    assert set(space(max_memory_bytes=10**12).shapes()) == set(space().shapes())


def test_where_only_latency_limits_everything_but_the_teacher_is_legal():
    latency = (LatencySpec(name="chat", max_decode_ms=2.0), LatencySpec(name="batch", batch_size=8))
    budget = BudgetSpec(latency=latency)
    found = SearchSpace(ARCHITECTURE, space=SpaceSpec(), budget=budget)

    assert found.explain(replace(TEACHER, intermediate_size=171)) == ()
    assert [problem.field for problem in found.explain(TEACHER)] == ["parameters"]
    assert measured_excess(budget, {"decode_ms:chat": 2.0, "prefill_ms:chat": 900.0, "decode_ms:batch": 900.0}) == ()
    (problem,) = measured_excess(budget, {"decode_ms:chat": 2.5})
    assert str(problem) == "decode_ms:chat: expected at most 2 ms, got 2.5 ms"


def test_a_load_beyond_64_bits_is_refused():
    load = WorkloadSpec(batch_size=65_536, context_length=2**24)
    wide = replace(ARCHITECTURE, shape=replace(TEACHER, num_hidden_layers=10_000, num_attention_heads=1024, num_key_value_heads=1024, head_dim=1024))
    with pytest.raises(InvalidSpec, match=r"budget\.workload: expected costs of the teacher of at most"):
        SearchSpace(wide, space=SpaceSpec(), budget=BudgetSpec(max_fraction=0.5, workload=load))


def test_hard_multiples_hold_for_the_teachers_own_sizes_and_for_named_shapes_too():
    found = space(axes=SpaceSpec(multiples_of=16))

    assert {shape.intermediate_size % 16 for shape in found.shapes()} == {shape.hidden_size % 16 for shape in found.shapes()} == {0}
    problems = found.explain(replace(TEACHER, num_hidden_layers=2))
    assert [str(problem) for problem in problems] == ["intermediate_size: expected a multiple of space.multiples_of=16, got 172"]
    assert "depth_only" not in found.anchors()


def test_shapes_divide_over_the_devices_and_kv_heads_are_copied_where_there_are_fewer():
    found = space(axes=SpaceSpec(tensor_parallel=4, num_key_value_heads=AxisSpec(min=1)))

    assert {shape.num_key_value_heads for shape in found.shapes()} == {2, 4}
    assert all(shape.num_attention_heads % 4 == 0 and shape.intermediate_size % 4 == 0 for shape in found.shapes())
    fields = [
        problem.field
        for problem in found.explain(replace(TEACHER, num_hidden_layers=2, hidden_size=60, intermediate_size=90, num_attention_heads=6, num_key_value_heads=3))
    ]
    assert fields == ["num_attention_heads", "intermediate_size", "num_key_value_heads"]
    with pytest.raises(InvalidSpec, match=r"space\.tensor_parallel: expected a number of devices over which some heads divide, got 43"):
        space(axes=SpaceSpec(tensor_parallel=43))
