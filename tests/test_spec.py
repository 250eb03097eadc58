from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.errors import InvalidSpec
from nas.shape import Shape
from nas.spec import (
    PRESETS,
    BudgetSpec,
    CompressionSpec,
    CorpusPart,
    CorpusSpec,
    DistillationSpec,
    RungSpec,
    SamplerSpec,
    SearchSpec,
    TaskSpec,
    dump_spec,
    parse_spec,
)
from nas.strict_json import MAX_PROBLEMS

MINIMAL: dict[str, Any] = {
    "teacher": "stories260K",
    "corpus": {"parts": [{"name": "tinystories"}]},
    "tasks": [{"name": "ending"}],
    "budget": {"max_fraction": 0.6},
}
SHAPE = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
weights = st.floats(1e-3, 1e6)
specs = st.builds(
    SearchSpec,
    teacher=names,
    corpus=st.builds(
        CorpusSpec, parts=st.lists(st.builds(CorpusPart, name=names, weight=weights), min_size=1, max_size=3).map(tuple), sequence_length=st.integers(8, 131072)
    ),
    tasks=st.lists(st.builds(TaskSpec, name=names, metric=st.none() | st.text(max_size=9), weight=weights), min_size=1, max_size=3).map(tuple),
    budget=st.builds(BudgetSpec, max_fraction=st.floats(0.01, 0.99), min_use=st.floats(0, 0.99))
    | st.builds(BudgetSpec, max_parameters=st.integers(1, 2**53), counting=st.just("non_embedding")),
    label=st.text(max_size=50),
    shapes=st.lists(st.integers(1, 64).map(lambda layers: Shape(**{**SHAPE, "num_hidden_layers": layers})), max_size=3).map(tuple),
    seed=st.integers(0, 2**31 - 1),
    objectives=st.sampled_from([(), ("parameters",), ("memory_bytes", "decode_ms:chat")]),
    warm_start_from=st.sampled_from([(), ("srch_1", "srch_2")]),
    sampler=st.builds(SamplerSpec, name=st.sampled_from(["auto", "gp", "nsga2", "enumerate"]), max_trials=st.integers(1, 100_000)),
    rungs=st.builds(RungSpec, keep=st.floats(0.01, 1.0), factor=st.integers(2, 64)),
    compression=st.builds(CompressionSpec, importance=st.sampled_from(["energy", "l2_mean"])),
    distillation=st.builds(DistillationSpec, learning_rate=st.none() | st.floats(1e-9, 1.0), micro_batch_size=st.none() | st.integers(1, 64)),
)


def with_value(path: str, value: Any) -> dict[str, Any]:
    """The minimal spec with one dotted path set."""
    values = json.loads(json.dumps(MINIMAL))
    at: Any = values
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        at = at[part] if isinstance(part, int) else at.setdefault(part, {})
    at[last] = value
    return values


@settings(max_examples=60, deadline=None)
@given(specs)
def test_a_spec_survives_json(spec):
    assert parse_spec(json.dumps(dump_spec(spec))) == spec


def test_four_fields_are_enough():
    spec = parse_spec(json.dumps(MINIMAL))

    assert spec.teacher == "stories260K"
    assert spec.corpus.parts == (CorpusPart(name="tinystories"),)
    assert spec.sampler == SamplerSpec()


@pytest.mark.parametrize(
    ("path", "value", "expected", "got"),
    [
        ("teacher", 7, "a valid string", "7"),
        ("teacher", "../etc", "a name of 1 to 96 letters", '"../etc"'),
        ("budget.max_fraction", "0.6", "a valid number", '"0.6"'),
        ("budget.max_fraction", 1.0, "less than 1", "1.0"),
        ("budget.max_fraction", 0, "greater than 0", "0"),
        ("budget.max_fraction", True, "a valid number", "true"),
        ("budget.counting", "all", "'total' or 'non_embedding'", '"all"'),
        ("sampler.max_trials", 0, "greater than or equal to 1", "0"),
        ("sampler.max_trials", 8.0, "a valid integer", "8.0"),
        ("sampler.trials", 8, "no such field", "8"),
        ("tasks", [], "at least 1 item", "[]"),
        ("tasks.0.num_fewshot", -1, "greater than or equal to 0", "-1"),
        ("tasks.0.weight", None, "a valid number", "null"),
        ("corpus.sequence_length", 4, "greater than or equal to 8", "4"),
        ("rungs.keep", 1.5, "less than or equal to 1", "1.5"),
        ("distillation.dtype", "float16", "'float32' or 'bfloat16'", '"float16"'),
        ("seed", 2**31, "less than or equal to 2147483647", "2147483648"),
        ("space", [], "", "[]"),
        ("objectives", ["parameters", "parameters"], "each name once", '["parameters", "parameters"]'),
        ("warm_start_from", ["srch_1", "srch_1"], "each name once", '["srch_1", "srch_1"]'),
        ("unknown", 1, "no such field", "1"),
        ("budgte", {}, "did you mean budget?", "{}"),
        ("sampler.max_trails", 8, "did you mean sampler.max_trials?", "8"),
        ("tasks.0.weigth", 1, "did you mean tasks[].weight?", "1"),
        ("first_tokens", 8, "did you mean rungs.first_tokens?", "8"),
        ("max_parameters", 8, "did you mean budget.max_parameters or more_budgets[].max_parameters?", "8"),
        ("x" * 9000, 1, "no such field", "1"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected_and_what_came(path, value, expected, got):
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(json.dumps(with_value(path, value)))

    (problem,) = caught.value.problems
    assert problem.field == path
    assert expected in problem.expected
    assert problem.got == got


@pytest.mark.parametrize(
    ("signals", "hidden_states", "legal"), [("exact", "all", False), ("top_k", "all", False), ("top_k", "last", False), ("off", "all", True)]
)
def test_states_that_the_signals_do_not_hold_are_refused(signals, hidden_states, legal):
    text = json.dumps(with_value("distillation", {"signals": signals, "hidden_states": hidden_states}))
    if legal:
        assert parse_spec(text).distillation.hidden_states == hidden_states
        return
    with pytest.raises(InvalidSpec, match=f"hidden_states: expected .* with signals '{signals}', .* got '{hidden_states}'"):
        parse_spec(text)


@pytest.mark.parametrize(("controls", "legal"), [({}, True), ({"anchors": False}, False), ({"num_forced_anchors": 0}, False)])
def test_repeats_without_an_anchor_that_always_goes_on_are_refused(controls, legal):
    values = json.dumps({**MINIMAL, "controls": {**controls, "num_repeats": 1}})
    if legal:
        assert parse_spec(values).controls.num_repeats == 1
    else:
        with pytest.raises(InvalidSpec, match="num_repeats"):
            parse_spec(values)


@pytest.mark.parametrize("name", ["energy", "decode_ms", "decode_ms:", "parameters:chat"])
def test_an_objective_that_no_result_carries_is_refused_with_those_there_are(name):
    with pytest.raises(InvalidSpec, match=rf"objectives\.0: expected parameters, memory_bytes, .* decode_ms:NAME, got \"{name}\""):
        parse_spec(json.dumps({**MINIMAL, "objectives": [name]}))


@pytest.mark.parametrize("name", ["teacher", "corpus", "tasks", "budget"])
def test_a_missing_field_is_named(name):
    values = {key: value for key, value in MINIMAL.items() if key != name}

    with pytest.raises(InvalidSpec, match=f"{name}: expected a value, got nothing"):
        parse_spec(json.dumps(values))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "budget: expected a ceiling: max_parameters, "),
        ({"latency": [{"name": "chat"}]}, "budget: expected a ceiling: max_parameters, "),
        ({"max_fraction": 0.5, "max_parameters": 1000}, "budget: expected at most one of max_parameters and max_fraction"),
        ({"latency": [{"name": "chat", "max_decode_ms": 1.0}], "min_use": 0.5}, "budget: expected no min_use without a ceiling"),
        ({"max_fraction": 0.5, "latency": [{"name": "chat"}, {"name": "chat"}]}, "budget: expected latency: each name once"),
    ],
)
def test_a_budget_has_a_ceiling_and_no_contradiction(budget, message):
    with pytest.raises(InvalidSpec, match=message):
        parse_spec(json.dumps({**MINIMAL, "budget": budget}))


def test_any_one_ceiling_is_a_budget():
    ceilings = ({"max_fraction": 0.5}, {"max_parameters": 9}, {"max_memory_bytes": 9}, {"max_flops_per_token": 9})
    budgets = (*ceilings, {"latency": [{"name": "chat", "max_prefill_ms": 1.5}]})

    spec = parse_spec(json.dumps({**MINIMAL, "budget": budgets[0], "more_budgets": budgets[1:]}))

    assert spec.budgets == (spec.budget, *spec.more_budgets)
    assert len(set(spec.budgets)) == 5


def test_an_empty_range_is_refused():
    with pytest.raises(InvalidSpec, match=r"space\.hidden_size: expected min at most max=32"):
        parse_spec(json.dumps(with_value("space.hidden_size", {"min": 64, "max": 32})))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(number):
    text = json.dumps(with_value("distillation.learning_rate", "HERE")).replace('"HERE"', number)

    with pytest.raises(InvalidSpec, match=r"distillation\.learning_rate"):
        parse_spec(text)


def test_a_shape_that_is_impossible_in_itself_is_refused():
    with pytest.raises(InvalidSpec, match=r"shapes\.0"):
        parse_spec(json.dumps({**MINIMAL, "shapes": [{**SHAPE, "num_attention_heads": 3}]}))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"spec"', b"\xff\xfe", "[" * 100_000])
def test_what_is_not_a_json_object_is_refused(text):
    with pytest.raises(InvalidSpec, match=r"\(body\): expected a JSON object, got "):
        parse_spec(text)


def test_every_problem_is_told_at_once():
    values = {**MINIMAL, "teacher": 7, "tasks": [], "unknown": 1}

    with pytest.raises(InvalidSpec) as caught:
        parse_spec(json.dumps(values))

    assert {problem.field for problem in caught.value.problems} == {"teacher", "tasks", "unknown"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_what_the_spec_leaves_out(preset):
    filled = dump_spec(parse_spec(json.dumps({**MINIMAL, "preset": preset})))

    for part, values in PRESETS[preset].items():
        assert values.items() <= filled[part].items()
    assert filled["budget"]["max_fraction"] == 0.6


def test_what_the_spec_says_overrides_the_preset_field_by_field():
    spec = parse_spec(json.dumps({**MINIMAL, "preset": "minitron", "rungs": {"num_trained": 2}, "budget": {"max_fraction": 0.6, "min_use": 0.5}}))

    assert spec.rungs.num_trained == 2
    assert spec.rungs.keep_untrained == 1.0
    assert spec.budget.min_use == 0.5
    assert spec.sampler.name == "enumerate"


def test_an_unknown_preset_is_refused():
    with pytest.raises(InvalidSpec, match="preset: expected 'minitron', got"):
        parse_spec(json.dumps({**MINIMAL, "preset": "puzzle"}))


def test_a_preset_over_a_part_of_the_wrong_type_is_refused_by_name():
    with pytest.raises(InvalidSpec, match="rungs"):
        parse_spec(json.dumps({**MINIMAL, "preset": "minitron", "rungs": 3}))


def test_tokens_grow_by_the_factor_from_rung_to_rung():
    assert [RungSpec(first_tokens=100, factor=4).tokens(rung) for rung in range(4)] == [0, 100, 400, 1600]


def test_a_name_that_is_given_twice_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="'teacher' twice in one object"):
        parse_spec(json.dumps(MINIMAL)[:-1] + ', "teacher": "other"}')


@pytest.mark.parametrize("body", [{str(number): 1 for number in range(90_000)}, {"tasks": [{"x": 1}] * 60_000}, {"warm_start_from": [1] * 200_000}])
def test_a_body_full_of_mistakes_is_refused_in_time_and_not_at_length(body: dict[str, Any]) -> None:
    text = json.dumps(body)
    began = time.process_time()
    with pytest.raises(InvalidSpec) as refused:
        parse_spec(text)

    assert len(refused.value.problems) <= MAX_PROBLEMS
    assert time.process_time() - began < 10  # each compared with each other took minutes


def test_names_that_are_given_twice_are_found_in_time() -> None:
    names = [f'"{number}": 1' for number in range(80_000)]
    began = time.process_time()
    with pytest.raises(InvalidSpec, match="the name '7' twice in one object"):
        parse_spec("{" + ", ".join([*names, names[7]]) + "}")

    assert time.process_time() - began < 5


@pytest.mark.parametrize("character", ["\0", "\x1b", "\n", "\r", "\x7f", "\x9b"])
def test_a_label_is_a_line_without_commands(character: str) -> None:
    with pytest.raises(InvalidSpec, match=r"labels\.team: expected a line of text without control characters"):
        parse_spec(json.dumps({**MINIMAL, "labels": {"team": f"a{character}b"}}))
