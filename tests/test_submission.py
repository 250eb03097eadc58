"""What a spec means before any compute: every wrong thing named by field, expected and got; and the whole plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.architecture import read_architecture
from nas.cli.estimate import budget_facts
from nas.cost import count_parameters
from nas.errors import BudgetInfeasible, InvalidSpec
from nas.settings import Settings
from nas.shape import Shape
from nas.spec import dump_spec, parse_spec
from nas.store.store import Store
from nas.submission import Submission, check_submission

SHAPE = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CORPUS = {"parts": [{"name": "words"}], "sequence_length": 32, "calibration_tokens": 512, "validation_tokens": 512}


@pytest.fixture(scope="module")
def submit(
    tmp_path_factory: pytest.TempPathFactory, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]
) -> Iterator[Callable[..., Submission]]:
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path_factory.mktemp("submission"))})
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)

    def run(**changes: Any) -> Submission:
        return check_submission(parse_spec(json.dumps(tiny_spec(**changes))), store=store)

    yield run
    store.close()


@pytest.mark.parametrize(
    ("changes", "field", "expected", "got"),
    [
        ({"teacher": "big"}, "teacher", "a registered name (tiny)", "big"),
        ({"corpus": {**CORPUS, "parts": [{"name": "web"}]}}, "corpus.parts.0.name", "a registered name (words)", "web"),
        ({"tasks": [{"name": "choice"}, {"name": "mmlu"}]}, "tasks.1.name", "a registered name (choice)", "mmlu"),
        (
            {"tasks": [{"name": "choice", "metric": "f1"}]},
            "tasks.0.metric",
            "one of choice's metrics that can be compared document by document: acc, logprob_per_byte, margin, bits_per_byte",
            "f1",
        ),
        ({"tasks": [{"name": "choice"}, {"name": "choice"}]}, "tasks.1.name", "each name once", "choice again"),
        ({"corpus": {**CORPUS, "parts": [{"name": "words"}] * 2}}, "corpus.parts.1.name", "each name once", "words again"),
        ({"corpus": {**CORPUS, "sequence_length": 65}}, "corpus.sequence_length", "at most the teacher's context of 64", "65"),
        (
            {"corpus": {**CORPUS, "sequence_length": 64, "validation_tokens": 256}, "evaluation": {"latency_new_tokens": 64}},
            "evaluation.latency_new_tokens",
            "less than the teacher's context of 64",
            "64",
        ),
        ({"shapes": [SHAPE | {"hidden_size": 64, "intermediate_size": 1}]}, "shapes.0.hidden_size", None, "64"),
        ({"space": {"num_hidden_layers": {"max": 9}}}, "space.num_hidden_layers.max", None, "9"),
        ({"budget": {"max_parameters": 10**9}}, "budget.max_parameters", None, "1000000000"),
        ({"objectives": ["decode_ms:chat"]}, "objectives.0", "the name of a workload of every budget's latency (there is none)", "decode_ms:chat"),
        ({"more_budgets": [{"max_fraction": 0.001}]}, "more_budgets.0.max_fraction", None, "0.001"),
        (
            {"budget": {"max_fraction": 0.7, "workload": {"context_length": 65}}},
            "budget.workload.context_length",
            "at most the teacher's context of 64",
            "65",
        ),
        (
            {"more_budgets": [{"max_fraction": 0.7, "latency": [{"name": "chat", "prompt_tokens": 60, "new_tokens": 5}]}]},
            "more_budgets.0.latency.0.prompt_tokens",
            "with new_tokens at most the teacher's context of 64",
            "65",
        ),
    ],
)
def test_a_wrong_thing_is_named_by_field_expected_and_got(
    submit: Callable[..., Submission], changes: dict[str, Any], field: str, expected: str | None, got: str
) -> None:
    with pytest.raises(InvalidSpec) as refused:
        submit(**changes)
    (problem,) = (problem for problem in refused.value.problems if problem.field == field)
    assert problem.got == got
    assert expected is None or problem.expected == expected


def test_too_few_validation_blocks_for_a_standard_error_are_refused(
    tmp_path: Path, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]
) -> None:
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path)})
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    spec = parse_spec(json.dumps(tiny_spec(corpus={**CORPUS, "sequence_length": 512, "validation_tokens": 512})))
    with pytest.raises(InvalidSpec, match=r"corpus\.validation_tokens: expected at least two blocks of sequence_length=512.*got 512"):
        check_submission(spec, store=store)
    store.close()


def test_all_wrong_names_are_told_together(submit: Callable[..., Submission]) -> None:
    with pytest.raises(InvalidSpec) as refused:
        submit(teacher="x", tasks=[{"name": "y"}], corpus={**CORPUS, "parts": [{"name": "z"}]})
    assert [problem.field for problem in refused.value.problems] == ["teacher", "corpus.parts.0.name", "tasks.0.name"]


def test_a_budget_that_nothing_fits_says_the_smallest_shape(submit: Callable[..., Submission]) -> None:
    with pytest.raises(BudgetInfeasible) as refused:
        submit(budget={"max_parameters": 100})
    assert "smallest" in str(refused.value)


def test_the_plan_prices_the_search(submit: Callable[..., Submission]) -> None:
    submission = submit(controls={"num_random": 3}, sampler={"max_trials": 5})
    plan = submission.plan
    architecture = read_architecture(submission.inputs["teacher"]["config"])
    assert plan["teacher_parameters"] == count_parameters(architecture, architecture.shape).total == 24416
    assert plan["max_parameters"] == int(0.7 * 24416)
    assert plan["rung_tokens"] == [0, 2048, 4096]
    proposals = min(5, plan["legal_shapes"] + len(plan["anchors"]))
    # The decay branch of rung 1 (0.3 of it) is thrown away and its share trained again.
    assert plan["max_distillation_tokens"] == (4096 + int(0.3 * 2048)) * (proposals + 3)
    for anchor in plan["anchors"].values():
        assert anchor["parameters"] == count_parameters(architecture, Shape.from_dict(anchor["shape"])).total <= plan["max_parameters"]
    json.dumps(plan, allow_nan=False)


def test_a_total_of_tokens_becomes_the_first_rung_of_the_spec_that_is_stored(submit: Callable[..., Submission]) -> None:
    submission = submit(sampler={"max_trials": 12}, rungs={"total_tokens": 3_000_000, "factor": 2, "num_trained": 2})
    spent = submission.plan["expected_distillation_tokens"]

    assert submission.plan["rung_tokens"] == [0, submission.spec.rungs.first_tokens, 2 * submission.spec.rungs.first_tokens]
    assert 0.98 * 3_000_000 < spent <= 3_000_000
    assert parse_spec(json.dumps(dump_spec(submission.spec))) == submission.spec


def test_named_shapes_beyond_max_trials_are_priced(submit: Callable[..., Submission]) -> None:
    named = [dict(submit().plan["teacher_shape"], intermediate_size=size, num_hidden_layers=2) for size in (16, 24, 32)]
    plan = submit(shapes=named, sampler={"max_trials": 1}, controls={"anchors": False}).plan
    assert plan["max_distillation_tokens"] == 3 * (4096 + int(0.3 * 2048))


@pytest.mark.parametrize(
    ("rungs", "field"),
    [({"first_tokens": 1, "num_trained": 2}, "rungs.first_tokens"), ({"first_tokens": 2**53, "factor": 64, "num_trained": 9}, "rungs.factor")],
)
def test_rungs_of_impossible_length_are_refused(submit: Callable[..., Submission], rungs: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        submit(rungs=rungs)
    assert [problem.field for problem in refused.value.problems] == [field]


def test_the_inputs_are_a_snapshot_with_digests(submit: Callable[..., Submission]) -> None:
    inputs = submit().inputs
    assert {len(inputs["teacher"]["digest"]), *(len(entry["digest"]) for part in ("corpora", "tasks") for entry in inputs[part])} == {64}
    assert json.loads(json.dumps(inputs)) == inputs


def test_the_plan_says_the_memory_and_the_disk_that_are_needed(submit: Callable[..., Submission]) -> None:
    memory, disk = (submit().plan[name] for name in ("memory", "disk"))
    assert memory["training"]["device_bytes"] == sum(memory["training"]["device"].values())
    assert 0 < memory["training_at_least"]["device_bytes"] <= memory["training"]["device_bytes"]
    parameters = count_parameters(read_architecture(submit().inputs["teacher"]["config"]), Shape.from_dict(memory["shape"])).total
    assert disk["trial_bytes"] == 40 * parameters  # three states of 12 bytes a parameter, and the student
    on_gpu = submit(resources={"gpus": 1}, distillation={"dtype": "bfloat16", "moments": "bfloat16"}).plan["memory"]["training"]
    assert "optimiser state (bfloat16)" in on_gpu["device"]


def test_a_family_is_planned_budget_by_budget(submit: Callable[..., Submission]) -> None:
    alone = submit(budget={"max_fraction": 0.7}).plan
    plan = submit(budget={"max_fraction": 0.7}, more_budgets=[{"max_memory_bytes": 40_000}]).plan

    assert {name: plan[name] for name in plan["budgets"][0]} == plan["budgets"][0] == alone["budgets"][0]
    assert plan["budgets"][1]["ceilings"] == {"memory_bytes": 40_000}
    assert plan["max_parameters"] == plan["budgets"][0]["ceilings"]["parameters"]
    assert alone["max_trials"] < plan["max_trials"] <= 2 * alone["max_trials"]


def test_a_named_shape_needs_to_fit_one_budget(submit: Callable[..., Submission]) -> None:
    shapes = [submit().plan["teacher_shape"] | {"num_hidden_layers": 1}]
    small, large = {"max_fraction": 0.3}, {"max_fraction": 0.9}

    assert submit(budget=small, more_budgets=[large], shapes=shapes).plan["max_trials"]
    with pytest.raises(InvalidSpec, match=r"shapes\.0\.parameters: expected at most"):
        submit(budget=small, shapes=shapes)


def test_a_terminal_shows_the_ceilings_of_every_kind_of_budget(submit: Callable[..., Submission]) -> None:
    chat = {"name": "chat", "prompt_tokens": 4, "new_tokens": 2, "max_decode_ms": 1.5}
    budgets = [{"max_fraction": 0.7, "min_use": 0.5}, {"max_memory_bytes": 40_000, "max_flops_per_token": 40_000}, {"latency": [chat]}]
    plan = submit(budget=budgets[0], more_budgets=budgets[1:]).plan

    facts = [budget_facts(budget) for budget in plan["budgets"]]

    assert facts[0]["at least"] == f"{plan['min_parameters']:,} total parameters"
    assert (facts[1]["at most memory bytes"], facts[1]["at most flops per token"]) == ("40,000", "40,000")
    assert facts[2]["at most decode_ms:chat"] == "1.5, measured at rung 0"
