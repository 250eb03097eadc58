"""A teacher that is another search's winner: who may be named, and what is planned before there is a winner. No compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.architecture import read_architecture
from nas.chain import awaited_source, is_stand_in
from nas.errors import InvalidSpec, TeacherUnavailable
from nas.settings import Settings
from nas.shape import Shape
from nas.spec import dump_spec, parse_spec
from nas.store.records import SearchRecord, SearchState
from nas.store.store import Store
from nas.submission import Submission, check_submission, take_teacher


@pytest.fixture
def store(tmp_path: Path, register_tiny: Callable[..., None]) -> Iterator[Store]:
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path)})
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    yield store
    store.close()


@pytest.fixture
def check(store: Store, tiny_spec: Callable[..., dict[str, Any]]) -> Callable[..., Submission]:
    return lambda **changes: check_submission(parse_spec(json.dumps(tiny_spec(**changes))), store=store)


@pytest.fixture
def submit(store: Store, check: Callable[..., Submission]) -> Callable[..., SearchRecord]:
    def run(**changes: Any) -> SearchRecord:
        submission = check(**changes)
        return store.create_search(spec=dump_spec(submission.spec), inputs=submission.inputs, plan=submission.plan, label="")

    return run


def win(store: Store, search: SearchRecord, *, shape: Shape, budget: int = 0, **changes: Any) -> None:
    """The search ends, with a winner of this shape in one budget."""
    teacher = search.inputs["teacher"]["config"]
    config = {**teacher, **read_architecture(teacher).config_values(shape)}
    bundle = {"bundle": f"searches/{search.id}/winner/bundle.tar", "bundle_sha256": f"{budget:064x}"}
    winner = {"trial": 3, "budget": budget, **bundle, "as_teacher": {"digest": "d" * 64, "config": config, "files": []}, **changes}
    store.save_winner(search.id, winner, fence=None)
    store.change_search(search.id, to=SearchState.SUCCEEDED, expected=list(SearchState), fence=None)


def largest(search: SearchRecord, budget: int = 0) -> Shape:
    return Shape.from_dict(search.plan["budgets"][budget]["space"]["largest"]["shape"])


def smallest(search: SearchRecord, budget: int = 0) -> Shape:
    return Shape.from_dict(search.plan["budgets"][budget]["space"]["smallest"]["shape"])


def test_a_search_that_goes_on_stands_for_its_largest_shape(store: Store, submit: Callable[..., SearchRecord]) -> None:
    first = submit()

    second = submit(teacher=first.id, budget={"max_fraction": 0.9})

    assert (awaited_source(second.inputs), is_stand_in(second.inputs)) == (first.id, True)
    assert Shape.from_dict(second.plan["teacher_shape"]) == largest(first)
    third = submit(teacher=second.id, budget={"max_fraction": 0.9})
    assert third.plan["teacher_parameters"] < second.plan["teacher_parameters"]


def test_the_plan_is_made_anew_for_the_winner_of_the_budget_that_was_asked_for(store: Store, submit: Callable[..., SearchRecord]) -> None:
    first = submit(more_budgets=[{"max_fraction": 0.5}])
    second = submit(teacher=first.id, teacher_budget=1, budget={"max_fraction": 0.95})
    other = submit(teacher=first.id)
    win(store, first, shape=smallest(first, 1), budget=1)

    taken = take_teacher(second, store=store, data_folder=Path("/data"))

    assert Shape.from_dict(taken.plan["teacher_shape"]) == smallest(first, 1)
    assert taken.plan["max_parameters"] <= 0.95 * taken.plan["teacher_parameters"] < second.plan["max_parameters"]
    assert taken.inputs["teacher"]["path"] == f"/data/searches/{first.id}/winner/bundle"
    assert {name: value for name, value in taken.inputs.items() if name != "teacher"} == {n: v for n, v in second.inputs.items() if n != "teacher"}
    with pytest.raises(TeacherUnavailable, match="expected a winner of budget 0"):
        take_teacher(other, store=store, data_folder=Path("/data"))


def test_the_winner_of_a_search_that_has_ended_is_known_at_once(store: Store, submit: Callable[..., SearchRecord]) -> None:
    first = submit()
    win(store, first, shape=largest(first))

    second = submit(teacher=first.id)

    assert not is_stand_in(second.inputs)
    assert second.inputs["teacher"]["digest"] == "d" * 64
    assert awaited_source(second.inputs) == first.id, "where the files are only the controller knows"


def test_what_has_no_winner_is_refused(store: Store, submit: Callable[..., SearchRecord], check: Callable[..., Submission]) -> None:
    gone = submit()
    store.request_cancel(gone.id)
    old = submit()
    win(store, old, shape=largest(old), as_teacher=None)
    hidden = submit()
    going = submit()
    for teacher, budget, field, got in [
        (gone.id, 0, "teacher", f"{gone.id}, which cancelled"),
        ("srch_0", 0, "teacher", "srch_0"),
        (old.id, 0, "teacher", "got one of an older version"),
        (going.id, 1, "teacher_budget", "1"),
    ]:
        with pytest.raises(InvalidSpec) as refused:
            check(teacher=teacher, teacher_budget=budget)
        (problem,) = refused.value.problems
        assert problem.field == field
        assert got in problem.got
    with pytest.raises(InvalidSpec, match="expected a registered name or the id of a search"):
        check_submission(parse_spec(json.dumps(hidden.spec | {"teacher": hidden.id})), store=store, project="theirs")
    with pytest.raises(InvalidSpec, match="warm_start_from: expected none while the teacher is not known"):
        check(teacher=going.id, warm_start_from=[gone.id])


def test_more_parameters_than_the_winner_may_have_are_refused_before_it_is_known(submit: Callable[..., SearchRecord], check: Callable[..., Submission]) -> None:
    first = submit()
    most = first.plan["budgets"][0]["space"]["largest"]["parameters"]

    with pytest.raises(InvalidSpec, match=r"budget\.max_parameters"):
        check(teacher=first.id, budget={"max_parameters": most})


def test_what_a_user_asks_meanwhile_is_not_overwritten(store: Store, submit: Callable[..., SearchRecord]) -> None:
    first = submit()
    waiting = submit(teacher=first.id)
    win(store, first, shape=largest(first))
    taken = take_teacher(waiting, store=store, data_folder=Path("/data"))
    store.update_search(waiting.id, version=None, labels={"team": "a"})

    def replan(seen: SearchRecord) -> bool:
        return store.replan_search(seen, spec=dump_spec(taken.spec), inputs=taken.inputs, plan=taken.plan, fence=None)

    assert not replan(waiting)
    assert is_stand_in(store.get_search(waiting.id).inputs)
    assert replan(store.get_search(waiting.id))
    assert awaited_source(store.get_search(waiting.id).inputs) is None
