"""Trials that go wrong for good, and what stays on disk, in whole searches on pretended workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.store.records import AttemptState, SearchRecord, SearchState, TrialState, all_winners
from tests.simulation.cluster import Run, Trouble
from tests.simulation.simulator import Simulation, check, make_simulation
from workers import limits
from workers.outcome import Outcome

Make = Callable[..., Simulation]
CALM = Trouble(straggler=0, preempted=0, failed=0, diverged=0, refused=0, unverified=0)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Simulation] = []

    def one(**arguments: Any) -> Simulation:
        made.append(make_simulation(tmp_path / str(len(made)), **{"num_trials": 6, "num_workers": 3, "seed": 1, **arguments}))
        made[-1].cluster.trouble = CALM
        return made[-1]

    yield one
    for simulation in made:
        simulation.close()


def poison(simulation: Simulation, change: Callable[[Run, int], Outcome | None]) -> list[Run]:
    """Replace outcomes: `change` gets each step of a rung and how often this rung of this trial was begun before. Returns what was poisoned."""
    draw, tries, poisoned = simulation.cluster._draw, dict[Any, int](), list[Run]()

    def drawn(step: Any) -> Run:
        run = draw(step)
        count = tries[run.key] = tries.get(run.key, -1) + 1
        if step.stage == "rung" and (outcome := change(run, count)) is not None:
            run.outcome = outcome
            poisoned.append(run)
        return run

    simulation.cluster._draw = drawn  # type: ignore[method-assign]
    return poisoned


def go_on(simulation: Simulation, *states: SearchState) -> SearchRecord:
    while not ((record := simulation.store.get_search(simulation.search_id)).state.is_terminal or record.state in states):
        simulation.controller.tick(timeout_seconds=60.0)
    return record


def test_a_full_disk_pauses_the_search_and_fails_nobody(make: Make) -> None:
    simulation = make()
    is_full = [True]
    full = Outcome(succeeded=False, reason="disk_full", message="OSError: [Errno 28] No space left on device")
    poison(simulation, lambda run, _: full if run.key[2] == 1 and is_full[0] else None)

    paused = go_on(simulation, SearchState.PAUSED)
    assert paused.state is SearchState.PAUSED
    assert paused.error == {"reason": "disk_full", "message": full.message}
    assert not any(trial.state is TrialState.FAILED for trial in simulation.store.list_trials(paused.id))
    assert not any(attempt.state is AttemptState.FAILED for attempt in simulation.store.list_attempts(paused.id))

    is_full[0] = False
    simulation.store.request_resume(paused.id)
    assert go_on(simulation).state is SearchState.SUCCEEDED


def test_a_step_out_of_memory_is_tried_once_more_with_smaller_passes(make: Make) -> None:
    simulation = make()
    out = Outcome(succeeded=False, reason="out_of_memory", message="no room")
    poisoned = poison(simulation, lambda run, count: out if run.key[1:] == (0, 1) or (run.key[1:] == (1, 1) and count == 0) else None)

    search = go_on(simulation)

    assert search.state is SearchState.SUCCEEDED, search.error
    trial = simulation.store.get_trial(search.id, 0)
    assert trial.state is TrialState.FAILED
    assert trial.failure is not None
    assert (trial.failure["reason"], trial.failure["attempts"]) == ("out_of_memory", 2)
    assert [run.step.request["num_halvings"] for run in poisoned if run.key[1] == 0] == [0, 1]
    assert simulation.store.get_trial(search.id, 1).state is not TrialState.FAILED
    again = [run.step.request["num_halvings"] for run in simulation.cluster.history if run.key[1:] == (1, 1)]
    assert again == [0, 1]


def test_a_worker_that_lies_never_gets_onto_the_board(make: Make) -> None:
    simulation = make(limits={"max_attempts": 2, "max_failed_trials": 100})

    def lie(run: Run, _: int) -> Outcome | None:
        if run.key[1] != 2 or run.outcome.result is None:
            return None
        return Outcome(succeeded=True, result={**run.outcome.result, "parameters": 1})

    poison(simulation, lie)

    search = go_on(simulation)

    trial = simulation.store.get_trial(search.id, 2)
    assert trial.failure is not None
    assert (trial.state, trial.failure["reason"], trial.failure["attempts"]) == (TrialState.FAILED, "invalid_result", 2)
    assert simulation.store.list_rungs(search.id, trial=2) == []
    assert search.state is SearchState.SUCCEEDED


@pytest.mark.parametrize("students", ["finalists", "pareto", "best", "none"])
def test_what_the_retention_names_stays_on_disk_and_nothing_else(make: Make, students: str) -> None:
    simulation = make(retention={"students": students}, objectives=["parameters"])

    search = go_on(simulation)

    check(simulation)
    trials = simulation.store.list_trials(search.id)
    folder = simulation.settings.searches_folder / search.id / "trials"
    kept = {int(path.name) for path in folder.iterdir()} if folder.exists() else set()
    verified = {trial.number for trial in trials if (trial.confirmation or {}).get("verified")}
    assert search.board is not None
    expected = {"finalists": verified, "pareto": verified & set(search.board["pareto"]), "best": {won["trial"] for won in all_winners(search)}, "none": set()}
    assert kept == expected[students]
    assert verified


def test_over_its_disk_budget_a_search_pauses_with_the_numbers_and_goes_on_when_there_is_room(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DISK_SECONDS", 0.0)
    simulation = make(limits={"max_disk_bytes": 300_000})
    go_on(simulation, SearchState.SEARCHING)
    huge = simulation.settings.searches_folder / simulation.search_id / "huge"
    huge.write_bytes(b"x" * 400_000)

    paused = go_on(simulation, SearchState.PAUSED)
    assert paused.error is not None
    assert paused.error["reason"] == "disk_budget"
    assert "bytes over limits.max_disk_bytes=300000" in paused.error["message"]

    huge.unlink()
    simulation.store.request_resume(paused.id)
    assert go_on(simulation).state is SearchState.SUCCEEDED


def test_for_the_disk_budget_the_checkpoints_of_the_worst_waiting_trial_go_first(make: Make) -> None:
    simulation = make(num_trials=8)

    def leave_files(run: Run, _: int) -> None:
        folder = Path(run.step.request["trial_folder"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint").write_bytes(b"x" * 1000)

    def waiting() -> list[int]:
        return [trial.number for trial in simulation.store.list_trials(simulation.search_id) if trial.state is TrialState.WAITING and trial.rung]

    poison(simulation, leave_files)
    while len(waiting()) < 2:
        simulation.controller.tick(timeout_seconds=10.0)
    simulation.controller.tick(timeout_seconds=0.0)
    results, numbers = simulation.run.results, waiting()
    worst = max(numbers, key=lambda number: results[number][max(results[number])].kl.value)

    use = simulation.conductor.folder.measure().result()
    assert simulation.conductor._books.free_disk(limits.Excess(num_bytes=1, use=use)) >= 1000

    assert {number for number in numbers if not simulation.conductor.folder.trial(number).exists()} == {worst}
    assert go_on(simulation).state is SearchState.SUCCEEDED
