"""One search as the controller sees it: its spec, trials and results in memory, and what should happen next.

Decisions are a function of what the store holds and of nothing else, so a controller that takes over decides as the one
that died would have. Touches no store, no executor and no clock. Who goes on is worked out in `ladder.py`, what is proposed in `proposals.py`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from nas.cost import count_parameters
from nas.search.confirmed import Confirmation
from nas.search.leaderboard import Board
from nas.search.objective import TaskScale, make_scales
from nas.search.ranking import CompletedTrial, rank
from nas.search.results import RungResult, is_repeat, training_seed
from nas.search.study import MIN_FOR_IMPORTANCE, Observation
from nas.search.task_signals import TaskSignal, read_signals
from nas.shape import Shape
from nas.space import build_space
from nas.spec import parse_spec
from nas.store.records import AttemptRecord, RungRecord, SearchRecord, TrialRecord, TrialState
from nas.warm_start import Known, Memory
from workers.actions import Advance, EndReason, LimitReason, NewTrial
from workers.evidence import Evidence
from workers.ladder import Ladder, Step
from workers.proposals import Proposals


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
        self._trials: dict[int, TrialRecord] = {}
        self.trials: Mapping[int, TrialRecord] = MappingProxyType(self._trials)
        """By number; changed by `set_trial` alone."""
        self.evidence = Evidence(self.spec, space=self.space)
        self.results = self.evidence.results
        self.ladder = Ladder(self.evidence, trials=self.trials)
        self.reached = self.ladder.reached
        """Deepest rung of a trial that was ever started, however it ended."""
        anchors = self.space.anchors() if self.spec.controls.anchors else {}
        named = [*((f"anchor:{name}", shape) for name, shape in anchors.items()), *(("user", shape) for shape in self._shapes_of_user())]
        self.proposals = Proposals(self.evidence, trials=self.trials, memory=self._memory, budget=budget, seen=seen if seen is not None else set(), named=named)
        self._open: set[int] = set()
        """Trials that run or wait."""
        self._waiting: defaultdict[int | None, set[int]] = defaultdict(set)
        """Trials that wait, by their deepest finished rung."""
        self._lost: set[int] = set()
        """Of those that wait: whose next rung was started before, and lost."""
        self.stopped: LimitReason | None = None
        """The limit that ended it, if one did."""
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
        self._trials[number] = trial
        if before is None:
            self.evidence.add_trial(trial)
            self.proposals.add_trial(trial)
        else:
            self._waiting[before.rung].discard(number)
        if trial.state is TrialState.WAITING:
            self._waiting[trial.rung].add(number)
        (self._open.discard if trial.state.is_terminal else self._open.add)(number)
        self._note_lost(number)
        self.ladder.set_trial(trial)
        self.proposals.set_trial(trial)

    def add_start(self, trial: int, *, rung: int) -> None:
        """A rung of a trial starts: whatever becomes of it, the trial was promoted to it."""
        self.ladder.add_start(trial, rung=rung)
        self._note_lost(trial)

    def _note_lost(self, number: int) -> None:
        trial = self._trials[number]
        if trial.state is TrialState.WAITING and trial.rung is not None and self.reached.get(number, 0) > trial.rung:
            self._lost.add(number)
        else:
            self._lost.discard(number)

    def add_result(self, trial: int, result: RungResult) -> None:
        """Must be called in finish order: the sampler is fed in it."""
        self.evidence.add_result(trial, result)
        self.ladder.add_result(trial, result)
        self.proposals.add_result(trial)

    def _shapes_of_user(self) -> list[Shape]:
        """Those that fit this budget, and none before it."""
        before = [build_space(self.spec, inputs=self.inputs, budget=earlier) for earlier in range(self._budget)]
        left = [shape for shape in self.spec.shapes if all(space.explain(shape) for space in before)]
        return [shape for shape in left if not self.space.explain(shape)] if self.spec.more_budgets else left

    @property
    def last_rung(self) -> int:
        return self.spec.rungs.num_trained

    def shape_of(self, trial: int) -> Shape:
        return self.evidence.shapes[trial]

    def seed_of(self, trial: int) -> int:
        """Of the trial's data order."""
        return training_seed(self.spec, origin=self.trials[trial].origin)

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
        steps = self._steps()
        return (
            next((advance for step in steps for advance in self._advances(step, among=self._lost)), None)
            or (None if self.proposals.sampler == "enumerate" else next(self._advances(steps[0], among=self._waiting[0]), None))
            or self.proposals.next_shape()
            or next((advance for step in steps for advance in self._advances(step, among=self._waiting[step.rung])), None)
        )

    def _steps(self) -> list[Step]:
        return self.ladder.steps(all_proposed=self.proposals.are_all())

    def _advances(self, step: Step, *, among: Collection[int]) -> Iterator[Advance]:
        """Those of some trials that wait at a rung and go on from it, best first."""
        if among:
            waiting = self._waiting[step.rung]
            yield from (Advance(trial=number, rung=step.rung + 1) for number in step.promoted if number in among and number in waiting)

    def left_behind(self) -> list[int]:
        """Trials that wait at a rung from which no one will go up any more.

        Not before everything above has ended: a failure there frees a place for the best of those that wait.
        """
        found: dict[int, None] = {}
        if not self.proposals.are_all():  # no rung is complete
            return []
        for step in reversed(self._steps()):
            if not step.complete or not all(self.trials[number].state.is_terminal or number in found for number in step.promoted):
                break
            found |= dict.fromkeys(sorted(self._waiting[step.rung].difference(step.promoted)))
        return list(found)

    def is_finished(self) -> bool:
        """No trial runs or waits, and no shape is left to propose."""
        return not self._open and self.next_action() is None

    def end_reason(self) -> EndReason | None:
        """Why no more shapes are evaluated; None while there may be more. An exhausted space also leaves the controls short."""
        if self.stopped or not self.proposals.are_all():
            return self.stopped
        return "space_exhausted" if self.proposals.is_short() and self.proposals.has_no_more() else "max_trials"

    def known_result(self, action: Advance) -> Known | None:
        """What this rung would measure, where an earlier search knows it. Costs are those under this search's workload; a latency is measured here."""
        if is_repeat(self.trials[action.trial].origin):  # what is known of the shape is of another seed
            return None
        known = self._memory.answer(self.shape_of(action.trial), tokens=self.spec.rungs.tokens(action.rung))
        if known is None or (self.spec.scores_tasks(action.rung) and not known.result.tasks):
            return None
        if action.rung == 0 and self.space.budget.latency:
            return None
        return replace(known, result=replace(known.result, costs=self.evidence.closed_costs(known.shape)))

    def observations(self, *, most: int) -> list[Observation]:
        """What says which choices mattered: as the sampler is told, of a rung with enough results; evenly thinned out to at most so many."""
        told = self.proposals.observations(at_least=MIN_FOR_IMPORTANCE)
        step = -(-len(told) // most) or 1
        return told[::step]

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
                number=number,
                origin=trial.origin,
                seed=self.seed_of(number),
                shape=self.shape_of(number),
                parameters=trial.parameters,
                state=trial.state,
                results=self.results[number],
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
            seed_spreads=[self.evidence.seed_spread(rung) for rung in range(1, self.last_rung + 1)],
        )

    def to_confirm(self, board: Board) -> list[int]:
        """The finalists, with several objectives the whole front, and every forced trial of the last rung: what is compared on held-out documents."""
        wanted = {*board.finalists, *(board.pareto if self.spec.objectives else ())}
        return [row.number for row in board.rows if row.rung == self.last_rung and (row.number in wanted or self.evidence.is_forced(row.number))]
