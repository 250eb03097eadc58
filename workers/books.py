"""One search as its controller has it in memory, and every write that keeps the store and this in step. It starts no step and decides nothing.

Whatever is here can be read from the store again (`load`), which is what a controller that takes over does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nas.budget import measured_excess
from nas.errors import Conflict
from nas.search.confirmed import Confirmation
from nas.search.layout import clear_below
from nas.search.leaderboard import Board
from nas.search.results import RungResult
from nas.store.records import OVER_BUDGET, WORKING, AttemptRecord, AttemptState, SearchRecord, SearchState, Stage, TrialState, all_winners
from nas.trial_files import REUSED, find_tree
from nas.warm_start import Known, recall
from workers.actions import LIMIT_REASONS, Advance, NewTrial
from workers.board import make_board
from workers.family import Family
from workers.folders import SearchFolder
from workers.limits import Excess, Limits
from workers.watch import Leader

logger = logging.getLogger(__name__)

BOARD_SECONDS_PER_TRIAL = 0.005
"""Between two leaderboards stored. One costs the controller about a twentieth of that for every trial on it (LOG), so at most 5 % of its time."""
_ENDS_FROM = (SearchState.QUEUED, *WORKING, SearchState.PAUSING)
"""A search that ends while somebody asks for a pause has ended."""


class Books:
    """The memory of one search: its record, its trials and results, its leaderboard."""

    def __init__(self, record: SearchRecord, *, leader: Leader) -> None:
        self._leader, self._store, self._fence, self._clock = leader, leader.store, leader.fence, leader.clock
        self.record = record
        self.folder = SearchFolder.of(record.id, settings=leader.settings)
        self._stored_board = -math.inf
        """The clock when the board was stored last."""
        self.load()
        self._store.recount_trials(record.id, fence=self._fence)

    def load(self) -> None:
        """Read all but the record from the store."""
        search_id = self.record.id
        self.num_requests = self.record.num_requests
        """Requests of users that are in memory. The record is read again after some writes, and may know of more."""
        self.prepared = self._store.get_prepared(search_id)
        trials, rungs, attempts = self._store.list_trials(search_id), self._store.list_rungs(search_id), self._store.list_attempts(search_id)
        self.run = Family(self.record, trials=trials, rungs=rungs, attempts=attempts, memory=recall(self.record, store=self._store))
        if (limit := next((limit for limit in LIMIT_REASONS if limit == self.record.end_reason), None)) is not None:
            self.run.stop(limit)
        self.limits = Limits(self.run.spec.limits, attempts=attempts, times=self._store.times_of(search_id), clock=self._clock)
        self.confirmations = {number: Confirmation.from_dict(found) for number, found in self._store.list_confirmations(search_id).items()}
        self._final_boards: tuple[Board, ...] | None = None
        """While confirming: the board of each budget with what was confirmed so far."""
        self._board_is_old = bool(self.run.results)

    def reload(self) -> None:
        """Read the search from the store again, whatever memory says."""
        self.record = self._store.get_search(self.record.id)
        self.load()

    # -- trials ------------------------------------------------------------------------------------------------------------

    def refresh_trial(self, number: int) -> None:
        """A trial as the store has it by now."""
        self.run.set_trial(self._store.get_trial(self.record.id, number))

    def add_trial(self, new: NewTrial) -> None:
        """Propose a shape."""
        run = self.run
        trial = self._store.add_trial(
            run.id,
            number=len(run.trials),
            origin=new.origin,
            shape=new.shape.as_dict(),
            choices=new.choices.as_dict() if new.choices else None,
            parameters=run.runs[new.budget].space.parameters(new.shape),
            budget=new.budget,
            fence=self._fence,
        )
        run.set_trial(trial)

    def change_trial(self, number: int, *, to: TrialState, failure: dict[str, Any] | None = None) -> None:
        """Move a trial."""
        self.run.set_trial(self._store.change_trial(self.record.id, number, to=to, failure=failure, fence=self._fence))
        self._board_is_old = True

    def end_trials(self, *, failure: dict[str, Any] | None = None) -> None:
        """Cancel every trial that has not ended, with the reason."""
        for trial in list(self.run.trials.values()):
            if not trial.state.is_terminal:
                stage = f"rung {0 if trial.rung is None else trial.rung + 1}"
                self.change_trial(trial.number, to=TrialState.CANCELLED, failure=None if failure is None else {"stage": stage, **failure})

    def stop_left_behind(self) -> None:
        """Stop the trials that nobody will promote any more."""
        for number in self.run.left_behind():
            self.change_trial(number, to=TrialState.STOPPED)
            self.drop_trial(number)

    def drop_trial(self, number: int) -> None:
        """Delete the files of a trial: it has ended without a student worth keeping, or the disk is full."""
        self.folder.drop_trial(number, attempts=self._attempt_ids(number))

    def _attempt_ids(self, number: int) -> list[str]:
        """Of a trial, where each has its own files."""
        return [] if self.folder.shared is None else [attempt.id for attempt in self._store.list_attempts(self.record.id, trial=number)]

    def attempts_of(self, stage: Stage, *, trial: int | None, rung: int | None) -> list[AttemptRecord]:
        """Attempts of one step, those that count."""
        attempts = self._store.list_attempts(self.record.id, trial=trial)
        return [attempt for attempt in attempts if (attempt.stage, attempt.trial, attempt.rung, attempt.counts) == (stage, trial, rung, True)]

    # -- results -----------------------------------------------------------------------------------------------------------

    def record_result(self, attempt: AttemptRecord, result: dict[str, Any], *, log: str | None, device_seconds: float) -> None:
        """Keep what a step returned, and its attempt's success."""
        search_id, number = self.record.id, attempt.trial
        match attempt.stage:
            case "rung":
                assert number is not None
                self.record_rung(attempt, number, result, log=log, device_seconds=device_seconds)
                return
            case "confirm":
                assert number is not None
                self.save_confirmation(attempt.id, number, confirmation=result, log=log, device_seconds=device_seconds)
                return
            case "prepare":
                if self.prepared is None:  # else it was made again: trials were measured against the first
                    self._store.save_prepared(search_id, result, fence=self._fence)
                    self.prepared = self._store.get_prepared(search_id)
            case "bundle":
                assert number is not None
                self._save_winner(number, result)
                self._board_is_old = True
        self._store.finish_attempt(attempt.id, state=AttemptState.SUCCEEDED, reason=None, log=log, device_seconds=device_seconds, fence=self._fence)
        self.record = self._store.get_search(search_id)

    def record_rung(self, attempt: AttemptRecord, number: int, result: dict[str, Any], *, log: str | None = None, device_seconds: float = 0.0) -> None:
        """Keep the result of a rung, and what follows from it for its trial."""
        rung_result = RungResult.from_dict(result)
        is_last = rung_result.rung == self.run.last_rung
        failure = self._over_budget(number, rung_result)
        self._store.record_rung(
            attempt.id,
            search_id=self.record.id,
            trial=number,
            rung=rung_result.rung,
            result=result,
            trial_state=TrialState.STOPPED if failure else TrialState.COMPLETED if is_last else TrialState.WAITING,
            failure=failure,
            log=log,
            device_seconds=device_seconds,
            fence=self._fence,
        )
        self.refresh_trial(number)
        self.run.add_result(number, rung_result)
        # The next rung resumes this one's trunk; after the last, only the student is needed.
        clear_below(self.folder.trial(number), rung=rung_result.rung + 1 if is_last else rung_result.rung)
        tree = REUSED if rung_result.reused_from is not None else attempt.id
        self.folder.drop_superseded(number, attempts=self._attempt_ids(number), tree=tree)
        if failure:
            self.drop_trial(number)
        self.stop_left_behind()
        self._board_is_old = True

    def _over_budget(self, number: int, result: RungResult) -> dict[str, Any] | None:
        """Why a trial's measured costs end it, None if they do not. It is no failure of ours: the sampler learns it, and the search goes on."""
        excess = measured_excess(self.run.spec.budgets[self.run.trials[number].budget], result.costs)
        if not excess:
            return None
        return {"stage": f"rung {result.rung}", "reason": OVER_BUDGET, "message": "; ".join(map(str, excess)), "attempts": 1}

    def reuse(self, action: Advance, known: Known) -> bool:
        """Take a rung's result from an earlier search; False where that needs the student and it is gone."""
        if action.rung == self.run.last_rung:
            source = SearchFolder.of(known.search, settings=self._leader.settings)
            tree = find_tree(known.search, known.trial, store=self._store)
            if not self.folder.take_student(action.trial, source=source, source_number=known.trial, tree=tree):
                return False
        origin = {"search": known.search, "trial": known.trial}
        result = replace(known.result, rung=action.rung, seconds={}, reused_from=origin)
        attempt = self._store.start_attempt(self.record.id, stage="rung", trial=action.trial, rung=action.rung, fence=self._fence)
        self.run.add_start(action.trial, rung=action.rung)
        self.record_rung(attempt, action.trial, result.as_dict())
        logger.info("rung known from an earlier search", extra={"action": "rung_reused", "search_id": self.record.id, "trial_number": action.trial, **origin})
        return True

    def _save_winner(self, number: int, result: dict[str, Any]) -> None:
        """The first winner is the search's, those of the other budgets are kept with it."""
        bundle = str(Path(result["bundle"]).relative_to(self._leader.settings.data_folder))
        winner, first = {**result, "bundle": bundle, "budget": self.run.trials[number].budget}, self._store.get_search(self.record.id).winner
        if first is not None:
            winner = {**first, "more": [*first.get("more", ()), winner]}
        self._store.save_winner(self.record.id, winner, fence=self._fence)

    def save_confirmation(
        self, attempt_id: str | None, number: int, *, confirmation: dict[str, Any], log: str | None = None, device_seconds: float | None = None
    ) -> None:
        """Keep what the confirm step found of a trial."""
        self._store.save_confirmation(
            attempt_id, search_id=self.record.id, trial=number, confirmation=confirmation, log=log, device_seconds=device_seconds, fence=self._fence
        )
        self.refresh_trial(number)
        self.confirmations[number], self._final_boards = Confirmation.from_dict(confirmation), None
        self._board_is_old = True

    def students_to_keep(self) -> set[int]:
        """Trials whose student stays when the search has ended."""
        verified = {number for number, confirmation in self.confirmations.items() if confirmation.verified}
        match self.run.spec.retention.students:
            case "finalists":
                return verified
            case "pareto":
                return verified.intersection(*[{number for board in self.final_boards() for number in board.pareto}]) if verified else set()
            case "best":
                return {winner["trial"] for winner in all_winners(self.record)}
            case "none":
                return set()

    def free_disk(self, excess: Excess) -> int:
        """Drop checkpoints of trials that wait, the worst first, until the excess is gone; returns how many bytes are. Promoted again, they start anew."""
        waiting = [number for number, trial in self.run.trials.items() if trial.state is TrialState.WAITING and trial.rung]
        waiting.sort(key=lambda number: -self.run.results[number][max(self.run.results[number])].kl.value)
        freed = 0
        for number in waiting:
            if freed >= excess.num_bytes:
                break
            freed += excess.use.of_trial(number)
            self.drop_trial(number)
            logger.info("checkpoints dropped for the disk budget", extra={"action": "checkpoints_dropped", "search_id": self.record.id, "trial_number": number})
        return freed

    # -- the board ---------------------------------------------------------------------------------------------------------

    def final_boards(self) -> Sequence[Board]:
        """The board of each budget with what was confirmed so far."""
        self._final_boards = self._final_boards or self.run.boards(self.prepared or {}, confirmations=self.confirmations)
        return self._final_boards

    def board(self) -> dict[str, Any] | None:
        """The leaderboard now; None before there is anything to compare with."""
        if self.prepared is None:
            return None
        board = make_board(self.run, prepared=self.prepared, confirmations=self.confirmations)
        importances = {winner["budget"]: winner.get("importances", {}) for winner in all_winners(self.record)}
        more = [{**other, "importances": importances.get(budget, {})} for budget, other in enumerate(board["more_budgets"], start=1)]
        return {**board, "importances": importances.get(0, {}), "more_budgets": more}

    def save_board_in_time(self) -> None:
        """Store the leaderboard, if it is old and the last one was not stored just now."""
        if self._clock() - self._stored_board >= BOARD_SECONDS_PER_TRIAL * len(self.run.trials):
            self.save_board()

    def save_board(self) -> None:
        """Store the leaderboard, if it is old."""
        if self._board_is_old and (board := self.board()) is not None:
            self._store.save_board(self.record.id, board, fence=self._fence)
            self._board_is_old, self._stored_board = False, self._clock()

    # -- the search --------------------------------------------------------------------------------------------------------

    def move(self, to: SearchState, *, error: dict[str, Any] | None = None, data: dict[str, Any] | None = None, end_reason: str | None = None) -> None:
        """Change the search's state. It may have been cancelled or paused since the tick began: the next tick sees that."""
        expected: Collection[SearchState]
        if self.record.state is SearchState.CANCELLING and to.is_terminal:
            expected = [SearchState.CANCELLING]
        elif to is SearchState.PAUSED:
            expected = [SearchState.PAUSING]
        else:
            expected = _ENDS_FROM if to.is_terminal else (SearchState.QUEUED, *WORKING)
        try:
            self.record = self._store.change_search(
                self.record.id,
                fence=self._fence,
                to=to,
                expected=expected,
                error=error,
                data=data,
                end_reason=end_reason,
                # From then on no more shapes are evaluated: an extension or a retry of this moment was accepted, and comes first.
                num_requests=self.num_requests if to is SearchState.CONFIRMING else None,
            )
        except Conflict as conflict:
            logger.info("state not changed: %s", conflict, extra={"action": "state_conflict", "search_id": self.record.id, "to": to})
