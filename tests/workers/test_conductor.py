"""What becomes of one search under the real controller, whose workers are replaced by this process."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import pytest

from nas.compress.teacher import check_teacher
from nas.spec import parse_spec
from nas.store.records import AttemptState, SearchRecord, SearchState, TrialState, all_winners
from tests.workers.inline_service import RUNGS, Service
from workers.controller import Controller
from workers.outcome import Outcome
from workers.step import Step


def test_an_ended_search_leaves_its_bundle_and_the_students_that_were_verified(service: Service) -> None:
    search_id = service.submit(sampler={"name": "random", "max_trials": 1})

    service.run(search_id)

    assert sorted(path.name for path in service.folder(search_id).iterdir() if path.is_file() or any(path.iterdir())) == ["trials", "winner"]
    kept = {int(path.name) for path in (service.folder(search_id) / "trials").iterdir()}
    assert kept == {trial.number for trial in service.store.list_trials(search_id) if trial.confirmation and trial.confirmation["verified"]}


def test_a_cancelled_search_ends_with_every_trial_cancelled_or_finished(service: Service) -> None:
    search_id = service.submit()
    service.run(search_id, until=lambda record: len(service.store.list_rungs(record.id)) >= 2)
    service.expire_lease()
    service.store.request_cancel(search_id)

    search = service.run(search_id)

    assert search.state is SearchState.CANCELLED
    assert all(trial.state.is_terminal for trial in service.store.list_trials(search_id))
    assert any(trial.state is TrialState.CANCELLED for trial in service.store.list_trials(search_id))
    assert not (service.folder(search_id) / "trials").exists()


def test_a_cancel_between_two_writes_does_not_end_the_controller(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    search_id = service.submit()
    change = service.store.change_search

    def cancel_first(search: str, **arguments: Any) -> SearchRecord:
        if arguments["to"] is SearchState.SEARCHING:
            service.store.request_cancel(search_id)
        return change(search, **arguments)

    monkeypatch.setattr(service.store, "change_search", cancel_first)

    assert service.run(search_id).state is SearchState.CANCELLED


def test_a_search_with_too_many_failed_trials_fails_with_their_reasons(service: Service) -> None:
    search_id = service.submit(limits={"max_failed_trials": 2, "max_attempts": 1})
    service.executor.before = lambda step: Outcome(succeeded=False, reason="error", message="boom") if step.stage == "rung" else None

    search = service.run(search_id)

    assert search.state is SearchState.FAILED
    assert search.error is not None
    assert search.error["reason"] == "too_many_failed_trials"
    assert "trial 0: error" in search.error["message"]
    assert all(trial.state.is_terminal for trial in service.store.list_trials(search_id))


def test_a_teacher_no_better_than_random_weights_is_refused_before_any_trial(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    save = service.store.save_prepared
    monkeypatch.setattr(service.store, "save_prepared", lambda search, facts, **named: save(search, {**facts, "teacher": facts["random"]}, **named))
    search_id = service.submit()

    search = service.run(search_id)

    assert search.state is SearchState.FAILED
    assert search.error is not None
    assert search.error["reason"] == "spec_refused"
    assert "a task on which the teacher is better than random weights by 2 standard errors" in search.error["message"]
    (weak,) = [event.data for event in service.store.list_events(search_id) if event.type == "task.weak"]
    assert (weak["task"], weak["in_objective"]) == ("choice", False)
    assert service.store.list_trials(search_id) == []


def test_a_search_that_starts_from_another_trains_no_shape_twice(service: Service) -> None:
    earlier = service.submit()
    won = service.run(earlier).winner
    assert won is not None
    stopped = next(trial for trial in service.store.list_trials(earlier) if trial.state is TrialState.STOPPED and trial.rung == 1)
    service.expire_lease()
    service.executor.history.clear()

    search_id = service.submit(warm_start_from=[earlier], shapes=[won["shape"], stopped.shape])
    search = service.run(search_id)

    assert search.state is SearchState.SUCCEEDED, search.error
    # The winner's student is still there; the stopped one goes on from the rung that it had reached.
    assert [service.executor.ran(trial=0, rung=rung) for rung in range(3)] == [0, 0, 0]
    assert [service.executor.ran(trial=1, rung=rung) for rung in range(3)] == [0, 0, 1]
    before = {row.rung: row.result for row in service.store.list_rungs(earlier, trial=won["trial"])}
    origin = {"search": earlier, "trial": won["trial"]}
    for row in service.store.list_rungs(search_id, trial=0):
        # Costs are those under the workload of the search that asks.
        assert row.result == before[row.rung] | {"seconds": {}, "reused_from": origin, "costs": row.result["costs"]}
    events = [event.data for event in service.store.list_events(search_id, after=0) if event.type == "trial.rung_finished" and event.data["trial"] == 0]
    assert [data["reused_from"] for data in events] == [origin] * 3
    confirmation = service.store.get_trial(search_id, 0).confirmation
    assert confirmation is not None
    assert confirmation["verified"]
    spec = parse_spec(json.dumps(search.spec))
    trained = [step for step in service.executor.history if step.stage == "rung" and step.request["rung"] > 0]
    from_start = [step for step in trained if step.request["rung"] == 2 and step.request["trial_folder"].endswith("/1")]
    tokens = spec.rungs.tokens(2) * len(from_start) + sum(spec.trained_tokens(step.request["rung"]) for step in trained if step not in from_start)
    board = service.board(search)
    assert board["cost"]["tokens"] == tokens


def test_a_shape_over_a_latency_ceiling_ends_at_rung_0_and_is_no_failure(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_costs(model: Any, **_: Any) -> dict[str, float]:
        return {"decode_ms:chat": 1.0 + (model.config.num_hidden_layers > 1), "prefill_ms:chat": 1.0}

    monkeypatch.setattr("nas.search.trial.measured_costs", fake_costs)
    chat = {"name": "chat", "prompt_tokens": 4, "new_tokens": 2, "max_decode_ms": 1.5}
    space = {"num_hidden_layers": {"min": 1}}
    search = service.run(service.submit(budget={"max_fraction": 0.9, "latency": [chat]}, space=space, limits={"max_failed_trials": 1}))

    trials = {trial.number: trial for trial in service.store.list_trials(search.id)}
    dear = [trial for trial in trials.values() if trial.shape["num_hidden_layers"] > 1]
    assert search.state is SearchState.SUCCEEDED
    assert search.winner is not None
    assert trials[search.winner["trial"]].shape["num_hidden_layers"] == 1
    assert dear
    assert {(trial.state, trial.rung) for trial in dear} == {(TrialState.STOPPED, 0)}
    assert {trial.failure["message"] for trial in dear if trial.failure} == {"decode_ms:chat: expected at most 1.5 ms, got 2 ms"}
    rows = {row["number"]: row["costs"] for row in service.board(search)["rows"]}
    assert all({"parameters", "memory_bytes", "flops_per_token", "decode_ms:chat", "prefill_ms:chat"} == costs.keys() for costs in rows.values())


def test_a_search_whose_shapes_are_all_too_slow_says_so(service: Service) -> None:
    chat = {"name": "chat", "prompt_tokens": 4, "new_tokens": 2, "max_prefill_ms": 1e-6}
    search = service.run(service.submit(budget={"max_fraction": 0.7, "latency": [chat]}, sampler={"max_trials": 1}))

    assert search.state is SearchState.FAILED
    assert search.error is not None
    assert search.error["reason"] == "no_trial_completed"
    assert "over a measured ceiling (trial 0: prefill_ms:chat: expected at most 1e-06 ms" in search.error["message"]


def test_a_family_has_a_winner_and_a_bundle_for_each_budget(service: Service) -> None:
    """The first budget's board is the search's; each of the others has its own board, ranks and winner."""
    search = service.run(service.submit(budget={"max_fraction": 0.8}, more_budgets=[{"max_fraction": 0.5}], sampler={"name": "random", "max_trials": 2}))

    assert search.state is SearchState.SUCCEEDED, search.error
    board = service.board(search)
    assert search.winner is not None
    trials = {trial.number: trial for trial in service.store.list_trials(search.id)}
    boards = [board, *board["more_budgets"]]
    winners = all_winners(search)
    assert [winner["budget"] for winner in winners] == [0, 1]
    assert [winner["trial"] for winner in winners] == board["winners"] == [its["winner"] for its in boards]
    for budget, (its, winner) in enumerate(zip(boards, winners, strict=True)):
        assert {trials[row["number"]].budget for row in its["rows"]} == {budget}
        assert its["rows"][0]["rank"] == 1
        assert (service.settings.data_folder / winner["bundle"]).is_file()
        assert its["importances"] == winner["importances"]
    told = [event.data for event in service.store.list_events(search.id, limit=10_000) if event.type == "search.winner"]
    assert told == [{"trial": winner["trial"], "budget": winner["budget"]} for winner in winners]
    assert winners[1]["parameters"] <= 0.5 * search.plan["teacher_parameters"] < winners[0]["parameters"]
    assert board["cost"]["decisions"][0]["trials"] == len(trials)


def test_with_several_objectives_the_whole_front_is_confirmed_and_the_winner_scores_best_of_the_finalists(service: Service) -> None:
    search = service.run(
        service.submit(objectives=["parameters"], sampler={"name": "nsga2", "max_trials": 6, "num_startup_trials": 2}, rungs={**RUNGS, "keep": 1.0})
    )

    assert search.state is SearchState.SUCCEEDED, search.error
    board = service.board(search)
    assert search.winner is not None
    rows = {row["number"]: row for row in board["rows"]}
    front = board["pareto"]
    assert len(front) >= 1
    assert all(rows[number]["confirmation"]["verified"] for number in front)
    assert [rows[number]["parameters"] for number in front] == sorted(rows[number]["parameters"] for number in front)
    assert search.winner["trial"] in board["finalists"]


def test_a_search_waits_for_its_teacher_to_win_and_then_prunes_it_again(service: Service) -> None:
    first = service.submit(sampler={"name": "random", "max_trials": 1})
    tasks = [{"name": "choice", "insist": True}]  # a tiny winner knows next to nothing
    second = service.submit(teacher=first, tasks=tasks, budget={"max_fraction": 0.9}, sampler={"name": "random", "max_trials": 1})

    service.run(first)
    waiting = service.store.get_search(second)
    assert (waiting.state, waiting.started_at) == (SearchState.QUEUED, None)
    service.expire_lease()
    search = service.run(second)

    assert search.state is SearchState.SUCCEEDED, search.error
    won, again = service.store.get_search(first).winner, search.winner
    assert won is not None
    assert again is not None
    bundle = (service.settings.data_folder / won["bundle"]).with_suffix("")
    assert search.inputs["teacher"]["digest"] == won["as_teacher"]["digest"] == check_teacher(bundle).digest
    assert search.plan["teacher_parameters"] == won["parameters"]
    assert again["parameters"] <= search.plan["max_parameters"] == math.floor(0.9 * won["parameters"])
    assert again["provenance"]["teacher"] == {"name": first, "digest": won["as_teacher"]["digest"]}
    assert [event.data for event in service.store.list_events(second) if event.type == "search.teacher_known"] == [
        {"search": first, "parameters": won["parameters"]}
    ]


def test_a_search_whose_teacher_never_wins_fails_and_says_so(service: Service) -> None:
    first = service.submit()
    waiting = service.submit(teacher=first)
    chained = service.submit(teacher=waiting)
    service.store.request_cancel(first)

    search = service.run(chained)

    assert [service.store.get_search(search_id).state for search_id in (waiting, chained)] == [SearchState.FAILED] * 2
    assert search.error is not None
    assert search.error["reason"] == "teacher_unavailable"
    assert waiting in search.error["message"]


def test_a_waiting_search_is_paused_and_cancelled_as_any_that_is_queued(service: Service) -> None:
    first = service.submit()
    service.store.request_pause(first)
    waiting = service.submit(teacher=first)
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)
    for _ in range(3):
        controller.tick(timeout_seconds=0.0)
    assert service.store.get_search(waiting).state is SearchState.QUEUED

    assert service.store.request_pause(waiting).state is SearchState.PAUSED
    controller.tick(timeout_seconds=0.0)
    assert service.store.request_cancel(waiting).state is SearchState.CANCELLED
    assert service.executor.history == []


def test_what_the_winner_cannot_be_pruned_to_fails_the_search_that_waited(service: Service) -> None:
    first = service.submit(sampler={"name": "random", "max_trials": 1})
    largest = service.store.get_search(first).plan["budgets"][0]["space"]["largest"]["parameters"]
    second = service.submit(teacher=first, budget={"max_parameters": largest - 1})

    search = service.run(second)

    won = service.store.get_search(first).winner
    assert won is not None
    assert won["parameters"] < largest - 1, "the case that is tested"
    assert search.error is not None
    assert search.error["reason"] == "spec_refused"
    assert "budget.max_parameters" in search.error["message"]


@pytest.mark.parametrize("gone_at", ["rung", "confirm", "bundle"])
def test_a_prepared_folder_that_is_gone_is_made_again_and_costs_no_trial(service: Service, gone_at: str) -> None:
    changes: dict[str, Any] = {"sampler": {"name": "random", "max_trials": 2}}
    undisturbed = service.run(service.submit(**changes))
    shared = service.settings.prepared_folder.resolve()
    service.settings.prepared_folder.unlink()
    service.settings.prepared_folder.mkdir()
    shutil.copytree(shared, service.settings.prepared_folder, dirs_exist_ok=True)
    lost: list[str] = []

    def lose(step: Step) -> None:
        if step.stage == gone_at and not lost:
            lost.append(step.key)
            shutil.rmtree(step.request["prepared"])

    service.executor.before = lose
    search_id = service.submit(**changes)

    search = service.run(search_id)

    assert search.state is SearchState.SUCCEEDED
    assert search.winner is not None
    assert undisturbed.winner is not None
    assert search.winner["trial"] == undisturbed.winner["trial"]
    assert [row.result["kl"] for row in service.store.list_rungs(search_id)] == [row.result["kl"] for row in service.store.list_rungs(undisturbed.id)]
    assert [trial.failure for trial in service.store.list_trials(search_id) if trial.failure] == []
    hit = next(attempt for attempt in service.store.list_attempts(search_id) if attempt.id == lost[0])
    assert hit.state is AttemptState.LOST
    assert (hit.reason or "").startswith("not_prepared")
    assert [event.type for event in service.store.list_events(search_id)].count("search.prepared") == 1


def test_a_prepared_folder_that_no_step_finds_fails_the_trial_in_the_end(service: Service) -> None:
    search_id = service.submit(limits={"max_preemptions": 2, "max_failed_trials": 1})
    gone = Outcome(succeeded=False, reason="not_prepared", message="NotPrepared: gone")
    service.executor.before = lambda step: gone if step.stage == "rung" else None

    search = service.run(search_id)

    assert search.state is SearchState.FAILED
    assert search.error is not None
    assert "without its prepared folder 2 times" in str([trial.failure for trial in service.store.list_trials(search_id)])
