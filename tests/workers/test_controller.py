"""A whole search under the real controller on a real store; steps run in this process, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from nas.errors import StoreUnavailable
from nas.spec import parse_spec
from nas.store.records import AttemptState, SearchRecord, SearchState, TrialState
from tests.workers.inline_service import Service
from workers.controller import Controller


@pytest.mark.usefixtures("fresh_process")
def test_a_search_runs_to_its_bundle(service: Service) -> None:
    search_id = service.submit(controls={"anchors": False, "num_random": 1})

    search = service.run(search_id)

    assert search.state is SearchState.SUCCEEDED, search.error
    board = service.board(search)
    assert search.winner is not None
    trials = service.store.list_trials(search_id)
    assert all(trial.state in (TrialState.COMPLETED, TrialState.STOPPED) for trial in trials)
    assert sorted(row["number"] for row in board["rows"]) == [trial.number for trial in trials]
    assert {row["number"]: row["state"] for row in board["rows"]} == {trial.number: trial.state for trial in trials}
    finalists = [row for row in board["rows"] if row["number"] in board["finalists"]]
    assert all(row["verified"] and row["confirmation"]["deployability"]["tensor_parallel_sizes"][0] == 1 for row in finalists)
    assert sum(row["probability_best"] for row in finalists) == pytest.approx(1.0)
    assert search.winner["trial"] == board["winner"] == board["leader"] in board["finalists"]
    assert "documents" not in {key for row in board["rows"] for key in _keys(row)}
    assert (service.settings.data_folder / search.winner["bundle"]).is_file()
    assert all(attempt.state is AttemptState.SUCCEEDED for attempt in service.store.list_attempts(search_id))
    assert service.store.list_points(search_id, trial=search.winner["trial"])


def _keys(value: Any) -> Iterator[str]:
    for key, item in value.items() if isinstance(value, dict) else ():
        yield key
        yield from _keys(item)


def test_a_repeat_is_the_same_shape_trained_in_another_order_and_stands_apart(service: Service) -> None:
    search = service.run(service.submit(sampler={"name": "random", "max_trials": 1}, controls={"num_repeats": 1}))

    assert search.state is SearchState.SUCCEEDED, search.error
    board, trials = service.board(search), service.store.list_trials(search.id)
    repeat = next(trial for trial in trials if trial.origin == "repeat:1")
    anchor = next(trial for trial in trials if trial.shape == repeat.shape)
    assert sorted(row["number"] for row in board["rows"]) == [trial.number for trial in trials if trial is not repeat]
    (shown,) = board["repeats"]
    assert (shown["number"], shown["seed"], shown["rung"]) == (repeat.number, search.spec["seed"] + 1, 2)
    ours, theirs = shown["kl_by_rung"], next(row["kl_by_rung"] for row in board["rows"] if row["number"] == anchor.number)
    assert ours[0] == theirs[0]
    assert all(one != other for one, other in zip(ours[1:], theirs[1:], strict=True))
    assert [spread["num_runs"] for spread in board["seed_spreads"]] == [2, 2]
    assert board["seed_spread"] == board["seed_spreads"][-1]["value"] != search.spec["rungs"]["seed_spread"]
    assert repeat.confirmation is None


def test_what_each_decision_cost_adds_up(service: Service) -> None:
    sampler = {"name": "random", "max_trials": 8, "num_startup_trials": 2}
    rungs = {"first_tokens": 512, "factor": 2, "num_trained": 1, "keep": 0.5, "keep_untrained": 1.0}
    search = service.run(service.submit(sampler=sampler, rungs=rungs, controls={"anchors": False, "num_random": 0}))

    board = service.board(search)
    assert sum(board["importances"].values()) == pytest.approx(1.0)
    assert "mlp_fill" in board["importances"]
    cost = board["cost"]
    decisions = cost["decisions"]
    spec = parse_spec(json.dumps(search.spec))
    assert [decision["decision"] for decision in decisions] == [*(f"rung {rung}" for rung in range(spec.rungs.num_trained + 1)), "confirm"]
    assert [decision["trials"] for decision in decisions[:1]] == [8]
    assert [decision["chosen"] for decision in decisions[:-2]] == [decision["trials"] for decision in decisions[1:-1]]
    assert decisions[-1]["chosen"] == 1
    assert cost["tokens"] == sum(decision["tokens"] for decision in decisions) > 0
    prepare = cost["seconds"]["prepare"] * spec.resources.cpus
    assert cost["device_seconds"] == pytest.approx(prepare + sum(decision["device_seconds"] for decision in decisions))
    assert decisions[-1]["device_seconds"] > 0


@pytest.mark.parametrize("num_rungs", [1, 4, 7])
def test_a_search_that_was_interrupted_ends_like_one_that_was_not(service: Service, undisturbed: list[list[Any]], num_rungs: int) -> None:
    if not undisturbed:
        undisturbed.append(figures(service, service.run(service.submit())))
        service.expire_lease()
    search_id = service.submit()
    service.run(search_id, until=lambda record: len(service.store.list_rungs(record.id)) >= num_rungs)
    service.expire_lease()

    interrupted = service.run(search_id)

    assert figures(service, interrupted) == undisturbed[0]
    attempts = [(attempt.stage, attempt.trial, attempt.rung) for attempt in service.store.list_attempts(search_id) if attempt.state is AttemptState.SUCCEEDED]
    assert len(attempts) == len(set(attempts))


@pytest.fixture(scope="module")
def undisturbed() -> list[list[Any]]:
    """The figures of the search that nothing interrupted, once it was run."""
    return []


def figures(service: Service, search: SearchRecord) -> list[Any]:
    return [(row["number"], row["rank"], row["shape"], row["score"], row["kl"], row["loss"], row["state"]) for row in service.board(search)["rows"]]


def test_a_bug_in_one_search_fails_it_and_leaves_the_others_alone(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers import controller as module
    from workers.search_run import SearchRun

    monkeypatch.setattr(module, "TROUBLE_SECONDS", 0.05)
    broken, sound = service.submit(), service.submit(sampler={"name": "random", "max_trials": 1})
    next_action = SearchRun.next_action

    def raise_for_one(run: SearchRun) -> Any:
        if run.id == broken:
            raise ZeroDivisionError("a bug")
        return next_action(run)

    monkeypatch.setattr(SearchRun, "next_action", raise_for_one)

    search = service.run(sound)

    assert search.state is SearchState.SUCCEEDED
    failed = service.store.get_search(broken)
    assert failed.state is SearchState.FAILED
    assert failed.error == {"reason": "internal_error", "message": "ZeroDivisionError: a bug"}


def test_a_store_that_is_away_for_a_moment_fails_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers import controller as module

    monkeypatch.setattr(module, "TROUBLE_SECONDS", 0.05)
    search_id = service.submit(sampler={"name": "random", "max_trials": 1})
    record, away = service.store.record_rung, iter([True, False, True])

    def record_or_raise(*arguments: Any, **named: Any) -> Any:
        if next(away, False):
            raise OSError("connection reset")
        return record(*arguments, **named)

    monkeypatch.setattr(service.store, "record_rung", record_or_raise)

    assert service.run(search_id).state is SearchState.SUCCEEDED
    assert all(attempt.state is AttemptState.SUCCEEDED for attempt in service.store.list_attempts(search_id))


def test_a_store_that_refuses_one_searchs_writes_for_long_fails_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: what is small still fits, and a rung's result does not."""
    from workers import controller as module

    monkeypatch.setattr(module, "TROUBLE_SECONDS", 0.02)
    search_id = service.submit(sampler={"name": "random", "max_trials": 1})
    record, refusals = service.store.record_rung, iter(range(3 * module.MAX_TROUBLES))

    def record_or_raise(*arguments: Any, **named: Any) -> Any:
        if next(refusals, None) is not None:
            raise StoreUnavailable("the database does not answer")
        return record(*arguments, **named)

    monkeypatch.setattr(service.store, "record_rung", record_or_raise)

    assert service.run(search_id).state is SearchState.SUCCEEDED
    assert next(refusals, None) is None


def test_a_store_that_stays_away_ends_the_controller(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers import controller as module

    monkeypatch.setattr(module, "STORE_PATIENCE_SECONDS", 0.2)
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("connection refused")

    monkeypatch.setattr(service.store, "active_searches", refuse)

    with pytest.raises(OSError, match="connection refused"):
        controller.run()
    assert service.executor.closed


def test_a_search_whose_lease_is_lost_is_dropped_with_its_steps_and_the_others_go_on(service: Service) -> None:
    lost, kept = service.submit(), service.submit(seed=1)
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)
    while len(service.executor.steps) < 2:
        controller.tick(timeout_seconds=0.0)
        service.executor.wait = lambda timeout_seconds: []  # type: ignore[method-assign]
    service.expire_lease()
    assert service.store.claim(lost, owner="another", seconds=60) is not None
    events = service.store.list_events(lost)

    controller.tick(timeout_seconds=0.0)

    assert [step.folder.split("/")[-3] for step in service.executor.steps] == [kept]
    assert service.store.list_events(lost) == events
    assert set(controller._conductors) == {kept}


def test_a_search_is_dropped_when_a_write_is_refused_before_the_lease_was_looked_at(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    search_id = service.submit()
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)
    controller.tick(timeout_seconds=0.0)
    monkeypatch.setattr(service.store, "renew", lambda record, seconds: list(controller._membership.fences.values()))
    service.expire_lease()
    assert service.store.claim(search_id, owner="another", seconds=60) is not None

    while controller._conductors:
        controller.tick(timeout_seconds=0.0)

    assert service.executor.steps == []
    assert service.store.get_search(search_id).state is SearchState.PREPARING


def test_two_searches_never_fill_one_prepared_folder_together(service: Service) -> None:
    first, second = service.submit(), service.submit()
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)
    for _ in range(3):
        controller.tick(timeout_seconds=0.0)
        assert sum(step.stage == "prepare" for step in service.executor.steps) <= 1
    assert {service.store.get_search(search_id).state for search_id in (first, second)} != {SearchState.QUEUED}
