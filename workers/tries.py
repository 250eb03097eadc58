"""Tries of one step: begun, judged when they end, and counted until it is given up. Of searches and of full distillations alike."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from nas.files import is_disk_full
from nas.spec import LimitSpec
from nas.store.records import AttemptRecord, AttemptState
from workers.executor import Executor
from workers.liveness import supersede
from workers.outcome import NOT_PREPARED, RESULT, Outcome, read_outcome
from workers.step import Step
from workers.watch import PREEMPTED, Running

logger = logging.getLogger(__name__)

MAX_MEMORY_FAILURES = 2
"""Times that a step may run out of memory: the second one of a rung runs with half the micro-batch."""
BEATS_PER_LEASE = 12
"""How often a step beats in the time after which a silent one is lost."""
_WAS_STOPPED = ("stopped", "worker_died", PREEMPTED)
"""How a step ends that was asked to stop, or killed because it did not."""
_NOT_ITS_FAULT = ("stopped", "superseded", "node_unfit", PREEMPTED, NOT_PREPARED, "disk_full")
"""Ends that say nothing against a step: it is run again, and does not count as failed."""
_BOUNDED = {PREEMPTED: "lost with its worker", NOT_PREPARED: "without its prepared folder"}
"""Those of them that may go on for ever by themselves, and what they say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Why a step may not be tried again."""

    reason: str
    message: str
    num_tries: int
    last: AttemptRecord
    """Whose log tells most."""


def begin(step: Step, *, executor: Executor) -> Outcome | None:
    """Hand a step to the executor; what came of it where it cannot be begun."""
    try:
        Path(step.folder).mkdir(parents=True, exist_ok=True)
        executor.start(step)
    # Broad: whatever an executor says of a step that it cannot begin. It counts as a try, and the user reads why.
    except Exception as error:
        logger.exception("step not started", extra={"action": "start_failed", "search_id": step.context.get("search_id"), "attempt_id": step.key})
        reason = "disk_full" if is_disk_full(error) else "error"
        return Outcome(succeeded=False, reason=reason, message=f"the step could not be started: {type(error).__name__}: {error}"[:2000])
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What the end of a step that did not succeed counts as."""

    state: AttemptState
    reason: str
    text: str
    """The reason, with what there is to say."""
    is_asked: bool
    """It was asked to stop, which is no failure."""

    def log(self, attempt: AttemptRecord) -> None:
        """Say so."""
        level, what = (logging.INFO, "stopped") if self.is_asked else (logging.WARNING, "failed")
        extra = {"action": f"attempt_{what}", "search_id": attempt.search_id, "attempt_id": attempt.id}
        logger.log(level, "attempt %s: %s", what, self.reason, extra=extra)


def judge(running: Running, outcome: Outcome, *, is_cancelling: bool, pauses_on_full_disk: bool) -> Ending:
    """What the end of a step that did not succeed counts as; from here on nothing of the step is published.

    An outcome that its executor made up is kept, so that the next controller sees that no retry helps.

    Args:
        pauses_on_full_disk: the search pauses then. What goes on may not try for ever: there it counts as a failure.
    """
    # Whoever says that a step died, or was killed, may only have lost sight of it.
    supersede(running.progress.folder)
    if not outcome.retryable and read_outcome(running.progress.folder) is None:
        _leave_outcome(running.progress.folder, outcome)
    is_asked = running.stop_reason is not None and outcome.reason in _WAS_STOPPED
    state, reason = AttemptState.FAILED, outcome.reason or "error"
    if is_cancelling:
        state = AttemptState.CANCELLED
    elif is_asked:
        state, reason = AttemptState.LOST, str(running.stop_reason)
    elif reason in _NOT_ITS_FAULT and (pauses_on_full_disk or reason != "disk_full"):
        state = AttemptState.LOST
    return Ending(state=state, reason=reason, text=reason if is_asked else f"{reason}: {outcome.message}"[:4000], is_asked=is_asked)


def find_spent(attempts: Sequence[AttemptRecord], *, limits: LimitSpec, mailbox: Callable[[str], Path]) -> Spent | None:
    """Why a step may not be tried again, if so. Asked after a failure, and before every start: a crash may have come between.

    Args:
        attempts: of the step, those that count. mailbox: the folder of an attempt.
    """
    for reason, what in _BOUNDED.items():
        lost = [attempt for attempt in attempts if attempt.state is AttemptState.LOST and (attempt.reason or "").startswith(reason)]
        if len(lost) >= limits.max_preemptions:
            message = f"{what} {len(lost)} times; the last: {lost[-1].reason}"
            return Spent(reason=reason, message=message, num_tries=len(attempts), last=lost[-1])
    failed = [attempt for attempt in attempts if attempt.state is AttemptState.FAILED]
    if not failed:
        return None
    outcome = read_outcome(mailbox(failed[-1].id))
    is_spent = len(failed) >= limits.max_attempts or num_memory_failures(failed) >= MAX_MEMORY_FAILURES
    if not is_spent and (outcome is None or outcome.retryable):
        return None
    reason, _, message = (failed[-1].reason or "error: ").partition(": ")
    return Spent(reason=reason, message=message, num_tries=len(failed), last=failed[-1])


def num_memory_failures(attempts: Collection[AttemptRecord]) -> int:
    """How many of them ran out of memory."""
    return sum(attempt.state is AttemptState.FAILED and (attempt.reason or "").startswith("out_of_memory") for attempt in attempts)


def _leave_outcome(folder: Path, outcome: Outcome) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{RESULT}"
    temporary.write_text(json.dumps(outcome.as_dict()), encoding="utf-8")
    temporary.replace(folder / RESULT)
