"""Carries out one search: starts the steps that `Family` asks for, decides what their ends mean, and cleans up behind them.

Everything is decided from the store: each state of the search is left because of what the store holds, and every write
may be followed by a crash, after which the next controller comes to the same decision. What is written is in `books.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from nas.chain import awaited_source
from nas.errors import TeacherUnavailable
from nas.search.layout import prepared_key
from nas.search.results import CONTROL, is_repeat
from nas.spec import dump_spec
from nas.store.records import OVER_BUDGET, ActiveSearch, AttemptRecord, SearchRecord, SearchState, Stage, TrialState, all_winners
from nas.submission import take_teacher
from nas.trial_files import find_tree
from workers.actions import Advance, LimitReason, NewTrial
from workers.books import Books
from workers.family import Family
from workers.outcome import NOT_PREPARED, Outcome
from workers.recount import Recount
from workers.steps import Steps
from workers.tries import num_memory_failures
from workers.verdicts import check_result
from workers.watch import Leader

logger = logging.getLogger(__name__)

MAX_FOR_IMPORTANCE = 200
"""Observations from which the importance of each dimension is worked out, in the bundle step: seconds there, minutes for a thousand (LOG.md)."""


class Conductor:
    """One search of this controller."""

    def __init__(self, record: SearchRecord, *, leader: Leader) -> None:
        self._leader, self._store, self._fence = leader, leader.store, leader.fence
        self._books = Books(record, leader=leader)
        self.folder = self._books.folder
        self.steps = Steps(record, leader=leader, folder=self.folder, resources=self._run.spec.resources, pauses_on_full_disk=True)
        self._recount = Recount(self.folder)
        self.prepared_key = prepared_key(self._run.spec, inputs=self._run.inputs)
        self._must_prepare = False
        """A step found no prepared folder, though there was one."""

    @property
    def record(self) -> SearchRecord:
        return self._books.record

    @property
    def _run(self) -> Family:
        return self._books.run

    @property
    def is_preparing(self) -> bool:
        return any(running.attempt.stage == "prepare" for running in self.steps.running.values())

    def reload(self) -> None:
        """Read the search from the store again, whatever memory says; attempts that run there and not here are lost."""
        self.steps.lose_unknown()
        self._books.reload()
        self.prepared_key = prepared_key(self._run.spec, inputs=self._run.inputs)

    def note(self, active: ActiveSearch) -> None:
        """The search as the store has it now: users pause, resume and cancel it, retry trials and extend it."""
        if active.num_requests != self._books.num_requests:
            self.reload()
        elif active.state is not self.record.state:
            self._books.record = replace(self.record, state=active.state)

    def advance(self, *, may_prepare: Callable[[], bool]) -> None:
        """Pass on progress, enforce limits, and start what should run next.

        Args:
            may_prepare: whether the search's prepared folder may be filled now.
        """
        self.steps.follow()
        self._heed_wishes()
        self.steps.enforce(self._run.spec.limits)
        self._books.save_board_in_time()
        match self.record.state:
            case SearchState.QUEUED:
                self._leave_queue()
            case SearchState.PREPARING:
                self._prepare(may_prepare)
            case SearchState.SEARCHING if self._must_prepare and not self._run.stopped:
                self._prepare_again(may_prepare)
            case SearchState.SEARCHING:
                self._search()
            case SearchState.CONFIRMING if self.record.winner is not None and not self._run.spec.more_budgets:
                self._books.save_board()
                self._end(SearchState.SUCCEEDED)
            case SearchState.CONFIRMING if self._must_prepare:
                self._prepare_again(may_prepare)
            case SearchState.CONFIRMING:
                self._confirm()
            case SearchState.PAUSING if not self.steps.running:
                self._books.save_board()
                self._books.move(SearchState.PAUSED, error=self.record.error)
            case SearchState.CANCELLING if not self.steps.running:
                self._books.end_trials()
                self._books.save_board()
                self._end(SearchState.CANCELLED)
            case _:
                pass

    # -- what is asked of it -----------------------------------------------------------------------------------------------

    def _heed_wishes(self) -> None:
        """Ask the running steps to stop where the search is cancelled or paused, or a limit of it is reached."""
        match self.record.state:
            case SearchState.CANCELLING:
                self.steps.watch.stop("cancelled")
            case SearchState.PAUSING:
                self.steps.watch.stop("paused")
            case SearchState.PREPARING | SearchState.SEARCHING:
                limits, running = self._books.limits, self.steps.watch.device_seconds()
                if (reached := limits.reached(running_device_seconds=running)) is not None:
                    self.steps.watch.stop(reached)
                    self._run.stop(reached)
                elif (excess := limits.disk_excess(self.folder)) is not None and self._books.free_disk(excess) < excess.num_bytes:
                    message = f"the search's folder is {excess.num_bytes} bytes over limits.max_disk_bytes={self._run.spec.limits.max_disk_bytes}"
                    self._pause("disk_budget", message=f"{message}, with no checkpoint left that could go")

    def _pause(self, reason: str, *, message: str) -> None:
        """Pause by itself, for a reason that the user must see and do something about."""
        error = {"reason": reason, "message": message[:4000]}
        logger.error("search pauses: %s", reason, extra={"action": "search_pausing", "search_id": self.record.id, "reason": reason})
        self._books.move(SearchState.PAUSING, error=error)

    def _leave_queue(self) -> None:
        if (waited := self._books.limits.queued_too_long()) is not None:
            self.fail(reason="queued_too_long", message=waited)
        elif (source := awaited_source(self.record.inputs)) is not None:
            self._await_teacher(source)
        else:
            self._books.move(SearchState.PREPARING)

    def _await_teacher(self, source: str) -> None:
        """Stay in the queue until the search whose winner is the teacher has ended, then take the winner."""
        found = self._store.search_versions([source]).get(source)
        state = None if found is None else found[1]
        if state is not None and not state.is_terminal:
            return
        try:
            if state is not SearchState.SUCCEEDED:
                raise TeacherUnavailable(f"search {source}: expected one with a winner, got {state or 'no such search'}")
            taken = take_teacher(self.record, store=self._store, data_folder=self._leader.settings.data_folder)
        except TeacherUnavailable as unavailable:
            self.fail(reason="teacher_unavailable", message=str(unavailable))
            return
        if self._store.replan_search(self.record, spec=dump_spec(taken.spec), inputs=taken.inputs, plan=taken.plan, fence=self._fence):
            logger.info("teacher known", extra={"action": "teacher_known", "search_id": self.record.id, "source": source})
        self.reload()

    # -- what ended --------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Record how steps ended."""
        self.steps.settle(self)

    def check_result(self, attempt: AttemptRecord, result: dict[str, Any]) -> None:
        """Refuse what no step can have come to.

        Raises:
            Untrue, Undecided
        """
        run, trial = self._run, None if attempt.trial is None else self._run.trials[attempt.trial]
        architecture, count = run.runs[0].space.architecture, partial(self._recount.count, attempt)
        check_result(result, attempt=attempt, spec=run.spec, architecture=architecture, trial=trial, folders=self.folder, count=count)

    def keep_result(self, attempt: AttemptRecord, result: dict[str, Any], *, log: str | None, device_seconds: float) -> None:
        """Store a result, and its attempt's success."""
        self._books.record_result(attempt, result, log=log, device_seconds=device_seconds)
        self._books.limits.count(device_seconds)
        if attempt.stage == "prepare":
            self._must_prepare = False

    def note_failure(self, attempt: AttemptRecord, outcome: Outcome, *, device_seconds: float) -> None:
        """An attempt, of which the store knows the end, came to nothing."""
        self._books.limits.count(device_seconds)
        if attempt.trial is not None:
            self._books.refresh_trial(attempt.trial)
        if outcome.reason == NOT_PREPARED:
            self._must_prepare = True
        if outcome.reason == "disk_full":
            self._pause("disk_full", message=outcome.message)
        elif attempt.stage in ("rung", "confirm"):  # the others end the search when they are spent: that waits until all is settled
            self._give_up_if_spent(attempt.stage, trial=attempt.trial, rung=attempt.rung)

    # -- what failed -------------------------------------------------------------------------------------------------------

    def _give_up_if_spent(self, stage: Stage, *, trial: int | None, rung: int | None) -> bool:
        """Give a step up that may not be tried again. Asked after a failure, and before every start: a crash may have come between."""
        attempts = self._books.attempts_of(stage, trial=trial, rung=rung)
        spent = self.steps.find_spent(attempts, limits=self._run.spec.limits)
        if spent is None:
            return False
        log = self.steps.last_lines(spent.last)
        self._give_up(stage, trial=trial, rung=rung, reason=spent.reason, message=spent.message, tries=spent.num_tries, log=log)
        return True

    def _give_up(self, stage: Stage, *, trial: int | None, rung: int | None, reason: str, message: str, tries: int, log: str) -> None:
        """A step failed for good: a rung fails its trial, a confirmation leaves its trial unverified, the others fail the search."""
        if stage == "rung" and trial is not None:
            failure = {"stage": f"rung {rung}", "reason": reason, "message": message[:2000], "attempts": tries, "log": log}
            self._books.change_trial(trial, to=TrialState.FAILED, failure=failure)
            self._books.drop_trial(trial)
            self._books.stop_left_behind()
        elif stage == "confirm" and trial is not None:
            confirmation = {"verified": False, "reason": f"{reason}: {message}"[:2000], "log": log}
            self._books.save_confirmation(None, trial, confirmation=confirmation)
        else:
            self.fail(reason=reason, message=f"{stage}: {message}"[:4000], log=log)

    def fail(self, *, reason: str, message: str, log: str = "") -> None:
        """End the search, with the reason and the last lines of its log for the user to read."""
        logger.error("search failed: %s", reason, extra={"action": "search_failed", "search_id": self.record.id, "reason": reason})
        self._end(SearchState.FAILED, error={"reason": reason, "message": message, **({"log": log} if log else {})})

    # -- what is next ------------------------------------------------------------------------------------------------------

    def _prepare(self, may_prepare: Callable[[], bool]) -> None:
        prepared = self._books.prepared
        if prepared is not None:
            if not self._run.trials:  # else it goes on after a pause
                self._name_weak_tasks(prepared)
            self._run.scales(prepared)  # refuses a search without a task on which the teacher is better than random weights
            self._books.move(SearchState.SEARCHING)
        elif self.steps.running:
            return
        elif self._run.stopped:
            self.fail(reason=self._run.stopped, message=f"{self._books.limits.message(self._run.stopped)}; no trial was begun")
        elif may_prepare():
            self._start("prepare", request={})

    def _prepare_again(self, may_prepare: Callable[[], bool]) -> None:
        """Fill the folder that is gone: deleted, or not in the backup. Until it is there nothing else begins; what it measured the first time stays."""
        if not self.is_preparing and may_prepare():
            logger.warning("prepared folder gone", extra={"action": "prepared_gone", "search_id": self.record.id, "prepared": self.prepared_key})
            self._start("prepare", request={})

    def _name_weak_tasks(self, prepared: dict[str, Any]) -> None:
        """Tasks that can rank nothing are told at once, with the likelihood forms that could."""
        for signal in self._run.signals(prepared):
            if not signal.clear:
                self._store.add_event(self.record.id, "task.weak", signal.as_dict(), fence=self._fence)
                logger.warning("task %s ranks nothing", signal.task, extra={"action": "task_weak", "search_id": self.record.id, **signal.as_dict()})

    def _search(self) -> None:
        run = self._run
        failed = [trial for trial in run.trials.values() if trial.state is TrialState.FAILED]
        if len(failed) >= run.spec.limits.max_failed_trials:
            reasons = "; ".join(f"trial {trial.number}: {(trial.failure or {}).get('reason')}" for trial in failed[:3])
            self._books.save_board()
            self.fail(reason="too_many_failed_trials", message=f"{len(failed)} trials failed ({reasons})")
            return
        while len(self.steps.running) < run.spec.resources.max_parallel_trials:
            action = run.next_action()
            if isinstance(action, NewTrial):
                self._books.add_trial(action)
            elif isinstance(action, Advance):
                self._start_rung(action)
            else:
                break
        if self.steps.running:
            return
        if run.stopped:
            self._books.end_trials(failure={"reason": run.stopped, "message": self._books.limits.message(run.stopped), "attempts": 0})
        else:
            self._books.stop_left_behind()
        if run.is_finished():
            self._choose_finalists(limit=run.stopped)

    def _choose_finalists(self, *, limit: LimitReason | None) -> None:
        run = self._run
        self._books.save_board()
        if not any(trial.state is TrialState.COMPLETED and not is_repeat(trial.origin) for trial in run.trials.values()):
            reached = f"{self._books.limits.message(limit)}; " if limit is not None else ""
            self.fail(reason=limit or "no_trial_completed", message=reached + self._why_none_completed())
            return
        reason, legal = run.end_reason(), sum(one.space.count() for one in run.runs)
        self._books.move(SearchState.CONFIRMING, data={"reason": reason, "legal_shapes": legal, "trials": len(run.trials)}, end_reason=reason)

    def _why_none_completed(self) -> str:
        dear = [(trial.number, trial.failure) for trial in self._run.trials.values() if (trial.failure or {}).get("reason") == OVER_BUDGET]
        first = f" (trial {dear[0][0]}: {(dear[0][1] or {})['message']})" if dear else ""
        over = f"; {len(dear)} of {len(self._run.trials)} are over a measured ceiling{first}" if dear else ""
        return f"no trial reached the last rung; see the trials' failures{over}"

    def _start_rung(self, action: Advance) -> None:
        run = self._run
        if (known := run.known_result(action)) is not None and self._books.reuse(action, known):
            return
        if (limit := self._books.limits.refuses_tokens(run.begun_tokens + run.tokens_of(action))) is not None:
            run.stop(limit)
            return
        trial = run.trials[action.trial]
        request = {"shape": trial.shape, "rung": action.rung, "trial_folder": str(self.folder.trial(trial.number)), "budget": trial.budget}
        request["seed"] = run.seed_of(trial.number)
        self._start("rung", trial=trial.number, rung=action.rung, request=request)
        self._books.refresh_trial(trial.number)

    def _confirm(self) -> None:
        """Confirm every finalist and what the board compares with, then bundle the winner of each budget that has one."""
        run, boards = self._run, self._books.final_boards()
        busy = {running.attempt.trial for running in self.steps.running.values()}
        for number in run.to_confirm(boards):
            if len(self.steps.running) >= run.spec.resources.max_parallel_trials:
                return
            if number not in self._books.confirmations and number not in busy:
                trial = run.trials[number]
                request = {"shape": trial.shape, "trial_folder": str(self.folder.trial(number)), "with_reload": trial.origin != CONTROL}
                self._start("confirm", trial=number, request=request)
        if self.steps.running:
            return
        self._books.save_board()
        bundled = {winner["budget"] for winner in all_winners(self.record)}
        if (missing := next((board.winner for budget, board in enumerate(boards) if board.winner is not None and budget not in bundled), None)) is not None:
            self._start("bundle", trial=missing, request=self._bundle_request(missing))
        elif bundled:
            self._end(SearchState.SUCCEEDED)
        else:
            refused = [number for number, confirmation in self._books.confirmations.items() if not confirmation.verified]
            reasons = "; ".join(f"trial {number}: {(run.trials[number].confirmation or {}).get('reason')}" for number in refused[:3])
            self.fail(reason="no_finalist_verified", message=reasons)

    def _bundle_request(self, number: int) -> dict[str, Any]:
        run = self._run
        return {
            "search_id": run.id,
            "trial": number,
            "shape": run.trials[number].shape,
            "trial_folder": str(self.folder.trial(number)),
            "bundle_folder": str(self.folder.winner(budget=run.trials[number].budget)),
            "result": run.results[number][run.last_rung].as_dict(),
            "confirmation": run.trials[number].confirmation,
            "board": self._store.get_search(run.id).board,
            "observations": [{"choices": told.choices.as_dict(), "value": told.value} for told in run.observations(number, most=MAX_FOR_IMPORTANCE)],
        }

    def _start(self, stage: Stage, *, request: dict[str, Any], trial: int | None = None, rung: int | None = None) -> None:
        """Start a step, unless it has failed for good."""
        if self._give_up_if_spent(stage, trial=trial, rung=rung):
            return
        run = self._run
        halvings = num_memory_failures(self._books.attempts_of(stage, trial=trial, rung=rung))
        prepared = str(self._leader.settings.prepared_folder / self.prepared_key)
        request = {"spec": self.record.spec, "inputs": run.inputs, "prepared": prepared, "num_halvings": halvings, **self._source_of(trial), **request}
        self.steps.start(stage, request=request, trial=trial, rung=rung)
        if trial is not None and rung is not None:
            run.add_start(trial, rung=rung)

    def _source_of(self, trial: int | None) -> dict[str, Any]:
        """Which attempt's files a step of a trial begins with, where each attempt has its own."""
        if trial is None or self.folder.shared is None:
            return {}
        return {"trial_source": find_tree(self.record.id, trial, store=self._store)}

    # -- the end -----------------------------------------------------------------------------------------------------------

    def _end(self, to: SearchState, *, error: dict[str, Any] | None = None) -> None:
        """The search is over: nothing of it runs or waits, and its files go, before its state says so."""
        failed = self.steps.end_all("the search ended")
        for trial in self._store.list_trials(self.record.id):
            self._run.set_trial(trial)
        self._books.end_trials()
        self.folder.clear(keep_attempts=failed, keep_trials=self._books.students_to_keep())
        self._books.move(to, error=error)
