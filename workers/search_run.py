"""One search as the controller sees it: its spec, trials and results in memory, and what should happen next.

Decisions are a function of what the store holds and of nothing else, so a controller that takes over decides as the one
that died would have. Touches no store, no executor and no clock.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from nas.cost import COSTS, count_parameters
from nas.search.confirmed import Confirmation
from nas.search.ranking import Board, CompletedTrial, TaskScale, make_scales, rank
from nas.search.results import CONTROL, Metric, RungResult
from nas.search.rungs import Standing, Standings, certain_losers, project, projected_spread
from nas.search.study import MAX_PENDING_TOLD, Observation, Sampler, choose_sampler, propose
from nas.search.task_signals import TaskSignal, read_signals
from nas.shape import Shape
from nas.space import Choices, build_space, forced_anchors
from nas.spec import parse_spec
from nas.store.records import AttemptRecord, RungRecord, SearchRecord, TrialRecord, TrialState
from nas.warm_start import Known, Memory

LimitReason = Literal["time_limit", "token_limit", "device_seconds_limit"]
LIMIT_REASONS: tuple[LimitReason, ...] = get_args(LimitReason)
EndReason = Literal["max_trials", "space_exhausted"] | LimitReason

FORCED_ORIGINS = ("user", CONTROL)
"""They reach the last rung whatever their results, as the spec's forced anchors do: the board compares with them at equal tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTrial:
    """Propose this shape."""

    origin: str
    shape: Shape
    choices: Choices | None
    budget: int = 0
    """Index of the budget that proposes it."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Promoted:
    """Who goes on from a rung, as long as nothing comes that can change it."""

    complete: bool
    order: tuple[int, ...]
    members: frozenset[int]


class SearchRun:
    """One budget of a search between two decisions (`workers/family.py` holds all); `set_trial`, `add_start` and `add_result` keep it in step with the store.

    A decision must cost about the same after ten thousand trials as after ten, so what it reads is indexed as it arrives, and who goes on from a
    rung is computed again only when something came that can change it. All of it follows from the store's content, in whatever steps it came.
    """

    def __init__(
        self,
        record: SearchRecord,
        *,
        trials: Sequence[TrialRecord],
        rungs: Sequence[RungRecord],
        attempts: Sequence[AttemptRecord],
        memory: Memory | None = None,
        budget: int = 0,
        seen: set[str] | None = None,
    ) -> None:
        """All rows are of this budget's trials. `seen`: keys of every proposed shape, a set that the budgets of one search share and add to."""
        self.id = record.id
        self._budget = budget
        self.inputs, self.plan = record.inputs, record.plan
        self.spec = parse_spec(json.dumps(record.spec))
        self.space = build_space(self.spec, inputs=record.inputs, budget=budget)
        self._memory = memory or Memory()
        anchors = self.space.anchors() if self.spec.controls.anchors else {}
        self._forced_anchors = {shape.key for shape in forced_anchors(self.spec, anchors=anchors).values()}
        self._named = [*((f"anchor:{name}", shape) for name, shape in anchors.items()), *(("user", shape) for shape in self._shapes_of_user())]
        self._trials: dict[int, TrialRecord] = {}
        self.trials: Mapping[int, TrialRecord] = MappingProxyType(self._trials)
        """By number; changed by `set_trial` alone."""
        self.results: dict[int, dict[int, RungResult]] = {}
        self.reached: dict[int, int] = {}
        """Deepest rung of a trial that was ever started, however it ended."""
        self._begun: list[set[int]] = [set() for _ in range(self.last_rung)]
        """By rung: trials of which a deeper one was ever started."""
        self._shapes: dict[int, Shape] = {}
        self._forced: set[int] = set()
        self._seen = seen if seen is not None else set()
        self._choices: dict[Shape, Choices | None] = {}
        self._num_searched = 0
        self._open: set[int] = set()
        """Trials that run or wait."""
        self._waiting: defaultdict[int | None, set[int]] = defaultdict(set)
        """Trials that wait, by their deepest finished rung."""
        self._lost: set[int] = set()
        """Of those that wait: whose next rung was started before, and lost."""
        self._standings = [Standings(rung) for rung in range(self.last_rung)]
        """By rung: the results that count there."""
        self._behind: list[set[int]] = [set() for _ in range(self.last_rung)]
        """By rung: trials that have not finished it and might, if they go on from the one below; forced ones, which nobody waits for, are not among them."""
        self._told: list[dict[int, Observation]] = [{} for _ in range(self.last_rung + 1)]
        """By rung: what its results teach the sampler, in the order in which they came."""
        self._out: set[int] = set()
        self._finished: dict[int, tuple[float, float]] = {}
        """What the rung below the last and the last one are compared by, of the trials that finished it."""
        self._promoted: dict[int, _Promoted] = {}
        """By rung, while nothing has come that can change it."""
        self._is_exhausted = False
        self.stopped: LimitReason | None = None
        """The limit that ended it, if one did."""
        self._known_costs: dict[int, tuple[float, ...]] = {}
        for trial in trials:
            self.set_trial(trial)
        for row in sorted(rungs, key=lambda row: row.sequence):
            self.add_result(row.trial, RungResult.from_dict(row.result))
        for attempt in attempts:
            if attempt.stage == "rung" and attempt.trial is not None and attempt.rung is not None:
                self.add_start(attempt.trial, rung=attempt.rung)

    def stop(self, reason: LimitReason) -> None:
        """A limit of the search is reached: from now on there is nothing to start."""
        self.stopped = reason

    def set_trial(self, trial: TrialRecord) -> None:
        """A trial as the store has it now: a new one, or one that changed."""
        number, before = trial.number, self._trials.get(trial.number)
        if before is None:
            self._shapes[number] = Shape.from_dict(trial.shape)
            self._seen.add(self._shapes[number].key)
            self._num_searched += trial.origin != CONTROL
            origin = trial.origin.split(":")[0]
            if origin in FORCED_ORIGINS or (origin == "anchor" and self._shapes[number].key in self._forced_anchors):
                self._forced.add(number)
        else:
            self._waiting[before.rung].discard(number)
        self._trials[number] = trial
        if trial.state is TrialState.WAITING:
            self._waiting[trial.rung].add(number)
        self._note_lost(number)
        self._note_behind(number)
        if trial.state.is_terminal:
            self._open.discard(number)
        else:
            self._open.add(number)
        if trial.is_out:
            self._out.add(number)
            # The places it held go to the next best.
            for rung, standings in enumerate(self._standings):
                if standings.remove(number):
                    self._promoted.pop(rung, None)

    def add_start(self, trial: int, *, rung: int) -> None:
        """A rung of a trial starts: whatever becomes of it, the trial was promoted to it."""
        self.reached[trial] = max(rung, self.reached.get(trial, 0))
        self._note_lost(trial)
        for below in range(rung):
            self._begun[below].add(trial)
            if below in self._promoted and trial not in self._promoted[below].members:
                del self._promoted[below]

    def _note_lost(self, number: int) -> None:
        trial = self._trials[number]
        if trial.state is TrialState.WAITING and trial.rung is not None and self.reached.get(number, 0) > trial.rung:
            self._lost.add(number)
        else:
            self._lost.discard(number)

    def add_result(self, trial: int, result: RungResult) -> None:
        """Must be called in finish order: the sampler is fed in it."""
        self.results.setdefault(trial, {})[result.rung] = result
        self._known_costs.pop(trial, None)
        if result.rung == self.last_rung and self.last_rung - 1 in self.results[trial]:
            below, last = (self._projected(trial, rung=rung).value for rung in (self.last_rung - 1, self.last_rung))
            if below > 0:
                self._finished[trial] = below, last
        if result.rung < self.last_rung and not self.trials[trial].is_out:
            self._standings[result.rung].add(self._standing(trial, result))
            self._promoted.pop(result.rung, None)
        costs = self._costs(trial)
        if self._is_searched(trial) and (choices := self._choices_of_trial(trial)) is not None and all(map(math.isfinite, costs)):
            for rung in self.results[trial]:
                self._told[rung][trial] = Observation(choices=choices, value=_value(self._projected(trial, rung=rung)), costs=costs)

    def _shapes_of_user(self) -> list[Shape]:
        """Those that fit this budget, and none before it."""
        before = [build_space(self.spec, inputs=self.inputs, budget=earlier) for earlier in range(self._budget)]
        left = [shape for shape in self.spec.shapes if all(space.explain(shape) for space in before)]
        return [shape for shape in left if not self.space.explain(shape)] if self.spec.more_budgets else left

    @property
    def last_rung(self) -> int:
        return self.spec.rungs.num_trained

    def shape_of(self, trial: int) -> Shape:
        return self._shapes[trial]

    # -- what next ---------------------------------------------------------------------------------------------------------

    def next_action(self) -> NewTrial | Advance | None:
        """The next thing to start, or None while there is nothing but to wait (or nothing left at all).

        What was started and lost goes first. Then shapes go to the first trained rung one after the other, which is what the sampler learns from (an
        enumerated space teaches nobody: all its shapes are seen untrained first); the rungs above it, the lowest first, only while no shape is left to
        begin with. So one worker promotes with all results at hand (LOG.md: 17 to 30 % fewer tokens than going up at once), and a worker that would
        wait for another's result promotes on what has arrived.
        """
        if self.stopped:
            return None
        if begun := self._waiting[None]:
            return Advance(trial=min(begun), rung=0)
        ladder = self._ladder()
        return (
            next((advance for step in ladder for advance in self._advances(step, among=self._lost)), None)
            or (None if self._sampler == "enumerate" else next(self._advances(ladder[0], among=self._waiting[0]), None))
            or self._next_shape()
            or next((advance for step in ladder for advance in self._advances(step, among=self._waiting[step.rung])), None)
        )

    @property
    def _sampler(self) -> Sampler:
        return choose_sampler(self.spec.sampler, space_size=self.space.count())

    def _advances(self, step: _Step, *, among: Collection[int]) -> Iterator[Advance]:
        """Those of some trials that wait at a rung and go on from it, best first."""
        if among:
            waiting = self._waiting[step.rung]
            yield from (Advance(trial=number, rung=step.rung + 1) for number in step.promoted if number in among and number in waiting)

    def left_behind(self) -> list[int]:
        """Trials that wait at a rung from which no one will go up any more.

        Not before everything above has ended: a failure there frees a place for the best of those that wait.
        """
        found: dict[int, None] = {}
        if not self._all_proposed():  # no rung is complete
            return []
        for step in reversed(self._ladder()):
            if not step.complete or not all(self.trials[number].state.is_terminal or number in found for number in step.promoted):
                break
            found |= dict.fromkeys(sorted(self._waiting[step.rung].difference(step.promoted)))
        return list(found)

    def is_finished(self) -> bool:
        """No trial runs or waits, and no shape is left to propose."""
        return not self._open and self.next_action() is None

    def end_reason(self) -> EndReason | None:
        """Why no more shapes are evaluated; None while there may be more. An exhausted space also leaves the controls short."""
        if self.stopped or not self._all_proposed():
            return self.stopped
        is_short = self._num_searched < self.spec.sampler.max_trials or self._num_controls() < self.spec.controls.num_random
        return "space_exhausted" if is_short and self._has_no_more() else "max_trials"

    def _ladder(self) -> list[_Step]:
        """Every rung below the last: who goes on from it (those that already did among them), and whether more may still reach it."""
        ladder: list[_Step] = []
        complete = self._all_proposed()
        for rung in range(self.last_rung):
            behind = self._behind[rung]
            complete = complete and (not behind if rung == 0 else behind.isdisjoint(ladder[-1].promoted))
            promoted = self._goes_on(rung, complete=complete)
            if rung == self.last_rung - 1:
                promoted = self._without_losers(promoted)
            ladder.append(_Step(rung=rung, complete=complete, promoted=promoted))
        return ladder

    def _note_behind(self, number: int) -> None:
        trial = self._trials[number]
        may_arrive = not (trial.is_out or trial.state in (TrialState.STOPPED, TrialState.CANCELLED) or self._is_forced(number))
        for rung, behind in enumerate(self._behind):
            if may_arrive and (trial.rung is None or trial.rung < rung):
                behind.add(number)
            else:
                behind.discard(number)

    def _goes_on(self, rung: int, *, complete: bool) -> tuple[int, ...]:
        """Who goes on from a rung, those that already did among them."""
        known = self._promoted.get(rung)
        if known is None or known.complete is not complete:
            standings = self._standings[rung]
            spread = projected_spread(self.spec.rungs.seed_spread, rung=rung, spec=self.spec.rungs)
            best = standings.promotable(spec=self.spec.rungs, complete=complete, seed_spread=spread)
            # Better ones may have come since an early promotion; it holds all the same, also while its rung is tried again.
            above = self._begun[rung]
            early = sorted(number for number in above.difference(best) if number in standings)
            members = (*best, *early)
            known = self._promoted[rung] = _Promoted(complete=complete, order=members, members=frozenset(members))
        return known.order

    def _without_losers(self, promoted: tuple[int, ...]) -> tuple[int, ...]:
        """Those promoted to the last rung but for the certain losers that have not begun it."""
        below = self.last_rung - 1
        if below == 0 or not self.spec.rungs.stop_losers or self.spec.objectives:
            return promoted
        standings = self._standings[below]
        candidates = {number: standings[number].kl.value for number in promoted if self.reached.get(number, 0) <= below and not self._is_forced(number)}
        if not candidates:
            return promoted
        losers = certain_losers(candidates, finished=list(self._finished.values()))
        return tuple(number for number in promoted if number not in losers)

    def _standing(self, number: int, result: RungResult) -> Standing:
        kl, costs = self._projected(number, rung=result.rung), self._costs(number)
        return Standing(trial=number, depth=self.shape_of(number).num_hidden_layers, kl=kl, forced=self._is_forced(number), costs=costs)

    def _projected(self, number: int, *, rung: int) -> Metric:
        """What a rung is compared by: where the trial's KL is going."""
        results = self.results[number]
        return self._project(results[rung], below=results.get(rung - 1), rung=rung)

    def _project(self, result: RungResult, *, below: RungResult | None, rung: int) -> Metric:
        return result.kl if below is None else project(result.kl, below=below.kl, rung=rung, spec=self.spec.rungs)

    def _costs(self, number: int) -> tuple[float, ...]:
        """The spec's further objectives; infinite where none of its rungs measured one. A latency is measured once, at rung 0."""
        if not self.spec.objectives:
            return ()
        if number not in self._known_costs:
            known = self._closed_costs(self.shape_of(number))
            for result in self.results[number].values():
                known |= result.costs
            self._known_costs[number] = tuple(known.get(name, math.inf) for name in self.spec.objectives)
        return self._known_costs[number]

    def _is_forced(self, number: int) -> bool:
        return number in self._forced

    def known_result(self, action: Advance) -> Known | None:
        """What this rung would measure, where an earlier search knows it. Costs are those under this search's workload; a latency is measured here."""
        known = self._memory.answer(self.shape_of(action.trial), tokens=self.spec.rungs.tokens(action.rung))
        if known is None or (self.spec.scores_tasks(action.rung) and not known.result.tasks):
            return None
        if action.rung == 0 and self.space.budget.latency:
            return None
        return replace(known, result=replace(known.result, costs=self._closed_costs(known.shape)))

    def _closed_costs(self, shape: Shape) -> dict[str, float]:
        costs = self.space.budget.costs(self.space.architecture, shape)
        return {name: float(costs[name]) for name in COSTS}

    # -- shapes ------------------------------------------------------------------------------------------------------------

    def _all_proposed(self) -> bool:
        """Whether every named shape and max_trials shapes in all are proposed, or every legal one is."""
        if self._next_named() is not None:
            return False
        if self._num_searched >= self.spec.sampler.max_trials:
            return True
        return self._has_no_more()

    def _has_no_more(self) -> bool:
        """Whether every legal shape is proposed; trials are never taken back, so it stays so."""
        if not self._is_exhausted and self.space.count() <= len(self._seen):
            self._is_exhausted = all(shape.key in self._seen for shape in self.space.shapes())
        return self._is_exhausted

    def _next_shape(self) -> NewTrial | None:
        if not self._all_proposed():
            return self._next_searched_shape()
        # Controls come last, so that the sampler never learns from them.
        if not any(map(self._is_searched, self._open)):
            return self._next_control()
        return None

    def _next_searched_shape(self) -> NewTrial | None:
        """The next anchor, named shape or proposal of the sampler."""
        if (named := self._next_named()) is not None:
            return named
        proposal = propose(
            self.space,
            sampler=self._sampler,
            observations=self._observations(),
            pending=self._pending(),
            seen=self._seen,
            number=self._num_searched,
            seed=self.spec.seed,
            num_startup_trials=self.spec.sampler.num_startup_trials,
        )
        return NewTrial(origin="sampler", shape=proposal.shape, choices=proposal.choices, budget=self._budget) if proposal else None

    def _pending(self) -> list[Choices]:
        """Choices of the latest trials that run or wait, as many as the sampler is told of, in the order of their numbers."""
        latest = (self._choices_of_trial(number) for number in sorted(self._open, reverse=True) if self._is_searched(number))
        return list(islice((choices for choices in latest if choices is not None), MAX_PENDING_TOLD))[::-1]

    def _next_named(self) -> NewTrial | None:
        """The next anchor or shape of the user's; they are evaluated even where they are more than max_trials."""
        for origin, shape in self._named:
            if shape.key not in self._seen:
                return NewTrial(origin=origin, shape=shape, choices=self._choices_of(shape), budget=self._budget)
        return None

    def _next_control(self) -> NewTrial | None:
        drawn = self._num_controls()
        if drawn >= self.spec.controls.num_random or self._has_no_more():
            return None
        generator = np.random.default_rng([self.spec.seed, 1, drawn])
        for _ in range(1000):
            shape = self.space.draw(generator)
            if shape.key not in self._seen:
                return NewTrial(origin=CONTROL, shape=shape, choices=None, budget=self._budget)
        unseen = next((shape for shape in self.space.shapes() if shape.key not in self._seen), None)
        return NewTrial(origin=CONTROL, shape=unseen, choices=None, budget=self._budget) if unseen else None

    def _num_controls(self) -> int:
        return sum(trial.origin == CONTROL for trial in self.trials.values())

    def _choices_of(self, shape: Shape) -> Choices | None:
        """The choices that stand for a shape, if they do: an anchor outside the ranges teaches the sampler nothing."""
        if shape not in self._choices:
            choices = self.space.choices_of(shape)
            self._choices[shape] = choices if self.space.resolve(choices) == shape else None
        return self._choices[shape]

    def _choices_of_trial(self, number: int) -> Choices | None:
        return self._choices_of(self.shape_of(number))

    def _observations(self) -> list[Observation]:
        """What the sampler learns from: the deepest trained rung with num_startup_trials results, else the first, never a mixture of rungs.

        The value is -log KL on the held-out blocks, projected. A shape that failed or is over a measured ceiling counts as the worst seen: told as a failure,
        TPE asks for it again and again.
        """
        remembered: list[Observation] = []
        told: dict[int, Observation] = {}
        for rung in reversed(range(1, self.last_rung + 1)):
            told = self._told[rung]
            remembered = self._remembered(rung, without=told)
            if len(remembered) + len(told) >= self.spec.sampler.num_startup_trials:
                break
        known = [*remembered, *told.values()]
        out = {number: choices for number in sorted(self._out) if self._is_searched(number) and (choices := self._choices_of_trial(number)) is not None}
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
        at_rung = self._memory.at(self.spec.rungs.tokens(rung))
        if not at_rung:
            return []
        evaluated = {self.shape_of(number) for number in without}
        below = {(known.search, known.trial): known.result for known in self._memory.at(self.spec.rungs.tokens(rung - 1))}
        observations = []
        for known in at_rung:
            # Without the rung below there is no telling where its KL was going, which is what ours are compared by.
            if known.shape in evaluated or (under := below.get((known.search, known.trial))) is None or (choices := self._choices_of(known.shape)) is None:
                continue
            costs = self._closed_costs(known.shape)
            if all(name in costs for name in self.spec.objectives):
                kl = self._project(known.result, below=under, rung=rung)
                observations.append(Observation(choices=choices, value=_value(kl), costs=tuple(costs[name] for name in self.spec.objectives)))
        return observations

    def observations(self, *, most: int) -> list[Observation]:
        """What the sampler was last told, evenly thinned out to at most so many."""
        told = self._observations()
        step = -(-len(told) // most) or 1
        return told[::step]

    def _is_searched(self, number: int) -> bool:
        return self.trials[number].origin != CONTROL

    # -- ranking -----------------------------------------------------------------------------------------------------------

    def scales(self, prepared: dict[str, object]) -> tuple[TaskScale, ...]:
        """The teacher's and random weights' scores between which the objective is measured."""
        teacher, random = (RungResult.from_dict(prepared[name]) for name in ("teacher", "random"))  # type: ignore[arg-type]
        return tuple(make_scales(self.spec.tasks, teacher=teacher, random=random))

    def signals(self, prepared: dict[str, object]) -> tuple[TaskSignal, ...]:
        """How clear of random weights the teacher stands on each task."""
        teacher, random = (RungResult.from_dict(prepared[name]) for name in ("teacher", "random"))  # type: ignore[arg-type]
        return read_signals(self.spec.tasks, teacher=teacher, random=random)

    def board(self, prepared: dict[str, object], *, confirmations: Mapping[int, Confirmation]) -> Board:
        """The leaderboard of all results so far."""
        trials = [
            CompletedTrial(
                number=number, origin=trial.origin, shape=self.shape_of(number), parameters=trial.parameters, state=trial.state, results=self.results[number]
            )
            for number, trial in self.trials.items()
            if number in self.results
        ]
        teacher = count_parameters(self.space.architecture, self.space.architecture.shape).total
        return rank(
            trials,
            scales=self.scales(prepared),
            teacher_parameters=teacher,
            spec=self.spec.rungs,
            num_finalists=self.spec.num_finalists,
            confirmations=confirmations,
            objectives=self.spec.objectives,
            seed_spread=self.spec.rungs.seed_spread,
        )

    def to_confirm(self, board: Board) -> list[int]:
        """The finalists, with several objectives the whole front, and every forced trial of the last rung: what is compared on held-out documents."""
        wanted = {*board.finalists, *(board.pareto if self.spec.objectives else ())}
        return [row.number for row in board.rows if row.rung == self.last_rung and (row.number in wanted or self._is_forced(row.number))]


def _value(kl: Metric) -> float:
    """What the sampler makes large."""
    return -math.log(max(kl.value, 1e-12))
