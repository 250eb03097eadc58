"""Two searches side by side: differences are paired where the documents are the same, and nowhere else."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nas.search.comparison import Side, compare, comparison_as_dict
from nas.search.results import Metric, RungResult
from nas.spec import dump_spec, parse_spec

SHAPE = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
COMMON = np.random.default_rng(0).normal(size=200)
"""How hard each document is, for every model."""


def spec(**changes: Any) -> dict[str, Any]:
    base = {"teacher": "t", "corpus": {"parts": [{"name": "c"}]}, "tasks": [{"name": "pairs"}], "budget": {"max_fraction": 0.5}}
    return dump_spec(parse_spec(json.dumps({**base, **changes})))


INPUTS = {
    "teacher": {"name": "t", "digest": "1"},
    "corpora": [{"name": "c", "digest": "2"}],
    "tasks": [{"name": "pairs", "digest": "3", "card": {"default_metric": "acc"}}],
}


def result(seed: int, *, shift: float = 0.0) -> RungResult:
    documents = COMMON + 0.1 * np.random.default_rng(seed).normal(size=200) + shift
    metric = Metric.from_documents(tuple(documents.tolist()), higher_is_better=True)
    return RungResult(rung=2, tokens=10, kl=metric, loss=metric, tasks={"pairs": metric}, parameters=1, seconds={}, details={})


def row(number: int, *, width: int, **changes: Any) -> dict[str, Any]:
    figures = {"origin": "sampler", "rank": 1, "rung": 2, "tokens": 10, "score": 0.5, "standard_error": 0.1, "kl": 0.3, "kl_standard_error": 0.01}
    return {"number": number, "shape": {**SHAPE, "intermediate_size": width}, "parameters": 1000, **figures, **changes}


def side(draw: int, *, shift: float = 0.0, widths: tuple[int, ...] = (32, 40), **changes: Any) -> Side:
    board = {"leader": 0, "winner": 0, "cost": {"tokens": 5}}
    return Side(spec=spec(**changes), inputs=INPUTS, board=board, leader=row(0, width=widths[0]), best=result(draw, shift=shift))


def test_on_the_same_documents_the_difference_is_paired_and_its_error_small() -> None:
    found = compare(side(1), side(2, shift=0.1))

    gap = found.tasks["pairs"]
    assert gap.paired
    assert gap.low < 0.1 < gap.high
    assert gap.standard_error == pytest.approx(0.1 * 2**0.5 / 200**0.5, rel=0.2)
    assert found.other_documents == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 1}, "seed: 0 and 1"),
        ({"evaluation": {"documents_per_task": 100}}, "evaluation.documents_per_task: 200 and 100"),
        ({"tasks": [{"name": "pairs", "num_fewshot": 2}]}, "task pairs: ('3', 0) and ('3', 2)"),
    ],
)
def test_on_other_documents_it_has_the_errors_of_both_sides_and_says_why(changes: dict[str, Any], reason: str) -> None:
    first, second = side(1), side(2, **changes)
    found = compare(first, second)

    assert found.other_documents == (reason,)
    assert not found.tasks["pairs"].paired
    assert first.best is not None
    assert found.tasks["pairs"].standard_error == pytest.approx(first.best.tasks["pairs"].standard_error * 2**0.5, rel=0.05)


def test_more_proposals_change_no_document() -> None:
    found = compare(side(1), side(2, sampler={"name": "random", "max_trials": 9}))

    assert found.other_documents == ()
    assert found.spec == {"sampler.name": ("auto", "random"), "sampler.max_trials": (24, 9)}


def test_another_metric_of_the_same_task_is_not_compared() -> None:
    assert compare(side(1), side(2, tasks=[{"name": "pairs", "metric": "acc_norm"}])).tasks == {}


def test_another_teacher_has_another_kl() -> None:
    other = replace(side(2), inputs={**INPUTS, "teacher": {"name": "t", "digest": "9"}})
    found = compare(side(1), other)

    assert found.kl is None
    assert found.inputs == {"teacher t": ("1", "9")}


def test_held_out_documents_are_taken_where_both_were_confirmed() -> None:
    first, second = side(1), side(2)
    both = compare(replace(first, held_out=result(1, shift=1.0)), replace(second, held_out=result(2, shift=2.0)))
    one = compare(replace(first, held_out=result(1, shift=1.0)), second)

    assert (both.documents, one.documents) == ("held_out", "search")
    assert both.tasks["pairs"].value == pytest.approx(1.0, abs=0.1)
    assert one.tasks["pairs"].value == pytest.approx(0.0, abs=0.1)


def test_the_shapes_on_both_boards_stand_side_by_side() -> None:
    found = compare(side(1), side(2), shared=[(row(0, width=32), row(2, width=32)), (row(2, width=48), row(0, width=48))])

    assert [(both["shape"]["intermediate_size"], both["first"]["number"], both["second"]["number"]) for both in found.shapes] == [(32, 0, 2), (48, 2, 0)]


def test_swapping_the_searches_turns_the_signs() -> None:
    first, second = side(1), side(2, shift=0.3, seed=4)
    there, back = compare(first, second), compare(second, first)

    assert there.tasks["pairs"].value == pytest.approx(-back.tasks["pairs"].value)
    assert (there.tasks["pairs"].low, there.tasks["pairs"].high) == pytest.approx((-back.tasks["pairs"].high, -back.tasks["pairs"].low))
    assert there.spec == {name: (ours, theirs) for name, (theirs, ours) in back.spec.items()}


def test_a_search_without_results_can_be_compared() -> None:
    found = compare(Side(spec=spec(), inputs=INPUTS, board={}, leader=None, best=None), side(2))

    assert (found.tasks, found.kl, found.shapes) == ({}, None, ())
    assert found.best[0] is None
    json.dumps(comparison_as_dict(found), allow_nan=False)


def test_nothing_is_changed() -> None:
    first = side(1)
    before = copy.deepcopy((first.spec, first.board))
    compare(first, side(2))

    assert (first.spec, first.board) == before
