"""Kept numbers of trials are those that counting gives, whatever happened to the trials."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from sqlalchemy import delete

from nas.errors import Conflict
from nas.store.records import AttemptState, SearchRecord, TrialRecord, TrialState
from nas.store.store import Store
from nas.store.tables import trial_counts
from tests.store.store_values import result

NewSearch = Callable[..., SearchRecord]
NewTrial = Callable[..., TrialRecord]


def counted(store: Store, search_id: str) -> dict[tuple[TrialState, int], int]:
    return Counter((trial.state, 0 if trial.rung is None else trial.rung + 1) for trial in store.list_trials(search_id))


def kept(store: Store, search_id: str) -> dict[tuple[TrialState, int], int]:
    return {cell: number for cell, number in store.trial_counts([search_id])[search_id].cells.items() if number}


def test_whatever_happens_to_trials_the_numbers_stay_right(store: Store, new_search: NewSearch, new_trial: NewTrial) -> None:
    draw, searches = random.Random(0), [new_search(), new_search()]
    for step in range(60):
        search = draw.choice(searches)
        trials = store.list_trials(search.id)
        if not trials or draw.random() < 0.3:
            new_trial(search, len(trials))
            continue
        trial = draw.choice(trials)
        try:
            match draw.choice(["finish", "lose", "stop", "fail", "retry"]):
                case "finish":
                    attempt = store.start_attempt(search.id, stage="rung", trial=trial.number, rung=(trial.rung or 0) + (trial.rung is not None), fence=None)
                    assert attempt.rung is not None
                    to = draw.choice([TrialState.WAITING, TrialState.COMPLETED])
                    values = {"result": result(tokens=step), "trial_state": to, "fence": None}
                    store.record_rung(attempt.id, search_id=search.id, trial=trial.number, rung=attempt.rung, **values)
                case "lose":
                    attempt = store.start_attempt(search.id, stage="rung", trial=trial.number, rung=(trial.rung or 0) + (trial.rung is not None), fence=None)
                    if draw.random() < 0.5:
                        store.finish_attempt(attempt.id, state=AttemptState.LOST, reason=None, fence=None)
                case "stop":
                    store.change_trial(search.id, trial.number, to=TrialState.STOPPED, fence=None)
                case "fail":
                    store.change_trial(search.id, trial.number, to=TrialState.FAILED, fence=None, failure={"reason": "x"})
                case "retry":
                    store.retry_trial(search.id, trial.number)
        except Conflict:
            pass  # not allowed in its state: then nothing may have changed
        assert kept(store, search.id) == counted(store, search.id)
    assert all(sum(counted(store, search.id).values()) > 5 for search in searches)


def test_numbers_say_how_many_have_finished_each_rung(store: Store, new_search: NewSearch, new_trial: NewTrial, finish_rung: Callable[..., object]) -> None:
    search = new_search()
    for number, num_rungs in enumerate((0, 1, 1, 2)):
        trial = new_trial(search, number)
        for rung in range(num_rungs):
            finish_rung(trial, rung)
    store.start_attempt(search.id, stage="rung", trial=3, rung=2, fence=None)

    counts = store.trial_counts([search.id])[search.id]

    assert [counts.finished(rung) for rung in range(3)] == [3, 1, 0]
    assert [counts.running(rung) for rung in range(3)] == [0, 0, 1]
    assert counts.by_state == dict.fromkeys(TrialState, 0) | {TrialState.WAITING: 3, TrialState.RUNNING: 1}


def test_what_an_older_version_left_out_is_counted_again(store: Store, new_search: NewSearch, new_trial: NewTrial) -> None:
    search, other = new_search(), new_search()
    for number in range(3):
        new_trial(search, number)
    new_trial(other, 0)
    with store.write(fence=None) as connection:
        connection.execute(delete(trial_counts).where(trial_counts.c.search_id == search.id))

    store.recount_trials(search.id, fence=None)

    assert [kept(store, one.id) for one in (search, other)] == [{(TrialState.WAITING, 0): 3}, {(TrialState.WAITING, 0): 1}]
