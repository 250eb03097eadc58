"""A task that cannot tell the teacher from random weights is found, and what to do about it is said."""

from __future__ import annotations

import json

import pytest

from nas.errors import InvalidSpec
from nas.search.results import Metric, RungResult
from nas.search.task_signals import check_signals, read_signals
from nas.spec import TaskSpec


def result(*, acc: tuple[float, ...], margin: tuple[float, ...] = ()) -> RungResult:
    flat = Metric.from_documents((1.0, 1.1), higher_is_better=False)
    forms = {"pair": {"margin": Metric.from_documents(margin, higher_is_better=True)}} if margin else {}
    tasks = {"pair": Metric.from_documents(acc, higher_is_better=True)}
    return RungResult(rung=0, tokens=0, kl=flat, loss=flat, tasks=tasks, parameters=1, seconds={}, details={}, likelihoods=forms)


RANDOM = result(acc=(1.0, 0.0, 1.0, 0.0), margin=(-0.1, 0.1, 0.0, 0.05))
WEAK = result(acc=(1.0, 0.0, 1.0, 1.0), margin=(1.0, 1.1, 1.2, 0.9))
CLEAR = result(acc=(1.0,) * 4)


def test_a_clear_teacher_makes_a_clear_task() -> None:
    (signal,) = read_signals([TaskSpec(name="pair")], teacher=CLEAR, random=result(acc=(0.0, 0.0, 1.0, 0.0)))
    assert (signal.clear, signal.in_objective) == (True, True)
    assert signal.z == pytest.approx(3.0)
    check_signals([signal])


def test_a_weak_task_is_left_out_and_its_clear_likelihood_form_is_named() -> None:
    (signal,) = read_signals([TaskSpec(name="pair")], teacher=WEAK, random=RANDOM)
    assert (signal.clear, signal.in_objective, signal.clear_forms) == (False, False, ("margin",))
    with pytest.raises(
        InvalidSpec, match=r"tasks\.0: expected .* 2 standard errors, or insist, or its metric margin, .* got pair: teacher 0\.75, random weights 0\.5"
    ):
        check_signals([signal])


def test_a_task_one_insists_on_stays() -> None:
    (signal,) = read_signals([TaskSpec(name="pair", insist=True)], teacher=WEAK, random=RANDOM)
    assert (signal.clear, signal.in_objective) == (False, True)
    check_signals([signal])


def test_a_teacher_that_is_worse_than_random_weights_is_refused_however_one_insists() -> None:
    signals = read_signals([TaskSpec(name="pair", insist=True)], teacher=result(acc=(0.0, 0.0, 0.0, 1.0)), random=RANDOM)
    with pytest.raises(InvalidSpec, match="a task on which the teacher beats random weights"):
        check_signals(signals)


def test_signals_without_any_spread_are_json() -> None:
    (clear,) = read_signals([TaskSpec(name="pair")], teacher=CLEAR, random=result(acc=(0.0, 0.0)))
    (equal,) = read_signals([TaskSpec(name="pair")], teacher=CLEAR, random=CLEAR)
    assert (clear.z, clear.clear) == (None, True)
    assert (equal.z, equal.clear) == (0.0, False)
    json.dumps([clear.as_dict(), equal.as_dict()], allow_nan=False)
