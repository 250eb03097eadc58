"""A search over one or several budgets: one `SearchRun` for each, over one prepared folder, one list of trials and one pool of workers.

Budgets do not compete: rungs, finalists and winners are each budget's own. They share the workers: whichever budget has begun the fewest trials is asked first
for what to do next. A shape is evaluated once, for the budget that proposes it first; the others pass it over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from nas.search.confirmed import Confirmation
from nas.search.leaderboard import Board
from nas.search.objective import TaskScale
from nas.search.results import RungResult, trained_tokens
from nas.search.study import Observation
from nas.search.task_signals import TaskSignal
from nas.shape import Shape
from nas.spec import parse_spec
from nas.store.records import AttemptRecord, RungRecord, SearchRecord, TrialRecord
from nas.warm_start import Known, Memory
from workers.actions import Advance, EndReason, LimitReason, NewTrial
from workers.search_run import SearchRun


class Family:
    """All budgets of a search; `set_trial`, `add_start` and `add_result` keep it in step with the store. Of one budget it adds nothing to its `SearchRun`."""

    def __init__(
        self,
        record: SearchRecord,
        *,
        trials: Sequence[TrialRecord],
        rungs: Sequence[RungRecord],
        attempts: Sequence[AttemptRecord],
        memory: Memory | None = None,
    ) -> None:
        """`memory`: what earlier searches know, the same for all budgets."""
        self.id = record.id
        self.inputs = record.inputs
        self.plan = record.plan
        self.spec = parse_spec(json.dumps(record.spec))
        self._trials = {trial.number: trial for trial in trials}
        self.trials: Mapping[int, TrialRecord] = MappingProxyType(self._trials)
        """Of all budgets, by number; changed by `set_trial` alone."""
        seen: set[str] = set()
        self.runs = tuple(
            SearchRun(
                record,
                trials=[trial for trial in trials if trial.budget == budget],
                rungs=[row for row in rungs if self._trials[row.trial].budget == budget],
                attempts=[attempt for attempt in attempts if attempt.trial is not None and self._trials[attempt.trial].budget == budget],
                budget=budget,
                seen=seen,
                memory=memory,
            )
            for budget in range(len(self.spec.budgets))
        )
        """By budget."""
        self.results: dict[int, dict[int, RungResult]] = {number: results for run in self.runs for number, results in run.results.items()}
        """By trial and rung."""
        self._tokens: dict[int, int] = {}
        """By trial: tokens of the rungs that it has begun."""
        self.begun_tokens = 0
        """Tokens that the trials were, or are being, trained on: a rung counts whole from its start."""
        for number in self._trials:
            self._count_tokens(number)

    def _run_of(self, trial: int) -> SearchRun:
        return self.runs[self._trials[trial].budget]

    def set_trial(self, trial: TrialRecord) -> None:
        """A trial as the store has it now: a new one, or one that changed."""
        self._trials[trial.number] = trial
        self._run_of(trial.number).set_trial(trial)

    def add_start(self, trial: int, *, rung: int) -> None:
        """A rung of a trial starts."""
        self._run_of(trial).add_start(trial, rung=rung)
        self._count_tokens(trial)

    def tokens_of(self, action: Advance) -> int:
        """Tokens that this step would add to `begun_tokens`; none for one that was begun before."""
        return self._tokens_to(action.trial, rung=action.rung) - self._tokens.get(action.trial, 0)

    def _count_tokens(self, number: int) -> None:
        now = self._tokens_to(number, rung=self._run_of(number).reached.get(number, 0))
        self.begun_tokens += now - self._tokens.get(number, 0)
        self._tokens[number] = now

    def _tokens_to(self, number: int, *, rung: int) -> int:
        results = self.results.get(number, {})
        begun = range(max([rung, *results]) + 1)
        return sum(trained_tokens({one: one in results and results[one].reused_from is not None for one in begun}, spec=self.spec).values())

    @property
    def stopped(self) -> LimitReason | None:
        """The limit that ended it, if one did."""
        return self.runs[0].stopped

    def stop(self, reason: LimitReason) -> None:
        """A limit of the search is reached: from now on there is nothing to start."""
        for run in self.runs:
            run.stop(reason)

    def add_result(self, trial: int, result: RungResult) -> None:
        """Must be called in finish order: the sampler is fed in it."""
        run = self._run_of(trial)
        run.add_result(trial, result)
        self.results[trial] = run.results[trial]
        self._count_tokens(trial)

    @property
    def last_rung(self) -> int:
        return self.spec.rungs.num_trained

    def observations(self, trial: int, *, most: int) -> list[Observation]:
        """What the sampler of a trial's budget was last told, at most so many."""
        return self._run_of(trial).observations(most=most)

    def shape_of(self, trial: int) -> Shape:
        return self._run_of(trial).shape_of(trial)

    def seed_of(self, trial: int) -> int:
        """Of the trial's data order."""
        return self._run_of(trial).seed_of(trial)

    def next_action(self) -> NewTrial | Advance | None:
        """The next thing to start, of the budget that has begun the fewest trials and has anything to do."""
        return next((action for run in self._by_need() if (action := run.next_action()) is not None), None)

    def _by_need(self) -> Iterator[SearchRun]:
        yield from sorted(self.runs, key=lambda run: len(run.trials))  # stable: of equal ones the first budget

    def known_result(self, action: Advance) -> Known | None:
        """What an earlier search answers this step with."""
        return self._run_of(action.trial).known_result(action)

    def left_behind(self) -> list[int]:
        """Trials that wait at a rung from which no one will go up any more."""
        return [number for run in self.runs for number in run.left_behind()]

    def is_finished(self) -> bool:
        return all(run.is_finished() for run in self.runs)

    def end_reason(self) -> EndReason | None:
        """Why no more shapes are evaluated; None while there may be more. Exhausted are only budgets that all are."""
        if self.stopped:
            return self.stopped
        reasons = [run.end_reason() for run in self.runs]
        return None if None in reasons else "space_exhausted" if set(reasons) == {"space_exhausted"} else "max_trials"

    def scales(self, prepared: dict[str, object]) -> tuple[TaskScale, ...]:
        """The teacher's and random weights' scores between which the objective is measured."""
        return self.runs[0].scales(prepared)

    def signals(self, prepared: dict[str, object]) -> tuple[TaskSignal, ...]:
        """How clear of random weights the teacher stands on each task."""
        return self.runs[0].signals(prepared)

    def boards(self, prepared: dict[str, object], *, confirmations: Mapping[int, Confirmation]) -> tuple[Board, ...]:
        """The leaderboard of each budget."""
        return tuple(run.board(prepared, confirmations=confirmations) for run in self.runs)

    def to_confirm(self, boards: Sequence[Board]) -> list[int]:
        """The finalists of each budget, and every forced trial of the last rung."""
        return [number for run, board in zip(self.runs, boards, strict=True) for number in run.to_confirm(board)]
