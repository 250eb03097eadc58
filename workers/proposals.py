"""Which shapes one budget evaluates: the anchors and the user's, then the sampler's, taught by what is known, then the random controls.

An index over the store's content: a rebuilt one proposes the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import islice

import numpy as np

from nas.search.results import CONTROL, Metric, RungResult, is_searched, repeat_origin
from nas.search.study import MAX_PENDING_TOLD, Observation, Sampler, choose_sampler, propose
from nas.shape import Shape
from nas.space import Choices
from nas.store.records import TrialRecord
from nas.warm_start import Memory
from workers.actions import NewTrial
from workers.evidence import Evidence


class Proposals:
    """What was proposed, what the sampler has learnt, and what is proposed next."""

    def __init__(
        self, evidence: Evidence, *, trials: Mapping[int, TrialRecord], memory: Memory, budget: int, seen: set[str], named: Collection[tuple[str, Shape]]
    ) -> None:
        """`trials`: by number, kept by the caller. `seen`: see `SearchRun`. `named`: origin and shape of those that are proposed first."""
        self._evidence, self._trials, self._memory, self._budget, self._seen = evidence, trials, memory, budget, seen
        self._spec, self._space = evidence.spec, evidence.space
        self._named = tuple(named)
        self._choices: dict[Shape, Choices | None] = {}
        self.num_searched = 0
        """Trials that count in max_trials."""
        self._open: set[int] = set()
        """Searched trials that run or wait."""
        self._told: list[dict[int, Observation]] = [{} for _ in range(self._spec.rungs.num_trained + 1)]
        """By rung: what its results teach the sampler, in the order in which they came."""
        self._out: set[int] = set()
        self._is_exhausted = False

    def add_trial(self, trial: TrialRecord) -> None:
        """A trial that was not known."""
        self._seen.add(self._evidence.shapes[trial.number].key)
        self.num_searched += self.is_searched(trial.number)

    def set_trial(self, trial: TrialRecord) -> None:
        """A trial that is new, or changed."""
        if self.is_searched(trial.number):
            (self._open.discard if trial.state.is_terminal else self._open.add)(trial.number)
        if trial.is_out:
            self._out.add(trial.number)

    def add_result(self, trial: int) -> None:
        """A result that the evidence has already. Must be called in finish order: the sampler is fed in it."""
        costs = self._evidence.costs(trial)
        if self.is_searched(trial) and (choices := self._choices_of_trial(trial)) is not None and all(map(math.isfinite, costs)):
            for rung in self._evidence.results[trial]:
                self._told[rung][trial] = Observation(choices=choices, value=_value(self._evidence.projected(trial, rung=rung)), costs=costs)

    # -- what next ---------------------------------------------------------------------------------------------------------

    @property
    def sampler(self) -> Sampler:
        """Who proposes."""
        return choose_sampler(self._spec.sampler, space_size=self._space.count())

    def are_all(self) -> bool:
        """Whether every named shape and max_trials shapes in all are proposed, or every legal one is."""
        if self._next_named() is not None:
            return False
        if self.num_searched >= self._spec.sampler.max_trials:
            return True
        return self.has_no_more()

    def has_no_more(self) -> bool:
        """Whether every legal shape is proposed; trials are never taken back, so it stays so."""
        if not self._is_exhausted and self._space.count() <= len(self._seen):
            self._is_exhausted = all(shape.key in self._seen for shape in self._space.shapes())
        return self._is_exhausted

    def is_short(self) -> bool:
        """Whether fewer shapes are proposed than the spec asks for."""
        return self.num_searched < self._spec.sampler.max_trials or self._num_controls() < self._spec.controls.num_random

    def next_shape(self) -> NewTrial | None:
        """The next one to begin with; None while there is nothing to propose."""
        # Repeats come as early as they can: what they measure decides who is tied.
        if self._next_named() is None and (repeat := self._next_repeat()) is not None:
            return repeat
        if not self.are_all():
            return self._next_searched_shape()
        # Controls come last, so that the sampler never learns from them.
        return None if self._open else self._next_control()

    def _next_searched_shape(self) -> NewTrial | None:
        """The next anchor, named shape or proposal of the sampler."""
        if (named := self._next_named()) is not None:
            return named
        proposal = propose(
            self._space,
            sampler=self.sampler,
            observations=self.observations(),
            pending=self._pending(),
            seen=self._seen,
            number=self.num_searched,
            seed=self._spec.seed,
            num_startup_trials=self._spec.sampler.num_startup_trials,
        )
        return NewTrial(origin="sampler", shape=proposal.shape, choices=proposal.choices, budget=self._budget) if proposal else None

    def _pending(self) -> list[Choices]:
        """Choices of the latest trials that run or wait, as many as the sampler is told of, in the order of their numbers."""
        latest = (self._choices_of_trial(number) for number in sorted(self._open, reverse=True))
        return list(islice((choices for choices in latest if choices is not None), MAX_PENDING_TOLD))[::-1]

    def _next_named(self) -> NewTrial | None:
        """The next anchor or shape of the user's; they are evaluated even where they are more than max_trials."""
        for origin, shape in self._named:
            if shape.key not in self._seen:
                return NewTrial(origin=origin, shape=shape, choices=self._choices_of(shape), budget=self._budget)
        return None

    def _next_repeat(self) -> NewTrial | None:
        """The first forced anchor once more; not where it failed, or is another budget's."""
        runs = self._evidence.runs
        if not runs or len(runs) > self._spec.controls.num_repeats or self._trials[runs[0]].is_out:
            return None
        return NewTrial(origin=repeat_origin(len(runs)), shape=self._evidence.shapes[runs[0]], choices=None, budget=self._budget)

    def _next_control(self) -> NewTrial | None:
        drawn = self._num_controls()
        if drawn >= self._spec.controls.num_random or self.has_no_more():
            return None
        generator = np.random.default_rng([self._spec.seed, 1, drawn])
        for _ in range(1000):
            shape = self._space.draw(generator)
            if shape.key not in self._seen:
                return NewTrial(origin=CONTROL, shape=shape, choices=None, budget=self._budget)
        unseen = next((shape for shape in self._space.shapes() if shape.key not in self._seen), None)
        return NewTrial(origin=CONTROL, shape=unseen, choices=None, budget=self._budget) if unseen else None

    def _num_controls(self) -> int:
        return sum(trial.origin == CONTROL for trial in self._trials.values())

    def is_searched(self, number: int) -> bool:
        """Whether the trial is one of those that the search chooses among."""
        return is_searched(self._trials[number].origin)

    def _choices_of(self, shape: Shape) -> Choices | None:
        """The choices that stand for a shape, if they do: an anchor outside the ranges teaches the sampler nothing."""
        if shape not in self._choices:
            choices = self._space.choices_of(shape)
            self._choices[shape] = choices if self._space.resolve(choices) == shape else None
        return self._choices[shape]

    def _choices_of_trial(self, number: int) -> Choices | None:
        return self._choices_of(self._evidence.shapes[number])

    # -- what teaches the sampler ------------------------------------------------------------------------------------------

    def observations(self, *, at_least: int = 0) -> list[Observation]:
        """What the sampler learns from: the deepest trained rung with num_startup_trials results (or `at_least`, where that is more), else the first,
        never a mixture of rungs.

        The value is -log KL on the held-out blocks, projected. A shape that failed or is over a measured ceiling counts as the worst seen: told as a failure,
        TPE asks for it again and again.
        """
        remembered: list[Observation] = []
        told: dict[int, Observation] = {}
        for rung in reversed(range(1, self._spec.rungs.num_trained + 1)):
            told = self._told[rung]
            remembered = self._remembered(rung, without=told)
            if len(remembered) + len(told) >= max(self._spec.sampler.num_startup_trials, at_least):
                break
        known = [*remembered, *told.values()]
        out = {number: choices for number in sorted(self._out) if self.is_searched(number) and (choices := self._choices_of_trial(number)) is not None}
        if not known or not out:
            return known
        worst = min(observation.value for observation in known)
        dearest = tuple(max(costs) for costs in zip(*(observation.costs for observation in known), strict=True))
        told = told | {number: Observation(choices=choices, value=worst, costs=dearest) for number, choices in out.items()}
        return [*remembered, *told.values()]

    def _remembered(self, rung: int, *, without: Collection[int]) -> list[Observation]:
        """What earlier searches teach of a rung: of shapes that are legal here, less those of the trials `without`, which are evaluated here.

        Nothing where a latency is an objective: theirs are not ours.
        """
        at_rung = self._memory.at(self._spec.rungs.tokens(rung))
        if not at_rung:
            return []
        evaluated = {self._evidence.shapes[number] for number in without}
        below: dict[tuple[str, int], RungResult] = {(known.search, known.trial): known.result for known in self._memory.at(self._spec.rungs.tokens(rung - 1))}
        observations = []
        for known in at_rung:
            # Without the rung below there is no telling where its KL was going, which is what ours are compared by.
            if known.shape in evaluated or (under := below.get((known.search, known.trial))) is None or (choices := self._choices_of(known.shape)) is None:
                continue
            costs = self._evidence.closed_costs(known.shape)
            if all(name in costs for name in self._spec.objectives):
                kl = self._evidence.project(known.result, below=under, rung=rung)
                observations.append(Observation(choices=choices, value=_value(kl), costs=tuple(costs[name] for name in self._spec.objectives)))
        return observations


def _value(kl: Metric) -> float:
    """What the sampler makes large."""
    return -math.log(max(kl.value, 1e-12))
