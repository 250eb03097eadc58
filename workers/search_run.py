"""One search as the controller sees it: its spec, trials and results in memory, and what should happen next.

Decisions are a function of what the store holds and of nothing else, so a controller that takes over decides as the one
that died would have. Touches no store, no executor and no clock.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas.cost import count_parameters
from nas.search.ranking import CONTROL, Board, CompletedTrial, TaskScale, make_scales, rank
from nas.search.results import RungResult
from nas.search.rungs import Standing, promotable
from nas.search.study import Observation, choose_sampler, propose
from nas.shape import Shape
from nas.space import Choices, build_space
from nas.spec import parse_spec
from nas.store.records import AttemptRecord, RungRecord, SearchRecord, TrialRecord, TrialState

FORCED_ORIGINS = ("anchor", "user", CONTROL)
"""They reach the last rung whatever their results: the board compares with them at equal tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTrial:
    """Propose this shape."""

    origin: str
    shape: Shape
    choices: Choices | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """Run this trial's next rung."""

    trial: int
    rung: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One rung of the ladder."""

    rung: int
    complete: bool
    """Every sampled trial that will ever reach this rung has done so."""
    promoted: tuple[int, ...]


class SearchRun:
    """The search's state between two decisions; `trials` and `results` are kept in step with the store by the controller."""

    def __init__(self, record: SearchRecord, *, trials: Sequence[TrialRecord], rungs: Sequence[RungRecord], attempts: Sequence[AttemptRecord]) -> None:
        self.id = record.id
        self.inputs = record.inputs
        self.spec = parse_spec(json.dumps(record.spec))
        self.space = build_space(self.spec, inputs=record.inputs)
        anchors = self.space.anchors() if self.spec.controls.anchors else {}
        self._named = [*((f"anchor:{name}", shape) for name, shape in anchors.items()), *(("user", shape) for shape in self.spec.shapes)]
        self.trials: dict[int, TrialRecord] = {trial.number: trial for trial in trials}
        self.results: dict[int, dict[int, RungResult]] = {}
        for row in sorted(rungs, key=lambda row: row.sequence):
            self.add_result(row.trial, RungResult.from_dict(row.result))
        self.reached: dict[int, int] = {}
        """Deepest rung of a trial that was ever started, however it ended."""
        for attempt in attempts:
            if attempt.stage == "rung" and attempt.trial is not None and attempt.rung is not None:
                self.add_start(attempt.trial, rung=attempt.rung)

    def add_start(self, trial: int, *, rung: int) -> None:
        """A rung of a trial starts: whatever becomes of it, the trial was promoted to it."""
        self.reached[trial] = max(rung, self.reached.get(trial, 0))

    def add_result(self, trial: int, result: RungResult) -> None:
        """Must be called in finish order: the sampler is fed in it."""
        self.results.setdefault(trial, {})[result.rung] = result

    @property
    def last_rung(self) -> int:
        return self.spec.rungs.num_trained

    def shape_of(self, trial: int) -> Shape:
        return Shape.from_dict(self.trials[trial].shape)

    # -- what next ---------------------------------------------------------------------------------------------------------

    def next_action(self) -> NewTrial | Advance | None:
        """The next thing to start, or None while there is nothing but to wait (or nothing left at all).

        Higher rungs go first, then new shapes: with one worker that is a depth-first successive halving.
        """
        for trial in self.trials.values():
            if trial.state == TrialState.WAITING and trial.rung is None:
                return Advance(trial=trial.number, rung=0)
        for standing in reversed(self._ladder()):
            for number in standing.promoted:
                trial = self.trials[number]
                if trial.state == TrialState.WAITING and trial.rung == standing.rung:
                    return Advance(trial=number, rung=standing.rung + 1)
        return self._next_shape()

    def left_behind(self) -> list[int]:
        """Trials that wait at a rung from which no one will go up any more: who was promoted is up, so none of their places gets free."""
        return [
            trial.number
            for standing in self._ladder()
            if standing.complete and self._have_arrived(standing.promoted, rung=standing.rung + 1)
            for trial in self.trials.values()
            if trial.state == TrialState.WAITING and trial.rung == standing.rung and trial.number not in standing.promoted
        ]

    def _have_arrived(self, promoted: Sequence[int], *, rung: int) -> bool:
        return all(rung in self.results[number] or self.trials[number].state.is_terminal for number in promoted)

    def is_finished(self) -> bool:
        """No trial runs or waits, and no shape is left to propose."""
        return all(trial.state.is_terminal for trial in self.trials.values()) and self.next_action() is None

    def _ladder(self) -> list[_Step]:
        """Every rung below the last: who goes on from it (those that already did among them), and whether more may still reach it."""
        ladder: list[_Step] = []
        live = [trial for trial in self.trials.values() if not self._is_forced(trial.number) and trial.state not in (TrialState.FAILED, TrialState.CANCELLED)]
        complete = self._all_proposed()
        coming = {trial.number for trial in live}
        for rung in range(self.last_rung):
            arrived = {trial.number for trial in live if trial.rung is not None and trial.rung >= rung}
            complete = complete and coming <= arrived
            standings = [
                Standing(trial=number, depth=self.shape_of(number).num_hidden_layers, kl=results[rung].kl, forced=self._is_forced(number))
                for number, results in self.results.items()
                if rung in results and self.trials[number].state != TrialState.FAILED  # the place it held goes to the next best
            ]
            best = promotable(rung, standings, spec=self.spec.rungs, complete=complete)
            # Better ones may have come since an early promotion; it holds all the same, also while its rung is tried again.
            early = [standing.trial for standing in standings if standing.trial not in best and self.reached.get(standing.trial, 0) > rung]
            promoted = (*best, *early)
            ladder.append(_Step(rung=rung, complete=complete, promoted=promoted))
            # A place that gets free after the others were stopped stays empty.
            coming = {trial.number for trial in live if trial.number in promoted and trial.state != TrialState.STOPPED}
        return ladder

    def _is_forced(self, number: int) -> bool:
        return self.trials[number].origin.split(":")[0] in FORCED_ORIGINS

    # -- shapes ------------------------------------------------------------------------------------------------------------

    def _all_proposed(self) -> bool:
        """Whether every named shape and max_trials shapes in all are proposed, or every legal one is."""
        if self._next_named() is not None:
            return False
        if sum(self._is_searched(number) for number in self.trials) >= self.spec.sampler.max_trials:
            return True
        seen = self._seen()
        return self.space.count() <= len(seen) and all(shape.key in seen for shape in self.space.shapes())

    def _next_shape(self) -> NewTrial | None:
        if not self._all_proposed():
            return self._next_searched_shape()
        # Controls come last, so that the sampler never learns from them.
        if all(trial.state.is_terminal for trial in self.trials.values() if self._is_searched(trial.number)):
            return self._next_control()
        return None

    def _next_searched_shape(self) -> NewTrial | None:
        """The next anchor, named shape or proposal of the sampler."""
        if (named := self._next_named()) is not None:
            return named
        searched = [trial for trial in self.trials.values() if self._is_searched(trial.number)]
        seen = self._seen()
        proposal = propose(
            self.space,
            sampler=choose_sampler(self.spec.sampler, space_size=self.space.count()),
            observations=self._observations(),
            pending=[
                choices
                for trial in searched
                if trial.state in (TrialState.RUNNING, TrialState.WAITING) and (choices := self._choices(Shape.from_dict(trial.shape))) is not None
            ],
            seen=seen,
            number=len(searched),
            seed=self.spec.seed,
            num_startup_trials=self.spec.sampler.num_startup_trials,
        )
        return NewTrial(origin="sampler", shape=proposal.shape, choices=proposal.choices) if proposal else None

    def _next_named(self) -> NewTrial | None:
        """The next anchor or shape of the user's; they are evaluated even where they are more than max_trials."""
        seen = self._seen()
        for origin, shape in self._named:
            if shape.key not in seen:
                return NewTrial(origin=origin, shape=shape, choices=self._choices(shape))
        return None

    def _next_control(self) -> NewTrial | None:
        drawn = sum(trial.origin == CONTROL for trial in self.trials.values())
        if drawn >= self.spec.controls.num_random:
            return None
        seen = self._seen()
        generator = np.random.default_rng([self.spec.seed, 1, drawn])
        for _ in range(1000):
            shape = self.space.draw(generator)
            if shape.key not in seen:
                return NewTrial(origin=CONTROL, shape=shape, choices=None)
        unseen = next((shape for shape in self.space.shapes() if shape.key not in seen), None)
        return NewTrial(origin=CONTROL, shape=unseen, choices=None) if unseen else None

    def _seen(self) -> set[str]:
        return {Shape.from_dict(trial.shape).key for trial in self.trials.values()}

    def _choices(self, shape: Shape) -> Choices | None:
        """The choices that stand for a shape, if they do: an anchor outside the ranges teaches the sampler nothing."""
        choices = self.space.choices_of(shape)
        return choices if self.space.resolve(choices) == shape else None

    def _observations(self) -> list[Observation]:
        """What the sampler learns from: the deepest trained rung with num_startup_trials results, else the first, never a mixture of rungs.

        The value is -log KL on the held-out blocks. A failed shape counts as the worst seen: told as a failure, TPE asks for it again and again.
        """
        searched = {number: choices for number in self.trials if self._is_searched(number) and (choices := self._choices(self.shape_of(number))) is not None}
        for rung in reversed(range(1, self.last_rung + 1)):
            values = {
                number: -math.log(max(self.results[number][rung].kl.value, 1e-12))
                for number in self.results
                if number in searched and rung in self.results[number]
            }
            if len(values) >= self.spec.sampler.num_startup_trials:
                break
        if not values:
            return []
        worst = min(values.values())
        values |= {number: worst for number in searched if self.trials[number].state == TrialState.FAILED}
        return [Observation(choices=searched[number], value=value) for number, value in values.items()]

    def _is_searched(self, number: int) -> bool:
        return self.trials[number].origin != CONTROL

    # -- ranking -----------------------------------------------------------------------------------------------------------

    def scales(self, prepared: dict[str, object]) -> tuple[TaskScale, ...]:
        """The teacher's and random weights' scores between which the objective is measured."""
        teacher, random = (RungResult.from_dict(prepared[name]) for name in ("teacher", "random"))  # type: ignore[arg-type]
        return tuple(make_scales(self.spec.tasks, teacher=teacher, random=random))

    def board(self, prepared: dict[str, object]) -> Board:
        """The leaderboard of all results so far."""
        trials = [
            CompletedTrial(
                number=number, origin=trial.origin, shape=self.shape_of(number), parameters=trial.parameters, state=trial.state, results=self.results[number]
            )
            for number, trial in self.trials.items()
            if number in self.results
        ]
        teacher = count_parameters(self.space.architecture, self.space.architecture.shape).total
        return rank(trials, scales=self.scales(prepared), teacher_parameters=teacher, spec=self.spec.rungs)

    def finalists(self, board: Board) -> list[int]:
        """Who is confirmed: the best of the last rung with those tied with the last of them (at most twice as many), and every forced trial."""
        at_top = [row for row in board.rows if row.rung == self.last_rung]
        searched = [row for row in at_top if row.origin != CONTROL]
        chosen = searched[: self.spec.num_finalists]
        if chosen:
            tied = [row for row in searched[self.spec.num_finalists : 2 * self.spec.num_finalists] if row.tie_group == chosen[-1].tie_group]
            chosen = chosen + tied
        return [row.number for row in at_top if row in chosen or self._is_forced(row.number)]
