"""Carries out one search: starts the steps that `Family` asks for, records how they end, and cleans up behind them.

Everything is decided from the store: each state of the search is left because of what the store holds, and every write
may be followed by a crash, after which the next controller comes to the same decision.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nas.budget import measured_excess
from nas.errors import Conflict
from nas.search.confirmed import Confirmation
from nas.search.layout import clear_below, prepared_key
from nas.search.ranking import Board
from nas.search.results import CONTROL, RungResult
from nas.settings import Settings
from nas.store.records import OVER_BUDGET, AttemptRecord, AttemptState, Fence, SearchRecord, SearchState, Stage, TrialState, all_winners
from nas.store.store import Store
from nas.warm_start import Known, recall
from workers import metrics
from workers.board import make_board
from workers.executor import Executor
from workers.family import Family
from workers.folders import REUSED, SearchFolder, find_tree
from workers.liveness import ask_to_stop, read_beat, supersede
from workers.logs import LogKeeper, last_lines, read_tail
from workers.progress import ProgressReader, make_point
from workers.search_run import Advance, NewTrial
from workers.step import RESULT, Outcome, Step, read_outcome

logger = logging.getLogger(__name__)

CANCEL_GRACE_SECONDS = 10.0
"""A step that was asked to stop and has not is killed after this long."""
WAITING_SECONDS = 60.0
"""A step that shows no sign of life for so long is said to wait for resources: on a cluster that grows, this may take any time."""
PROGRESS_SECONDS = 0.5
"""Between two looks at the running steps' progress files: a thousand of them on a shared folder are not looked at with every outcome."""
PROGRESS_SECONDS_PER_STEP = 0.002
"""And for every running step at least this, so that looking takes about a hundredth of the controller's time however many run."""
BOARD_SECONDS_PER_TRIAL = 0.005
"""Between two leaderboards stored. One costs the controller about a twentieth of that for every trial on it (LOG), so at most 5 % of its time."""
MAX_FOR_IMPORTANCE = 200
"""Observations from which the importance of each dimension is worked out, in the bundle step: seconds there, minutes for a thousand (LOG.md)."""
LOOKS_PER_ATTEMPT_LEASE = 10
"""How often, in the time after which a silent step is lost, the running steps' beats are looked at."""
BEATS_PER_LEASE = 12
"""And how often a step beats meanwhile."""
PREEMPTED = "preempted"
"""Reason of an attempt that was lost with its worker. It does not count as failed, and there may be many of them."""
_LOST = ("stopped", "superseded", "node_unfit", PREEMPTED)
"""Reasons of an attempt's end that say nothing against its step."""
WORKING = (SearchState.QUEUED, SearchState.PREPARING, SearchState.SEARCHING, SearchState.CONFIRMING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """What a controller works with while it leads a search."""

    store: Store
    executor: Executor
    settings: Settings
    fence: Fence
    """The lease under which it writes."""
    clock: Callable[[], float] = time.monotonic
    """Seconds from some fixed moment."""


@dataclass(slots=True, kw_only=True)
class Running:
    """A step in flight."""

    attempt: AttemptRecord
    progress: ProgressReader
    started: float
    """The leader's clock when it was handed to the executor."""
    began: float | None = None
    """The leader's clock at its first sign of life; None while it waits for resources."""
    said_waiting: bool = False
    tokens_per_second: float = 0.0
    """As its last line of progress said."""
    beat: str | None = None
    """The last one that was seen; None: the step has not begun."""
    silent_seconds: float = 0.0
    """For so long the leader has looked and seen no other."""
    stop_asked: float | None = None
    killed: str | None = None
    """Why we ended it by force."""


class Conductor:
    """One search of this controller."""

    def __init__(self, record: SearchRecord, *, leader: Leader) -> None:
        self._leader, self._store, self._fence, self._clock = leader, leader.store, leader.fence, leader.clock
        self.record = record
        self.folder = SearchFolder.of(record.id, settings=leader.settings)
        self.running: dict[str, Running] = {}
        self.ended: dict[str, Outcome] = {}
        """Outcomes of steps that wait to be recorded."""
        self._looked, self._stored_board, self._listened = -math.inf, -math.inf, self._clock()
        """The clock when progress was read last, when the board was stored last, and when beats were looked at last."""
        self._logs = LogKeeper(record.id, store=self._store, fence=self._fence, clock=self._clock)
        self._load()
        self._store.recount_trials(record.id, fence=self._fence)
        self.prepared_key = prepared_key(self._run.spec, inputs=self._run.inputs)

    def reload(self) -> None:
        """Read the search from the store again, whatever memory says; attempts that run there and not here are lost."""
        self.record = self._store.get_search(self.record.id)
        for attempt in self._store.list_attempts(self.record.id):
            if attempt.state is AttemptState.RUNNING and attempt.id not in self.running:
                log = read_tail(self.folder.attempt(attempt.id))
                self._store.finish_attempt(attempt.id, state=AttemptState.LOST, reason="the controller does not know its step", log=log, fence=self._fence)
        self._load()

    def _load(self) -> None:
        search_id = self.record.id
        self._prepared = self._store.get_prepared(search_id)
        trials, rungs, attempts = self._store.list_trials(search_id), self._store.list_rungs(search_id), self._store.list_attempts(search_id)
        self._run = Family(self.record, trials=trials, rungs=rungs, attempts=attempts, memory=recall(self.record, store=self._store))
        self._final_boards: tuple[Board, ...] | None = None
        """While confirming: the board of each budget with what was confirmed so far."""
        self._confirmations = {number: Confirmation.from_dict(found) for number, found in self._store.list_confirmations(search_id).items()}
        self._board_is_old = bool(self._run.results)

    @property
    def is_preparing(self) -> bool:
        return any(running.attempt.stage == "prepare" for running in self.running.values())

    def resume(self, attempt: AttemptRecord, outcome: Outcome) -> None:
        """Take over a step that ended under another controller."""
        self.running[attempt.id] = Running(attempt=attempt, progress=ProgressReader(folder=self.folder.attempt(attempt.id)), started=self._clock())
        self.ended[attempt.id] = outcome

    def note_state(self, state: SearchState) -> None:
        """The search's state as the store has it now: it may have been cancelled."""
        if state is not self.record.state:
            self.record = replace(self.record, state=state)

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
        if self._clock() - self._looked >= max(PROGRESS_SECONDS, PROGRESS_SECONDS_PER_STEP * len(self.running)):
            self._looked = self._clock()
            self._pass_on_progress(self.running.values())
        self._logs.keep({key: running.progress.folder for key, running in self.running.items()})
        self._enforce_limits()
        self._listen()
        if self._board_is_old and self._clock() - self._stored_board >= BOARD_SECONDS_PER_TRIAL * len(self._run.trials):
            self._save_board()
        match self.record.state:
            case SearchState.QUEUED:
                self._move(SearchState.PREPARING)
            case SearchState.PREPARING if self._prepared is not None:
                self._name_weak_tasks(self._prepared)
                self._run.scales(self._prepared)  # refuses a search without a task on which the teacher is better than random weights
                self._move(SearchState.SEARCHING)
            case SearchState.PREPARING if not self.running and may_prepare():
                self._start("prepare", request={})
            case SearchState.SEARCHING:
                self._search()
            case SearchState.CONFIRMING if self.record.winner is not None and not self._run.spec.more_budgets:
                self._save_board()
                self._end(SearchState.SUCCEEDED)
            case SearchState.CONFIRMING:
                self._confirm()
            case SearchState.CANCELLING if not self.running:
                self._cancel_trials()
                self._save_board()
                self._end(SearchState.CANCELLED)
            case _:
                pass

    def _name_weak_tasks(self, prepared: dict[str, Any]) -> None:
        """Tasks that can rank nothing are told at once, with the likelihood forms that could."""
        for signal in self._run.signals(prepared):
            if not signal.clear:
                self._store.add_event(self.record.id, "task.weak", signal.as_dict(), fence=self._fence)
                logger.warning("task %s ranks nothing", signal.task, extra={"action": "task_weak", "search_id": self.record.id, **signal.as_dict()})

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
        self._pass_on_progress([running])
        attempt = running.attempt
        if outcome.succeeded and outcome.result is not None:
            self._record(attempt, outcome.result, log=read_tail(running.progress.folder))
            self._count_end(running, AttemptState.SUCCEEDED, reason="")
            return
        reason = running.killed or outcome.reason or "error"
        cancelled = self.record.state is SearchState.CANCELLING
        state = AttemptState.CANCELLED if cancelled else AttemptState.LOST if reason in _LOST else AttemptState.FAILED
        if not outcome.retryable and read_outcome(running.progress.folder) is None:
            _leave_outcome(running.progress.folder, outcome)
        log = read_tail(running.progress.folder)
        self._store.finish_attempt(attempt.id, state=state, reason=f"{reason}: {outcome.message}"[:4000], log=log, fence=self._fence)
        self._count_end(running, state, reason=reason)
        logger.warning("attempt failed: %s", reason, extra={"action": "attempt_failed", "search_id": self.record.id, "attempt_id": attempt.id})
        if attempt.trial is not None:
            self._run.set_trial(self._store.get_trial(self.record.id, attempt.trial))
        if attempt.stage in ("rung", "confirm"):  # the others end the search when they are spent: that waits until all is settled
            self._give_up_if_spent(attempt.stage, trial=attempt.trial, rung=attempt.rung)

    def _count_end(self, running: Running, state: AttemptState, *, reason: str) -> None:
        stage, resources = running.attempt.stage, self._run.spec.resources
        metrics.ATTEMPTS_ENDED.labels(stage=stage, state=state, reason=reason).inc()
        if running.began is not None:
            metrics.DEVICE_SECONDS.labels(stage=stage).inc((self._clock() - running.began) * (resources.gpus or resources.cpus))

    def _record(self, attempt: AttemptRecord, result: dict[str, Any], *, log: str | None) -> None:
        search_id, number = self.record.id, attempt.trial
        match attempt.stage:
            case "prepare":
                self._store.save_prepared(search_id, result, fence=self._fence)
                self._prepared = self._store.get_prepared(search_id)
                self._store.finish_attempt(attempt.id, state=AttemptState.SUCCEEDED, reason=None, log=log, fence=self._fence)
            case "rung":
                assert number is not None
                self._record_rung(attempt, number, result, log=log)
            case "confirm":
                assert number is not None
                self._save_confirmation(attempt.id, number, confirmation=result, log=log)
            case "bundle":
                assert number is not None
                self._record_winner(number, result)
                self._store.finish_attempt(attempt.id, state=AttemptState.SUCCEEDED, reason=None, log=log, fence=self._fence)
                self._board_is_old = True
        if attempt.stage in ("prepare", "bundle"):
            self.record = self._store.get_search(search_id)

    def _record_winner(self, number: int, result: dict[str, Any]) -> None:
        """The first winner is the search's, those of the other budgets are kept with it."""
        bundle = str(Path(result["bundle"]).relative_to(self._leader.settings.data_folder))
        winner, first = {**result, "bundle": bundle, "budget": self._run.trials[number].budget}, self._store.get_search(self.record.id).winner
        if first is not None:
            winner = {**first, "more": [*first.get("more", ()), winner]}
        self._store.save_winner(self.record.id, winner, fence=self._fence)

    def _record_rung(self, attempt: AttemptRecord, number: int, result: dict[str, Any], *, log: str | None = None) -> None:
        rung_result = RungResult.from_dict(result)
        is_last = rung_result.rung == self._run.last_rung
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
            fence=self._fence,
        )
        self._run.set_trial(self._store.get_trial(self.record.id, number))
        self._run.add_result(number, rung_result)
        # The next rung resumes this one's trunk; after the last, only the student is needed.
        clear_below(self.folder.trial(number), rung=rung_result.rung + 1 if is_last else rung_result.rung)
        self.folder.drop_superseded(number, tree=REUSED if rung_result.reused_from is not None else attempt.id)
        if failure:
            self.folder.drop_trial(number)
        self._stop_left_behind()
        self._board_is_old = True

    def _over_budget(self, number: int, result: RungResult) -> dict[str, Any] | None:
        """Why a trial's measured costs end it, None if they do not. It is no failure of ours: the sampler learns it, and the search goes on."""
        excess = measured_excess(self._run.spec.budgets[self._run.trials[number].budget], result.costs)
        if not excess:
            return None
        return {"stage": f"rung {result.rung}", "reason": OVER_BUDGET, "message": "; ".join(map(str, excess)), "attempts": 1}

    # -- what failed -------------------------------------------------------------------------------------------------------

    def _give_up_if_spent(self, stage: Stage, *, trial: int | None, rung: int | None) -> bool:
        """Give a step up that may not be tried again. Asked after a failure, and before every start: a crash may have come between."""
        attempts = self._store.list_attempts(self.record.id, trial=trial)
        of_step = [attempt for attempt in attempts if (attempt.stage, attempt.trial, attempt.rung) == (stage, trial, rung)]
        preempted = [attempt for attempt in of_step if attempt.state is AttemptState.LOST and (attempt.reason or "").startswith(PREEMPTED)]
        if len(preempted) >= self._run.spec.limits.max_preemptions:
            message = f"lost with its worker {len(preempted)} times; the last: {preempted[-1].reason}"
            self._give_up(stage, trial=trial, rung=rung, reason=PREEMPTED, message=message, tries=len(of_step), log=self._last_lines(preempted[-1]))
            return True
        failed = [attempt for attempt in of_step if attempt.state is AttemptState.FAILED]
        if not failed:
            return False
        outcome = read_outcome(self.folder.attempt(failed[-1].id))
        if len(failed) < self._run.spec.limits.max_attempts and (outcome is None or outcome.retryable):
            return False
        reason, _, message = (failed[-1].reason or "error: ").partition(": ")
        self._give_up(stage, trial=trial, rung=rung, reason=reason, message=message, tries=len(failed), log=self._last_lines(failed[-1]))
        return True

    def _last_lines(self, attempt: AttemptRecord) -> str:
        log = self._store.read_log(attempt.id)
        return last_lines(log.text if log else None)

    def _give_up(self, stage: Stage, *, trial: int | None, rung: int | None, reason: str, message: str, tries: int, log: str) -> None:
        """A step failed for good: a rung fails its trial, a confirmation leaves its trial unverified, the others fail the search."""
        if stage == "rung" and trial is not None:
            failure = {"stage": f"rung {rung}", "reason": reason, "message": message[:2000], "attempts": tries, "log": log}
            self._change_trial(trial, to=TrialState.FAILED, failure=failure)
            self.folder.drop_trial(trial)
            self._stop_left_behind()
            self._board_is_old = True
        elif stage == "confirm" and trial is not None:
            confirmation = {"verified": False, "reason": f"{reason}: {message}"[:2000], "log": log}
            self._save_confirmation(None, trial, confirmation=confirmation)
        else:
            self.fail(reason=reason, message=f"{stage}: {message}"[:4000], log=log)

    def fail(self, *, reason: str, message: str, log: str = "") -> None:
        """End the search, with the reason and the last lines of its log for the user to read."""
        logger.error("search failed: %s", reason, extra={"action": "search_failed", "search_id": self.record.id, "reason": reason})
        self._end(SearchState.FAILED, error={"reason": reason, "message": message, **({"log": log} if log else {})})

    # -- what runs ---------------------------------------------------------------------------------------------------------

    def _pass_on_progress(self, steps: Iterable[Running]) -> None:
        """Learning curves and prepare steps, from the steps' progress files into the store."""
        points = []
        for running in steps:
            for line in running.progress.read():
                if running.began is None:
                    running.began = self._clock()
                    metrics.DISPATCH_SECONDS.observe(running.began - running.started)
                if (point := make_point(line, attempt=running.attempt)) is not None:
                    points.append(point)
                    running.tokens_per_second = point.tokens_per_second
                elif running.attempt.stage == "prepare" and "step" in line:
                    self._store.add_event(
                        self.record.id, "prepare.step", {name: line[name] for name in ("step", "done", "of") if name in line}, fence=self._fence
                    )
        if points:
            self._store.add_points(points, fence=self._fence)

    def _enforce_limits(self) -> None:
        """Stop what was cancelled, and kill what does not stop or takes too long."""
        now = self._clock()
        for key, running in self.running.items():
            if self.record.state is SearchState.CANCELLING and running.stop_asked is None:
                ask_to_stop(running.progress.folder)
                running.stop_asked = now
            if running.began is None and not running.said_waiting and now - running.started > WAITING_SECONDS:
                self._say_waiting(running.attempt)
                running.said_waiting = True
            overdue = running.began is not None and now - running.began > self._run.spec.limits.max_rung_seconds
            ignored = running.stop_asked is not None and now - running.stop_asked > CANCEL_GRACE_SECONDS
            if running.killed is None and (overdue or ignored):
                running.killed = "timeout" if overdue else "stopped"
                self._leader.executor.kill(key)

    def _listen(self) -> None:
        """Give steps up that stopped beating: their worker hangs, or went with its node. They are run again at once, whatever the executor still hopes for.

        Only time in which this process looked counts: after a pause of its own, a step has not been silent.
        """
        lease, now = self._leader.settings.attempt_lease_seconds, self._clock()
        interval = lease / LOOKS_PER_ATTEMPT_LEASE
        if (passed := now - self._listened) < interval:
            return
        self._listened = now
        for key, running in self.running.items():
            beat = read_beat(running.progress.folder)
            running.silent_seconds = running.silent_seconds + min(passed, 2 * interval) if beat == running.beat and beat is not None else 0.0
            running.beat = beat
            if running.silent_seconds > lease and key not in self.ended:
                running.killed = running.killed or PREEMPTED
                supersede(running.progress.folder)
                self._leader.executor.kill(key)
                self.ended[key] = Outcome(succeeded=False, reason=PREEMPTED, message=f"no sign of life for {lease:g} s")

    def _say_waiting(self, attempt: AttemptRecord) -> None:
        data = {"attempt": attempt.id, "stage": attempt.stage, "trial": attempt.trial, "rung": attempt.rung, "reason": "waiting for resources"}
        self._store.add_event(self.record.id, "attempt.waiting", data, fence=self._fence)
        logger.info("no sign of life after %g s", WAITING_SECONDS, extra={"action": "attempt_waiting", "search_id": self.record.id, **data})

    # -- what is next ------------------------------------------------------------------------------------------------------

    def _search(self) -> None:
        run = self._run
        failed = [trial for trial in run.trials.values() if trial.state is TrialState.FAILED]
        if len(failed) >= run.spec.limits.max_failed_trials:
            reasons = "; ".join(f"trial {trial.number}: {(trial.failure or {}).get('reason')}" for trial in failed[:3])
            self._save_board()
            self.fail(reason="too_many_failed_trials", message=f"{len(failed)} trials failed ({reasons})")
            return
        while len(self.running) < run.spec.resources.max_parallel_trials:
            action = run.next_action()
            if isinstance(action, NewTrial):
                self._propose(action)
            elif isinstance(action, Advance):
                self._start_rung(action)
            else:
                break
        if self.running:
            return
        self._stop_left_behind()
        if not run.is_finished():
            return
        self._save_board()
        if not any(trial.state is TrialState.COMPLETED for trial in run.trials.values()):
            self.fail(reason="no_trial_completed", message=self._why_none_completed())
            return
        legal = sum(one.space.count() for one in run.runs)
        self._move(SearchState.CONFIRMING, data={"reason": run.end_reason(), "legal_shapes": legal, "trials": len(run.trials)})

    def _why_none_completed(self) -> str:
        dear = [(trial.number, trial.failure) for trial in self._run.trials.values() if (trial.failure or {}).get("reason") == OVER_BUDGET]
        first = f" (trial {dear[0][0]}: {(dear[0][1] or {})['message']})" if dear else ""
        over = f"; {len(dear)} of {len(self._run.trials)} are over a measured ceiling{first}" if dear else ""
        return f"no trial reached the last rung; see the trials' failures{over}"

    def _propose(self, new: NewTrial) -> None:
        run = self._run
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

    def _start_rung(self, action: Advance) -> None:
        if (known := self._run.known_result(action)) is not None and self._reuse(action, known):
            return
        trial = self._run.trials[action.trial]
        request = {"shape": trial.shape, "rung": action.rung, "trial_folder": str(self.folder.trial(trial.number)), "budget": trial.budget}
        self._start("rung", trial=trial.number, rung=action.rung, request=request)
        self._run.set_trial(self._store.get_trial(self.record.id, trial.number))

    def _reuse(self, action: Advance, known: Known) -> bool:
        """Take a rung's result from an earlier search; False where that needs the student and it is gone."""
        if action.rung == self._run.last_rung:
            source = SearchFolder.of(known.search, settings=self._leader.settings)
            tree = find_tree(known.search, known.trial, store=self._store)
            if not self.folder.take_student(action.trial, source=source, source_number=known.trial, tree=tree):
                return False
        origin = {"search": known.search, "trial": known.trial}
        result = replace(known.result, rung=action.rung, seconds={}, reused_from=origin)
        attempt = self._store.start_attempt(self.record.id, stage="rung", trial=action.trial, rung=action.rung, fence=self._fence)
        self._run.add_start(action.trial, rung=action.rung)
        self._record_rung(attempt, action.trial, result.as_dict())
        logger.info("rung known from an earlier search", extra={"action": "rung_reused", "search_id": self.record.id, "trial_number": action.trial, **origin})
        return True

    def _confirm(self) -> None:
        """Confirm every finalist and what the board compares with, then bundle the winner of each budget that has one."""
        run = self._run
        boards = self._final_boards = self._final_boards or run.boards(self._prepared or {}, confirmations=self._confirmations)
        busy = {running.attempt.trial for running in self.running.values()}
        for number in run.to_confirm(boards):
            if len(self.running) >= run.spec.resources.max_parallel_trials:
                return
            if number not in self._confirmations and number not in busy:
                trial = run.trials[number]
                request = {"shape": trial.shape, "trial_folder": str(self.folder.trial(number)), "with_reload": trial.origin != CONTROL}
                self._start("confirm", trial=number, request=request)
        if self.running:
            return
        self._save_board()
        bundled = {winner["budget"] for winner in all_winners(self.record)}
        if (missing := next((board.winner for budget, board in enumerate(boards) if board.winner is not None and budget not in bundled), None)) is not None:
            self._start("bundle", trial=missing, request=self._bundle_request(missing))
        elif bundled:
            self._end(SearchState.SUCCEEDED)
        else:
            refused = [number for number, confirmation in self._confirmations.items() if not confirmation.verified]
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
        attempt = self._store.start_attempt(run.id, stage=stage, trial=trial, rung=rung, fence=self._fence)
        prepared = self._leader.settings.prepared_folder / self.prepared_key
        step = Step(
            key=attempt.id,
            stage=stage,
            folder=str(self.folder.attempt(attempt.id)),
            request={"spec": self.record.spec, "inputs": run.inputs, "prepared": str(prepared), **self._source_of(trial), **request},
            cpus=run.spec.resources.cpus,
            gpus=run.spec.resources.gpus,
            context={"search_id": run.id, "trial": trial, "rung": rung},
            traceparent=self.record.traceparent,
            beat_seconds=self._leader.settings.attempt_lease_seconds / BEATS_PER_LEASE,
        )
        if trial is not None and rung is not None:
            run.add_start(trial, rung=rung)
        self.running[attempt.id] = Running(attempt=attempt, progress=ProgressReader(folder=Path(step.folder)), started=self._clock())
        try:
            Path(step.folder).mkdir(parents=True, exist_ok=True)
            self._leader.executor.start(step)
        # Broad: whatever an executor says of a step that it cannot begin. It counts as a try, and the user reads why.
        except Exception as error:
            logger.exception("step not started", extra={"action": "start_failed", "search_id": run.id, "attempt_id": attempt.id})
            self.ended[attempt.id] = Outcome(succeeded=False, reason="error", message=f"the step could not be started: {type(error).__name__}: {error}"[:2000])

    def _source_of(self, trial: int | None) -> dict[str, Any]:
        """Which attempt's files a step of a trial begins with, where each attempt has its own."""
        if trial is None or self.folder.shared is None:
            return {}
        return {"trial_source": find_tree(self.record.id, trial, store=self._store)}

    # -- writing -----------------------------------------------------------------------------------------------------------

    def _stop_left_behind(self) -> None:
        for number in self._run.left_behind():
            self._change_trial(number, to=TrialState.STOPPED)
            self.folder.drop_trial(number)

    def _change_trial(self, number: int, *, to: TrialState, failure: dict[str, Any] | None = None) -> None:
        self._run.set_trial(self._store.change_trial(self.record.id, number, to=to, failure=failure, fence=self._fence))
        self._board_is_old = True

    def _cancel_trials(self) -> None:
        for trial in list(self._run.trials.values()):
            if not trial.state.is_terminal:
                self._change_trial(trial.number, to=TrialState.CANCELLED)

    def _save_confirmation(self, attempt_id: str | None, number: int, *, confirmation: dict[str, Any], log: str | None = None) -> None:
        self._store.save_confirmation(attempt_id, search_id=self.record.id, trial=number, confirmation=confirmation, log=log, fence=self._fence)
        self._run.set_trial(self._store.get_trial(self.record.id, number))
        self._confirmations[number], self._final_boards = Confirmation.from_dict(confirmation), None
        self._board_is_old = True

    def _save_board(self) -> None:
        if self._board_is_old and (board := self._board()) is not None:
            self._store.save_board(self.record.id, board, fence=self._fence)
            self._board_is_old, self._stored_board = False, self._clock()

    def _board(self) -> dict[str, Any] | None:
        """The leaderboard now; None before there is anything to compare with."""
        if self._prepared is None:
            return None
        board = make_board(self._run, prepared=self._prepared, confirmations=self._confirmations)
        return {**board, "importances": (self.record.winner or {}).get("importances", {})}

    def _move(self, to: SearchState, *, error: dict[str, Any] | None = None, data: dict[str, Any] | None = None) -> None:
        """Change the search's state. It may have been cancelled since the tick began: the next tick sees that."""
        expected = [SearchState.CANCELLING] if self.record.state is SearchState.CANCELLING else WORKING
        try:
            self.record = self._store.change_search(self.record.id, fence=self._fence, to=to, expected=expected, error=error, data=data)
        except Conflict as conflict:
            logger.info("state not changed: %s", conflict, extra={"action": "state_conflict", "search_id": self.record.id, "to": to})

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
        self._cancel_trials()
        failed = [attempt.id for attempt in self._store.list_attempts(self.record.id) if attempt.state is AttemptState.FAILED]
        verified = [number for number, confirmation in self._confirmations.items() if confirmation.verified]
        self.folder.clear(keep_attempts=failed, keep_trials=verified)
        self._move(to, error=error)


def _leave_outcome(folder: Path, outcome: Outcome) -> None:
    """Keep an outcome that its executor made up where a step's own would be: the next controller must see that no retry helps."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{RESULT}"
    temporary.write_text(json.dumps(outcome.as_dict()), encoding="utf-8")
    temporary.replace(folder / RESULT)
