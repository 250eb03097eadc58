from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from nas.errors import Conflict, InvalidSpec, NotFound
from nas.store.records import AttemptRecord, AttemptState, PointRecord, SearchRecord, TrialRecord, TrialState
from nas.store.store import Store
from tests.store.store_values import result, shape

NewTrial = Callable[..., TrialRecord]
FinishRung = Callable[..., AttemptRecord]


@pytest.fixture
def search(new_search: Callable[..., SearchRecord]) -> SearchRecord:
    return new_search()


@pytest.fixture
def trial(search: SearchRecord, new_trial: NewTrial) -> TrialRecord:
    return new_trial(search, 0)


def event_types(store: Store, search: SearchRecord) -> list[str]:
    return [event.type for event in store.list_events(search.id, after=1)]


class TestTrials:
    def test_a_proposed_trial_waits(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        assert (trial.state, trial.rung, trial.failure, trial.choices) == (TrialState.WAITING, None, None, {"mlp_fill": 0.5})
        assert store.get_trial(search.id, 0) == trial
        assert store.list_trials(search.id) == [trial]
        assert event_types(store, search) == ["trial.proposed"]

    def test_a_trial_belongs_to_the_budget_it_was_proposed_for(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        added = store.add_trial(search.id, number=1, origin="user", shape=shape(hidden_size=32), choices=None, parameters=9, budget=2, fence=None)

        assert (trial.budget, added.budget) == (0, 2)
        assert [kept.budget for kept in store.list_trials(search.id)] == [0, 2]

    @pytest.mark.parametrize("number", [1, -1, 2**31, 10**30])
    def test_an_unknown_number_is_not_found_whatever_its_size(self, store: Store, trial: TrialRecord, number: int) -> None:
        with pytest.raises(NotFound, match="trial: expected the number of one"):
            store.get_trial(trial.search_id, number)

    def test_a_taken_number_is_refused(self, search: SearchRecord, trial: TrialRecord, new_trial: NewTrial) -> None:
        with pytest.raises(Conflict, match=r"trial 0 .*expected a new number"):
            new_trial(search, 0, shape=shape(hidden_size=32))

    def test_a_shape_that_was_proposed_is_refused(self, search: SearchRecord, trial: TrialRecord, new_trial: NewTrial) -> None:
        reordered = dict(reversed(trial.shape.items()))
        with pytest.raises(Conflict, match=r"trial 1 .*expected a new shape, got that of trial 0"):
            new_trial(search, 1, shape=reordered)

    def test_a_repeat_has_the_shape_of_another_trial_and_each_is_made_once(self, search: SearchRecord, trial: TrialRecord, new_trial: NewTrial) -> None:
        repeats = [new_trial(search, number, origin=f"repeat:{number}", shape=trial.shape) for number in (1, 2)]

        assert [repeat.shape for repeat in repeats] == [trial.shape] * 2
        with pytest.raises(Conflict, match=r"trial 3 .*got that of trial 2"):
            new_trial(search, 3, origin="repeat:2", shape=trial.shape)

    def test_another_search_may_propose_the_same_shape(self, new_search: Callable[..., SearchRecord], trial: TrialRecord, new_trial: NewTrial) -> None:
        assert new_trial(new_search(), 0).shape == trial.shape

    def test_an_impossible_shape_is_refused(self, search: SearchRecord, new_trial: NewTrial) -> None:
        with pytest.raises(InvalidSpec, match="num_attention_heads"):
            new_trial(search, 0, shape=shape(num_attention_heads=3))

    def test_of_proposals_of_one_shape_at_the_same_time_one_is_made(self, store: Store, search: SearchRecord, new_trial: NewTrial) -> None:
        def propose(number: int) -> bool:
            try:
                new_trial(search, number, shape=shape())
            except Conflict:
                return False
            return True

        with ThreadPoolExecutor(6) as pool:
            assert sum(pool.map(propose, range(6))) == 1
        assert len(store.list_trials(search.id)) == 1

    def test_a_failure_is_kept_with_its_event(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        failure = {"stage": "rung", "reason": "oom", "message": "out of memory", "attempts": 3}
        failed = store.change_trial(search.id, 0, to=TrialState.FAILED, fence=None, failure=failure)

        assert (failed.state, failed.failure) == (TrialState.FAILED, failure)
        assert store.list_events(search.id)[-1].data == {"trial": 0, "failure": failure}

    def test_moving_a_trial_to_where_it_stands_does_nothing(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        stopped = store.change_trial(search.id, 0, to=TrialState.STOPPED, fence=None)

        assert store.change_trial(search.id, 0, to=TrialState.STOPPED, fence=None) == stopped
        assert event_types(store, search) == ["trial.proposed", "trial.stopped"]

    @pytest.mark.parametrize("state", [state for state in TrialState if state.is_terminal])
    def test_a_terminal_state_is_never_left(self, store: Store, trial: TrialRecord, state: TrialState) -> None:
        store.change_trial(trial.search_id, 0, to=state, fence=None)

        for to in set(TrialState) - {state}:
            with pytest.raises(Conflict, match=f"expected one that has not ended, got state {state}"):
                store.change_trial(trial.search_id, 0, to=to, fence=None)


class TestAttempts:
    def test_a_rung_attempt_makes_its_trial_run(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=None)

        assert store.get_trial(search.id, 0).state is TrialState.RUNNING
        assert store.list_attempts(search.id, trial=0) == [attempt]
        assert store.list_events(search.id)[-1].type == "trial.started"

    def test_a_trial_that_runs_is_not_started_again(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=None)

        with pytest.raises(Conflict, match="expected state waiting, got running"):
            store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=None)

    def test_prepare_and_confirm_leave_the_trials_alone(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        store.change_trial(search.id, 0, to=TrialState.COMPLETED, fence=None)
        prepare = store.start_attempt(search.id, stage="prepare", trial=None, rung=None, fence=None)
        confirm = store.start_attempt(search.id, stage="confirm", trial=0, rung=None, fence=None)
        for attempt in (prepare, confirm):
            store.finish_attempt(attempt.id, state=AttemptState.SUCCEEDED, reason=None, fence=None)

        assert store.get_trial(search.id, 0).state is TrialState.COMPLETED
        assert event_types(store, search)[-4:] == ["attempt.started", "attempt.started", "attempt.succeeded", "attempt.succeeded"]

    def test_a_failed_attempt_lets_its_trial_wait_again(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=1, fence=None)
        ended = store.finish_attempt(attempt.id, state=AttemptState.FAILED, reason="worker died\0\ud800", fence=None)

        assert (ended.state, ended.reason) == (AttemptState.FAILED, "worker died\ufffd\ufffd")
        assert ended.finished_at is not None
        assert store.get_trial(search.id, 0).state is TrialState.WAITING
        assert store.list_events(search.id)[-1].data == {"attempt": attempt.id, "stage": "rung", "trial": 0, "rung": 1, "reason": ended.reason}

    def test_an_attempt_ends_once(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=None)

        def finish(_: int) -> bool:
            try:
                store.finish_attempt(attempt.id, state=AttemptState.FAILED, reason="x", fence=None)
            except Conflict:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(finish, range(4))) == 1

    def test_an_unknown_attempt_is_not_found(self, store: Store) -> None:
        with pytest.raises(NotFound, match="attempt: expected the id of one, got 'att_x'"):
            store.finish_attempt("att_x", state=AttemptState.FAILED, reason=None, fence=None)

    def test_a_restart_loses_what_runs_and_nothing_else(
        self, store: Store, new_search: Callable[..., SearchRecord], new_trial: NewTrial, finish_rung: FinishRung
    ) -> None:
        searches = [new_search(), new_search()]
        running = []
        for search in searches:
            finish_rung(new_trial(search, 0), 0)
            new_trial(search, 1)
            running.append(store.start_attempt(search.id, stage="rung", trial=1, rung=0, fence=None))
        running.append(store.start_attempt(searches[1].id, stage="prepare", trial=None, rung=None, fence=None))

        lost = [attempt for search in searches for attempt in store.lose_running_attempts(search.id, fence=None)]

        assert {attempt.id for attempt in lost} == {attempt.id for attempt in running}
        assert {attempt.state for attempt in lost} == {AttemptState.LOST}
        for search in searches:
            assert [trial.state for trial in store.list_trials(search.id)] == [TrialState.WAITING] * 2
            assert [attempt.state for attempt in store.list_attempts(search.id, trial=0)] == [AttemptState.SUCCEEDED]
            assert store.lose_running_attempts(search.id, fence=None) == []


class TestResults:
    def test_a_rung_its_attempt_its_trial_and_its_event_go_together(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=1, fence=None)
        values = result(tokens=4000, loss=1.5)
        record = store.record_rung(attempt.id, search_id=search.id, trial=0, rung=1, result=values, trial_state=TrialState.COMPLETED, fence=None)

        assert store.list_rungs(search.id) == [record]
        assert record.result == values
        assert store.list_attempts(search.id)[0].state is AttemptState.SUCCEEDED
        after = store.get_trial(search.id, 0)
        assert (after.state, after.rung) == (TrialState.COMPLETED, 1)
        event = store.list_events(search.id)[-1]
        assert (event.type, event.data) == ("trial.rung_finished", {"trial": 0, "rung": 1, "tokens": 4000, "state": "completed", "kl": 1.5, "loss": 1.5})

    def test_a_result_that_ends_its_trial_says_why(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=None)
        failure = {"stage": "rung 0", "reason": "over_budget"}
        ended = {"search_id": search.id, "trial": 0, "rung": 0, "result": result(), "trial_state": TrialState.STOPPED}
        store.record_rung(attempt.id, **ended, failure=failure, fence=None)

        after = store.get_trial(search.id, 0)
        assert (after.state, after.rung, after.failure) == (TrialState.STOPPED, 0, failure)
        assert store.list_events(search.id)[-1].data["failure"] == failure

    def test_a_second_result_of_a_rung_is_refused(self, store: Store, search: SearchRecord, trial: TrialRecord, finish_rung: FinishRung) -> None:
        finish_rung(trial, 0)
        version = store.get_search(search.id).version
        again = store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=None)

        with pytest.raises(Conflict, match=f"rung 0 of trial 0 of search {search.id}: expected no result yet"):
            store.record_rung(again.id, search_id=search.id, trial=0, rung=0, result=result(), trial_state=TrialState.WAITING, fence=None)
        assert len(store.list_rungs(search.id)) == 1
        assert store.get_search(search.id).version == version + 1

    def test_the_result_of_an_attempt_that_was_lost_is_refused(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=None)
        store.lose_running_attempts(search.id, fence=None)

        with pytest.raises(Conflict, match="expected a running one, got state lost"):
            store.record_rung(attempt.id, search_id=search.id, trial=0, rung=0, result=result(), trial_state=TrialState.WAITING, fence=None)
        assert store.list_rungs(search.id) == []

    def test_the_result_of_another_rung_than_the_attempts_is_refused(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=None)

        with pytest.raises(Conflict, match="expected a result of its rung 0 of trial 0, got rung 1 of trial 0"):
            store.record_rung(attempt.id, search_id=search.id, trial=0, rung=1, result=result(), trial_state=TrialState.WAITING, fence=None)

    def test_a_result_that_is_not_finite_leaves_nothing_behind(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=None)
        values = result() | {"seconds": {"distil": float("nan")}}

        with pytest.raises(ValueError, match=r"seconds\.distil: expected a finite number, got nan"):
            store.record_rung(attempt.id, search_id=search.id, trial=0, rung=0, result=values, trial_state=TrialState.WAITING, fence=None)
        assert store.list_attempts(search.id) == [attempt]
        assert store.list_rungs(search.id) == []

    def test_rungs_are_numbered_in_finish_order(self, store: Store, search: SearchRecord, new_trial: NewTrial, finish_rung: FinishRung) -> None:
        trials = [new_trial(search, number) for number in range(3)]
        for number, rung in [(2, 0), (0, 0), (2, 1), (1, 0)]:
            finish_rung(trials[number], rung)

        assert [(rung.sequence, rung.trial, rung.rung) for rung in store.list_rungs(search.id)] == [(1, 2, 0), (2, 0, 0), (3, 2, 1), (4, 1, 0)]
        assert [rung.sequence for rung in store.list_rungs(search.id, trial=2)] == [1, 3]

    def test_documents_can_be_left_out(self, store: Store, search: SearchRecord, trial: TrialRecord, finish_rung: FinishRung) -> None:
        finish_rung(trial, 0)
        (short,) = store.list_rungs(search.id, with_documents=False)

        assert short.result["kl"] == {"value": 2.5, "standard_error": 0.1, "higher_is_better": False}
        assert short.result["tasks"]["pairs/a.b"]["value"] == 2.5
        assert short.result["details"] == {"pairs/a.b": {"acc,none": 0.5}}
        assert "documents" not in str(short.result)


class TestConfirmations:
    def test_a_confirmation_ends_its_attempt_and_leaves_the_trial_completed(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        store.change_trial(search.id, 0, to=TrialState.COMPLETED, fence=None)
        attempt = store.start_attempt(search.id, stage="confirm", trial=0, rung=None, fence=None)
        confirmation = {"verified": True, "parameters": 1000}
        store.save_confirmation(attempt.id, search_id=search.id, trial=0, confirmation=confirmation, fence=None)

        after = store.get_trial(search.id, 0)
        assert (after.state, after.confirmation) == (TrialState.COMPLETED, confirmation)
        assert store.list_attempts(search.id)[0].state is AttemptState.SUCCEEDED
        event = store.list_events(search.id)[-1]
        assert (event.type, event.data) == ("trial.confirmed", {"trial": 0, "verified": True, "reason": None})

    def test_the_documents_are_kept_apart_from_the_trial(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        confirmation = {"verified": True, "held_out": {"kl": {"value": 0.5, "documents": [0.25, 0.75]}}}
        store.save_confirmation(None, search_id=search.id, trial=0, confirmation=confirmation, fence=None)

        assert store.get_trial(search.id, 0).confirmation == {"verified": True, "held_out": {"kl": {"value": 0.5}}}
        assert store.list_confirmations(search.id) == {0: confirmation}

    def test_one_of_an_attempt_that_was_lost_is_refused(self, store: Store, search: SearchRecord, trial: TrialRecord) -> None:
        attempt = store.start_attempt(search.id, stage="confirm", trial=0, rung=None, fence=None)
        store.lose_running_attempts(search.id, fence=None)

        with pytest.raises(Conflict, match="expected a running one, got state lost"):
            store.save_confirmation(attempt.id, search_id=search.id, trial=0, confirmation={"verified": True}, fence=None)
        assert store.get_trial(search.id, 0).confirmation is None


class TestPoints:
    def point(self, trial: TrialRecord, *, tokens: int, rung: int = 1, loss: float = 2.0) -> PointRecord:
        return PointRecord(search_id=trial.search_id, trial=0, rung=rung, tokens=tokens, loss=loss, learning_rate=1e-3, tokens_per_second=1e5)

    def test_a_curve_comes_back_in_order_and_repeats_are_ignored(self, store: Store, trial: TrialRecord) -> None:
        first = [self.point(trial, tokens=200), self.point(trial, tokens=100)]
        store.add_points(first)
        store.add_points([self.point(trial, tokens=200, loss=9.0), self.point(trial, tokens=300, rung=2)])
        store.add_points([])

        assert store.list_points(trial.search_id, trial=0) == [first[1], first[0], self.point(trial, tokens=300, rung=2)]

    def test_a_loss_that_is_not_finite_is_refused(self, store: Store, trial: TrialRecord) -> None:
        with pytest.raises(ValueError, match="loss: expected a finite number, got nan at 200 tokens of trial 0"):
            store.add_points([self.point(trial, tokens=100), self.point(trial, tokens=200, loss=float("nan"))])
        assert store.list_points(trial.search_id, trial=0) == []
