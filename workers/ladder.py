"""Who goes on from which rung of one budget: `nas/search/rungs.py` asked only where something came that can change its answer.

An index over the store's content: a rebuilt one answers the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nas.search.results import RungResult, is_repeat
from nas.search.rungs import Standings, certain_losers
from nas.store.records import TrialRecord, TrialState
from workers.evidence import Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
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


class Ladder:
    """The rungs below the last, and who has finished, begun and may still reach each."""

    def __init__(self, evidence: Evidence, *, trials: Mapping[int, TrialRecord]) -> None:
        """`trials`: by number, kept by the caller."""
        self._evidence, self._trials, self._spec = evidence, trials, evidence.spec.rungs
        self.last_rung = evidence.spec.rungs.num_trained
        self.reached: dict[int, int] = {}
        """Deepest rung of a trial that was ever started, however it ended."""
        self._begun: list[set[int]] = [set() for _ in range(self.last_rung)]
        """By rung: trials of which a deeper one was ever started."""
        self._standings = [Standings(rung) for rung in range(self.last_rung)]
        """By rung: the results that count there."""
        self._behind: list[set[int]] = [set() for _ in range(self.last_rung)]
        """By rung: trials that have not finished it and might, if they go on from the one below; forced ones, which nobody waits for, are not among them."""
        self._finished: dict[int, tuple[float, float]] = {}
        """What the rung below the last and the last one are compared by, of the trials that finished it."""
        self._promoted: dict[int, _Promoted] = {}
        """By rung, while nothing has come that can change it."""

    def set_trial(self, trial: TrialRecord) -> None:
        """A trial that is new, or changed."""
        self._note_behind(trial)
        if trial.is_out:
            # The places it held go to the next best.
            for rung, standings in enumerate(self._standings):
                if standings.remove(trial.number):
                    self._promoted.pop(rung, None)

    def add_start(self, trial: int, *, rung: int) -> None:
        """A rung of a trial starts: whatever becomes of it, the trial was promoted to it."""
        self.reached[trial] = max(rung, self.reached.get(trial, 0))
        for below in range(rung):
            self._begun[below].add(trial)
            if below in self._promoted and trial not in self._promoted[below].members:
                del self._promoted[below]

    def add_result(self, trial: int, result: RungResult) -> None:
        """A result that the evidence has already."""
        evidence = self._evidence
        if result.rung == self.last_rung and self.last_rung - 1 in evidence.results[trial] and not is_repeat(self._trials[trial].origin):
            below, last = (evidence.projected(trial, rung=rung).value for rung in (self.last_rung - 1, self.last_rung))
            if below > 0:
                self._finished[trial] = below, last
        if result.rung < self.last_rung and not self._trials[trial].is_out:
            self._standings[result.rung].add(evidence.standing(trial, rung=result.rung))
            self._promoted.pop(result.rung, None)

    def steps(self, *, all_proposed: bool) -> list[Step]:
        """Every rung below the last: who goes on from it (those that already did among them), and whether more may still reach it.

        Args:
            all_proposed: no further shape will be proposed but controls.
        """
        steps: list[Step] = []
        complete = all_proposed
        for rung in range(self.last_rung):
            behind = self._behind[rung]
            complete = complete and (not behind if rung == 0 else behind.isdisjoint(steps[-1].promoted))
            promoted = self._goes_on(rung, complete=complete)
            if rung == self.last_rung - 1:
                promoted = self._without_losers(promoted)
            steps.append(Step(rung=rung, complete=complete, promoted=promoted))
        return steps

    def _note_behind(self, trial: TrialRecord) -> None:
        may_arrive = not (trial.is_out or trial.state in (TrialState.STOPPED, TrialState.CANCELLED) or self._evidence.is_forced(trial.number))
        for rung, behind in enumerate(self._behind):
            if may_arrive and (trial.rung is None or trial.rung < rung):
                behind.add(trial.number)
            else:
                behind.discard(trial.number)

    def _goes_on(self, rung: int, *, complete: bool) -> tuple[int, ...]:
        """Who goes on from a rung, those that already did among them."""
        known = self._promoted.get(rung)
        if known is None or known.complete is not complete:
            standings = self._standings[rung]
            best = standings.promotable(spec=self._spec, complete=complete, seed_spread=self._evidence.seed_spread(rung).value)
            # Better ones may have come since an early promotion; it holds all the same, also while its rung is tried again.
            above = self._begun[rung]
            early = sorted(number for number in above.difference(best) if number in standings)
            members = (*best, *early)
            known = self._promoted[rung] = _Promoted(complete=complete, order=members, members=frozenset(members))
        return known.order

    def _without_losers(self, promoted: tuple[int, ...]) -> tuple[int, ...]:
        """Those promoted to the last rung but for the certain losers that have not begun it."""
        below = self.last_rung - 1
        if below == 0 or not self._spec.stop_losers or self._evidence.spec.objectives:
            return promoted
        standings, evidence = self._standings[below], self._evidence
        waiting = [number for number in promoted if self.reached.get(number, 0) <= below and not evidence.is_forced(number)]
        if not waiting:
            return promoted
        losers = certain_losers({number: standings[number].kl.value for number in waiting}, finished=list(self._finished.values()))
        return tuple(number for number in promoted if number not in losers)
