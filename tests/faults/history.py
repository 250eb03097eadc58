"""The history of a search as its events tell it, replayed and held against the tables: what was lost, what was done twice.

Used by whatever disturbs searches, simulated or real. It reads the store alone, never the memory of a controller.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from nas.search.results import is_repeat, is_searched
from nas.store.records import AttemptState, EventRecord, SearchState, TrialState
from nas.store.store import Store

Step = tuple[str, int | None, int | None]
"""stage, trial, rung"""

_ENDS_OF_SEARCH = {f"search.{state}" for state in SearchState if state.is_terminal}
_ENDS_OF_ATTEMPT = {f"attempt.{state}" for state in AttemptState if state is not AttemptState.RUNNING}
_ENDS_OF_TRIAL = {f"trial.{state}": state for state in TrialState if state.is_terminal and state is not TrialState.COMPLETED}


@dataclass(kw_only=True)
class History:
    """One search. `follow` as often as one likes; then `losses` and `repeats` say what must be empty."""

    store: Store
    search_id: str
    state: SearchState | None = None
    trials: dict[int, TrialState] = field(default_factory=dict)
    rungs: dict[int, int] = field(default_factory=dict)
    """The last rung that each trial has finished."""
    running: dict[Step, str] = field(default_factory=dict)
    """Attempts, by what they do."""
    repeats: list[str] = field(default_factory=list)
    """What happened twice."""
    num_events: int = 0
    num_retried: int = 0
    _ends: Counter[Any] = field(default_factory=Counter)

    def follow(self) -> None:
        """Replay what is new, and compare the present with the tables."""
        version, _ = self.store.search_versions([self.search_id])[self.search_id]
        if version == self.num_events:
            return
        for event in self.store.list_events(self.search_id, after=self.num_events, limit=100_000):
            assert event.sequence == self.num_events + 1, f"event {self.num_events + 1} is missing"
            self.num_events = event.sequence
            self._replay(event)
        self._compare()

    def _replay(self, event: EventRecord) -> None:
        kind, data = event.type, event.data
        number = data.get("trial")
        step = (data.get("stage", "rung"), number, data.get("rung"))
        if kind.startswith("search."):
            self._note_state(kind)
        elif kind == "trial.proposed":
            assert number == len(self.trials), f"trial {number} follows {len(self.trials) - 1}"
            self.trials[number] = TrialState.WAITING
        elif kind in ("trial.started", "attempt.started"):
            self._note_start(step, attempt=data["attempt"])
        elif kind in _ENDS_OF_ATTEMPT:
            assert self.running.pop(step, None) == data["attempt"], f"{kind} of {data['attempt']}, which did not run"
            if step[0] == "rung":
                self.trials[number] = TrialState.WAITING
        elif kind == "trial.rung_finished":
            self._note_result(number, rung=data["rung"], to=TrialState(data["state"]))
        elif kind in _ENDS_OF_TRIAL:
            self._end_trial(number, to=_ENDS_OF_TRIAL[kind])
        elif kind == "trial.retried":
            assert self.trials[number] is TrialState.FAILED, "a trial that had not failed was retried"
            self.trials[number] = TrialState.WAITING
            self._ends[number] -= 1
            self.num_retried += 1

    def _note_state(self, kind: str) -> None:
        if self.state is not None and self.state.is_terminal and kind in _ENDS_OF_SEARCH:
            self.repeats.append(f"{kind} after {self.state}")
        name = {"search.created": "queued", "search.resumed": "queued"}.get(kind, kind.removeprefix("search."))
        if name in set(SearchState):
            self.state = SearchState(name)

    def _note_start(self, step: Step, *, attempt: str) -> None:
        stage, number, rung = step
        if step in self.running:
            self.repeats.append(f"{step} began beside itself")
        self.running[step] = attempt
        if stage == "rung":
            assert number is not None
            assert rung is not None
            assert self.trials[number] is TrialState.WAITING, f"trial {number} was started in state {self.trials[number]}"
            if rung <= self.rungs.get(number, -1):
                self.repeats.append(f"{step} ran again after it had succeeded")
            assert rung <= self.rungs.get(number, -1) + 1, f"{step} began after rung {self.rungs.get(number)}"
            self.trials[number] = TrialState.RUNNING

    def _note_result(self, number: int, *, rung: int, to: TrialState) -> None:
        assert self.running.pop(("rung", number, rung), None) is not None, f"rung {rung} of trial {number} has a result that nobody worked for"
        if rung <= self.rungs.get(number, -1):
            self.repeats.append(f"rung {rung} of trial {number} has two results")
        self.rungs[number] = rung
        if to.is_terminal:
            self._end_trial(number, to=to)
        else:
            self.trials[number] = to

    def _end_trial(self, number: int, *, to: TrialState) -> None:
        self._ends[number] += 1
        if self._ends[number] > 1:
            self.repeats.append(f"trial {number} ended as {self.trials[number]} and as {to}")
        self.trials[number] = to

    def _compare(self) -> None:
        """The tables are what the events add up to, and within the limits."""
        search, trials, attempts = self.store.get_search(self.search_id), self.store.list_trials(self.search_id), self.store.list_attempts(self.search_id)
        if search.version != self.num_events:
            return  # somebody writes at this moment: the next look compares
        assert search.state is self.state
        assert {trial.number: trial.state for trial in trials} == self.trials
        assert {trial.number: trial.rung for trial in trials if trial.rung is not None} == self.rungs
        assert {attempt.id for attempt in attempts if attempt.state is AttemptState.RUNNING} == set(self.running.values())
        assert len({(str(sorted(trial.shape.items())), is_repeat(trial.origin) and trial.origin) for trial in trials}) == len(trials), (
            "a shape was proposed twice"
        )
        cells = Counter((trial.state, 0 if trial.rung is None else trial.rung + 1) for trial in trials)
        kept = self.store.trial_counts([self.search_id])[self.search_id].cells
        assert {cell: number for cell, number in kept.items() if number} == cells, "the numbers that are kept are not those of the trials"
        numbers = Counter(trial.budget for trial in trials if is_searched(trial.origin))
        assert max(numbers.values(), default=0) <= search.spec["sampler"]["max_trials"], "more trials than were asked for"
        failed = Counter((one.stage, one.trial, one.rung) for one in attempts if one.counts and one.state is AttemptState.FAILED)
        assert max(failed.values(), default=0) <= search.spec["limits"]["max_attempts"], "a step was tried too often"

    def losses(self) -> list[str]:
        """Of a search that has ended: what should be there and is not."""
        self.follow()
        lost = [] if self.state is not None and self.state.is_terminal else [f"search {self.search_id} has not ended: {self.state}"]
        lost += [f"trial {number} never ended: {state}" for number, state in self.trials.items() if not state.is_terminal]
        lost += [f"attempt {attempt} of {step} never ended" for step, attempt in self.running.items()]
        there = Counter(rung.trial for rung in self.store.list_rungs(self.search_id, with_documents=False))
        lost += [f"trial {number}: {rung + 1} rungs finished, {there[number]} results kept" for number, rung in self.rungs.items() if there[number] != rung + 1]
        return lost


@dataclass(kw_only=True)
class Count:
    """What was counted in the histories of searches that were disturbed."""

    searches: int = 0
    trials: int = 0
    results: int = 0
    attempts: int = 0
    lost: int = 0
    doubled: int = 0

    def add(self, other: Count) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def count(histories: list[History]) -> Count:
    """Numbers over ended searches; complaints are in `losses` and `repeats`."""
    total = Count(searches=len(histories))
    for history in histories:
        total.lost += len(history.losses())
        total.doubled += len(history.repeats)
        total.trials += len(history.trials)
        total.results += len(history.store.list_rungs(history.search_id, with_documents=False))
        total.attempts += len(history.store.list_attempts(history.search_id))
    return total
