"""Requests, and what a controller does meanwhile, in any order, against a model: the store does what the model does, or refuses what it refuses."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from nas.errors import Conflict, NotFound
from nas.store.records import AttemptState, SearchState, TrialState
from nas.store.store import Store
from tests.store.store_values import shape

S = SearchState
SPEC = {"teacher": "t", "sampler": {"max_trials": 4}, "resources": {"max_parallel_trials": 1}}
TERMINAL = (S.SUCCEEDED, S.FAILED, S.CANCELLED)
NEXT = {
    S.QUEUED: S.PREPARING,
    S.PREPARING: S.SEARCHING,
    S.SEARCHING: S.CONFIRMING,
    S.CONFIRMING: S.SUCCEEDED,
    S.PAUSING: S.PAUSED,
    S.CANCELLING: S.CANCELLED,
}
"""What a controller does next by itself."""


class Requests(RuleBasedStateMachine):
    """One search: the model is its state, whether it was ever begun, its trials' states and max_trials."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store

    @initialize()
    def submit(self) -> None:
        self.id = self.store.create_search(spec=SPEC, inputs={}, plan={}, label="").id
        self.state, self.begun, self.trials, self.max_trials = S.QUEUED, False, list[TrialState](), 4

    def expect(self, ask: Callable[[], object], *, allowed: bool) -> bool:
        """Ask; refused exactly where the model refuses."""
        before = self.store.get_search(self.id).version
        try:
            ask()
        except Conflict:
            assert not allowed, "refused what is allowed"
            assert self.store.get_search(self.id).version == before, "a refusal changed something"
            return False
        assert allowed, "allowed what is refused"
        return True

    @rule()
    def pause(self) -> None:
        if self.expect(lambda: self.store.request_pause(self.id), allowed=self.state not in (*TERMINAL, S.CANCELLING)) and self.state is not S.PAUSED:
            self.state = S.PAUSING if self.begun else S.PAUSED

    @rule()
    def resume(self) -> None:
        if self.expect(lambda: self.store.request_resume(self.id), allowed=self.state not in (*TERMINAL, S.CANCELLING)):
            self.state = S.QUEUED if self.state in (S.PAUSING, S.PAUSED) else self.state

    @rule()
    def cancel(self) -> None:
        if self.expect(lambda: self.store.request_cancel(self.id), allowed=self.state not in TERMINAL):
            self.state = S.CANCELLING if self.begun else S.CANCELLED

    @rule(number=st.integers(0, 4))
    def retry(self, number: int) -> None:
        if number >= len(self.trials):
            return
        allowed = self.state not in (*TERMINAL, S.CANCELLING, S.CONFIRMING) and self.trials[number] is TrialState.FAILED
        if self.expect(lambda: self.store.retry_trial(self.id, number), allowed=allowed):
            self.trials[number] = TrialState.WAITING

    @rule(max_trials=st.integers(1, 8))
    def extend(self, max_trials: int) -> None:
        changes = max_trials != self.max_trials
        allowed = self.state not in TERMINAL and (not changes or (self.state not in (S.CANCELLING, S.CONFIRMING) and max_trials >= len(self.trials)))
        if self.expect(lambda: self.store.update_search(self.id, version=None, max_trials=max_trials), allowed=allowed):
            self.max_trials = max_trials

    @rule()
    def delete(self) -> None:
        if self.expect(lambda: self.store.delete_search(self.id), allowed=self.state in TERMINAL):
            try:
                self.store.get_search(self.id)
            except NotFound:
                self.submit()
            else:
                raise AssertionError("a deleted search is still there")

    # -- the controller ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.state in NEXT)
    @rule()
    def go_on(self) -> None:
        to = NEXT[self.state]
        for number, state in enumerate(self.trials):
            if to.is_terminal and not state.is_terminal:
                self.store.change_trial(self.id, number, to=TrialState.CANCELLED, fence=None)
                self.trials[number] = TrialState.CANCELLED
        self.store.change_search(self.id, to=to, expected=[self.state], fence=None)
        self.state, self.begun = to, self.begun or to in (S.PREPARING, S.SEARCHING)

    @precondition(lambda self: self.state is S.SEARCHING and len(self.trials) < self.max_trials)
    @rule()
    def propose(self) -> None:
        number = len(self.trials)
        layers = shape(num_hidden_layers=number + 1)
        self.store.add_trial(self.id, number=number, origin="sampler", shape=layers, choices=None, parameters=1, fence=None)
        self.trials.append(TrialState.WAITING)

    @precondition(lambda self: self.state is S.SEARCHING and TrialState.WAITING in self.trials)
    @rule()
    def fail_trial(self) -> None:
        number = self.trials.index(TrialState.WAITING)
        attempt = self.store.start_attempt(self.id, stage="rung", trial=number, rung=0, fence=None)
        self.store.finish_attempt(attempt.id, state=AttemptState.FAILED, reason="error: x", fence=None)
        assert sum(one.counts for one in self.store.list_attempts(self.id, trial=number)) == 1
        self.store.change_trial(self.id, number, to=TrialState.FAILED, failure={"reason": "error"}, fence=None)
        self.trials[number] = TrialState.FAILED

    # -- what is always true -------------------------------------------------------------------------------------------------

    @invariant()
    def the_store_is_where_the_model_is(self) -> None:
        search = self.store.get_search(self.id)
        assert search.state is self.state
        assert [trial.state for trial in self.store.list_trials(self.id)] == self.trials
        assert search.spec["sampler"]["max_trials"] == self.max_trials >= len(self.trials)
        assert (search.id in self.store.active_searches()) is (self.state not in (*TERMINAL, S.PAUSED))
        events = self.store.list_events(self.id, limit=1000)
        assert [event.sequence for event in events] == list(range(1, search.version + 1))


def test_any_order_of_requests_does_what_the_model_does(store: Store) -> None:
    quick = settings(max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(lambda: Requests(store), settings=quick)
