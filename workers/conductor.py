"""Carries out one search: starts the steps that `Family` asks for, decides what their ends mean, and cleans up behind them.

Everything is decided from the store: each state of the search is left because of what the store holds, and every write
may be followed by a crash, after which the next controller comes to the same decision. What is written is in `books.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from nas.chain import awaited_source
from nas.errors import Conflict, TeacherUnavailable
from nas.search.layout import prepared_key
from nas.search.results import CONTROL
from nas.spec import dump_spec
from nas.store.records import OVER_BUDGET, ActiveSearch, AttemptRecord, AttemptState, SearchRecord, SearchState, Stage, TrialState, all_winners
from nas.submission import take_teacher
from nas.trial_files import find_tree
from workers import metrics
from workers.actions import Advance, LimitReason, NewTrial
from workers.books import Books
from workers.family import Family
from workers.logs import LogKeeper, last_lines, read_tail
from workers.step import Outcome, Step
from workers.tries import BEATS_PER_LEASE, begin, find_spent, judge, num_memory_failures
from workers.verdicts import Untrue, check_result
from workers.watch import Leader, Running, Watch

logger = logging.getLogger(__name__)

MAX_FOR_IMPORTANCE = 200
"""Observations from which the importance of each dimension is worked out, in the bundle step: seconds there, minutes for a thousand (LOG.md)."""


class Conductor:
    """One search of this controller."""

    def __init__(self, record: SearchRecord, *, leader: Leader) -> None:
        self._leader, self._store, self._fence = leader, leader.store, leader.fence
        self._books = Books(record, leader=leader)
        self.folder = self._books.folder
        self._watch = Watch(record.id, leader=leader, folder=self.folder)
        self.running = self._watch.running
        self.ended: dict[str, Outcome] = {}
        """Outcomes of steps that wait to be recorded."""
        self._logs = LogKeeper(record.id, store=self._store, fence=self._fence, clock=leader.clock)
        self.prepared_key = prepared_key(self._run.spec, inputs=self._run.inputs)

    @property
    def record(self) -> SearchRecord:
        return self._books.record

    @property
    def _run(self) -> Family:
        return self._books.run

    @property
    def is_preparing(self) -> bool:
        return any(running.attempt.stage == "prepare" for running in self.running.values())

    def reload(self) -> None:
        """Read the search from the store again, whatever memory says; attempts that run there and not here are lost."""
        self._books.reload(running=self.running)
        self.prepared_key = prepared_key(self._run.spec, inputs=self._run.inputs)

    def resume(self, attempt: AttemptRecord, outcome: Outcome) -> None:
        """Take over a step that ended under another controller."""
        self._watch.add(attempt)
        self.ended[attempt.id] = outcome

    def note(self, active: ActiveSearch) -> None:
        """The search as the store has it now: users pause, resume and cancel it, retry trials and extend it."""
        if active.num_requests != self._books.num_requests:
            self.reload()
        elif active.state is not self.record.state:
            self._books.record = replace(self.record, state=active.state)

    def drop(self) -> None:
        """Its search is another controller's: end what runs of it here, and write nothing more."""
        for key in self.running:
            self._leader.executor.kill(key)
        self.running.clear()
        self.ended.clear()

    def advance(self, *, may_prepare: Callable[[], bool]) -> None:
        """Pass on progress, enforce limits, and start what should run next.

        Args:
            may_prepare: whether the search's prepared folder may be filled now.
        """
        self._watch.follow()
        self._logs.keep({key: running.progress.folder for key, running in self.running.items()})
        self._heed_wishes()
        for key, outcome in {**self._watch.enforce(self._run.spec.limits), **self._watch.listen(ended=self.ended)}.items():
            self.ended.setdefault(key, outcome)
        self._books.save_board_in_time()
        match self.record.state:
            case SearchState.QUEUED:
                self._leave_queue()
            case SearchState.PREPARING:
                self._prepare(may_prepare)
            case SearchState.SEARCHING:
                self._search()
            case SearchState.CONFIRMING if self.record.winner is not None and not self._run.spec.more_budgets:
                self._books.save_board()
                self._end(SearchState.SUCCEEDED)
            case SearchState.CONFIRMING:
                self._confirm()
            case SearchState.PAUSING if not self.running:
                self._books.save_board()
                self._books.move(SearchState.PAUSED, error=self.record.error)
            case SearchState.CANCELLING if not self.running:
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
                self._watch.stop("cancelled")
            case SearchState.PAUSING:
                self._watch.stop("paused")
            case SearchState.PREPARING | SearchState.SEARCHING:
                limits, running = self._books.limits, self._watch.device_seconds(self._run.spec.resources)
                if (reached := limits.reached(running_device_seconds=running)) is not None:
                    self._watch.stop(reached)
                    self._run.stop(reached)
                elif (over := limits.bytes_over(self.folder.path)) and self._books.free_disk(over) < over:
                    message = f"the search's folder is {over} bytes over limits.max_disk_bytes={self._run.spec.limits.max_disk_bytes}"
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
        """Record how steps ended; a step whose outcome cannot be recorded now stays to be recorded later."""
        for key, outcome in list(self.ended.items()):
            try:
                self._settle(self.running[key], outcome)
            except Conflict as conflict:
                # An earlier try, or another controller, got as far as the store.
                logger.warning("outcome not recorded: %s", conflict, extra={"action": "outcome_ignored", "search_id": self.record.id, "attempt_id": key})
                del self.running[key], self.ended[key]
                self.reload()
            else:
                del self.running[key], self.ended[key]

    def _settle(self, running: Running, outcome: Outcome) -> None:
        self._watch.pass_on([running])
        attempt, log = running.attempt, read_tail(running.progress.folder)
        seconds = self._watch.device_seconds_of(running, self._run.spec.resources)
        if outcome.succeeded and outcome.result is not None:
            if (lie := self._find_lie(attempt, outcome.result)) is None:
                self._books.record_result(attempt, outcome.result, log=log, device_seconds=seconds)
                self._count_end(running, AttemptState.SUCCEEDED, reason="", device_seconds=seconds)
                return
            outcome = Outcome(succeeded=False, reason="invalid_result", message=lie)
        elif running.killed is not None:
            outcome = running.killed
        ending = judge(running, outcome, is_cancelling=self.record.state is SearchState.CANCELLING)
        self._store.finish_attempt(attempt.id, state=ending.state, reason=ending.text, log=log, device_seconds=seconds, fence=self._fence)
        self._count_end(running, ending.state, reason=ending.reason, device_seconds=seconds)
        ending.log(attempt)
        if attempt.trial is not None:
            self._books.refresh_trial(attempt.trial)
        if outcome.reason == "disk_full":
            self._pause("disk_full", message=outcome.message)
        elif attempt.stage in ("rung", "confirm"):  # the others end the search when they are spent: that waits until all is settled
            self._give_up_if_spent(attempt.stage, trial=attempt.trial, rung=attempt.rung)

    def _count_end(self, running: Running, state: AttemptState, *, reason: str, device_seconds: float) -> None:
        stage = running.attempt.stage
        self._books.limits.count(device_seconds)
        metrics.ATTEMPTS_ENDED.labels(stage=stage, state=state, reason=reason).inc()
        metrics.DEVICE_SECONDS.labels(stage=stage).inc(device_seconds)

    def _find_lie(self, attempt: AttemptRecord, result: dict[str, Any]) -> str | None:
        """Why a result cannot be true, None where it can."""
        run, trial = self._run, None if attempt.trial is None else self._run.trials[attempt.trial]
        try:
            check_result(result, attempt=attempt, spec=run.spec, architecture=run.runs[0].space.architecture, trial=trial, folders=self.folder)
        except Untrue as untrue:
            return str(untrue)
        return None

    # -- what failed -------------------------------------------------------------------------------------------------------

    def _give_up_if_spent(self, stage: Stage, *, trial: int | None, rung: int | None) -> bool:
        """Give a step up that may not be tried again. Asked after a failure, and before every start: a crash may have come between."""
        attempts = self._books.attempts_of(stage, trial=trial, rung=rung)
        spent = find_spent(attempts, limits=self._run.spec.limits, mailbox=self.folder.attempt)
        if spent is None:
            return False
        log = self._last_lines(spent.last)
        self._give_up(stage, trial=trial, rung=rung, reason=spent.reason, message=spent.message, tries=spent.num_tries, log=log)
        return True

    def _last_lines(self, attempt: AttemptRecord) -> str:
        log = self._store.read_log(attempt.id)
        return last_lines(log.text if log else None)

    def _give_up(self, stage: Stage, *, trial: int | None, rung: int | None, reason: str, message: str, tries: int, log: str) -> None:
        """A step failed for good: a rung fails its trial, a confirmation leaves its trial unverified, the others fail the search."""
        if stage == "rung" and trial is not None:
            failure = {"stage": f"rung {rung}", "reason": reason, "message": message[:2000], "attempts": tries, "log": log}
            self._books.change_trial(trial, to=TrialState.FAILED, failure=failure)
            self.folder.drop_trial(trial)
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
        elif self.running:
            return
        elif self._run.stopped:
            self.fail(reason=self._run.stopped, message=f"{self._books.limits.message(self._run.stopped)}; no trial was begun")
        elif may_prepare():
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
        while len(self.running) < run.spec.resources.max_parallel_trials:
            action = run.next_action()
            if isinstance(action, NewTrial):
                self._books.add_trial(action)
            elif isinstance(action, Advance):
                self._start_rung(action)
            else:
                break
        if self.running:
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
        if not any(trial.state is TrialState.COMPLETED for trial in run.trials.values()):
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
        self._start("rung", trial=trial.number, rung=action.rung, request=request)
        self._books.refresh_trial(trial.number)

    def _confirm(self) -> None:
        """Confirm every finalist and what the board compares with, then bundle the winner of each budget that has one."""
        run, boards = self._run, self._books.final_boards()
        busy = {running.attempt.trial for running in self.running.values()}
        for number in run.to_confirm(boards):
            if len(self.running) >= run.spec.resources.max_parallel_trials:
                return
            if number not in self._books.confirmations and number not in busy:
                trial = run.trials[number]
                request = {"shape": trial.shape, "trial_folder": str(self.folder.trial(number)), "with_reload": trial.origin != CONTROL}
                self._start("confirm", trial=number, request=request)
        if self.running:
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
        attempt = self._store.start_attempt(run.id, stage=stage, trial=trial, rung=rung, fence=self._fence)
        prepared = self._leader.settings.prepared_folder / self.prepared_key
        step = Step(
            key=attempt.id,
            stage=stage,
            folder=str(self.folder.attempt(attempt.id)),
            request={"spec": self.record.spec, "inputs": run.inputs, "prepared": str(prepared), "num_halvings": halvings, **self._source_of(trial), **request},
            cpus=run.spec.resources.cpus,
            gpus=run.spec.resources.gpus,
            beat_seconds=self._leader.settings.attempt_lease_seconds / BEATS_PER_LEASE,
            context={"search_id": run.id, "trial": trial, "rung": rung},
            traceparent=self.record.traceparent,
        )
        if trial is not None and rung is not None:
            run.add_start(trial, rung=rung)
        self._watch.add(attempt)
        if (ended := begin(step, executor=self._leader.executor)) is not None:
            self.ended[attempt.id] = ended

    def _source_of(self, trial: int | None) -> dict[str, Any]:
        """Which attempt's files a step of a trial begins with, where each attempt has its own."""
        if trial is None or self.folder.shared is None:
            return {}
        return {"trial_source": find_tree(self.record.id, trial, store=self._store)}

    # -- the end -----------------------------------------------------------------------------------------------------------

    def _end(self, to: SearchState, *, error: dict[str, Any] | None = None) -> None:
        """The search is over: nothing of it runs or waits, and its files go, before its state says so."""
        for key in self.running:
            with suppress(Conflict):  # it may have been settled half-way
                log = read_tail(self.folder.attempt(key))
                self._store.finish_attempt(key, state=AttemptState.CANCELLED, reason="the search ended", log=log, fence=self._fence)
            self._leader.executor.kill(key)
        self.running.clear()
        self.ended.clear()
        for trial in self._store.list_trials(self.record.id):
            self._run.set_trial(trial)
        self._books.end_trials()
        failed = [attempt.id for attempt in self._store.list_attempts(self.record.id) if attempt.state is AttemptState.FAILED]
        self.folder.clear(keep_attempts=failed, keep_trials=self._books.students_to_keep())
        self._books.move(to, error=error)
