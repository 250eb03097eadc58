"""Carries out one full distillation: one step, tried until it succeeds or is given up. To the controller it is as a search is to a `Conductor`.

Everything follows from the store: a result that is kept ends it, whatever else was written before a crash.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nas.distillations import DistillationRequest, parse_distillation, winner_of
from nas.errors import Conflict, NotFound
from nas.search.layout import BUNDLE, prepared_key
from nas.spec import parse_spec
from nas.store.records import WORKING, ActiveSearch, AttemptRecord, AttemptState, SearchRecord, SearchState
from nas.trial_files import bundle_request, find_tree
from workers.folders import OWN_BUNDLE, SearchFolder
from workers.outcome import Outcome
from workers.steps import Steps
from workers.verdicts import check_distilled
from workers.watch import Leader

logger = logging.getLogger(__name__)


class Distilling:
    """One full distillation of this controller."""

    is_preparing = False
    prepared_key = ""

    def __init__(self, record: SearchRecord, *, leader: Leader) -> None:
        self.record = record
        self._leader, self._store, self._fence = leader, leader.store, leader.fence
        self._spec: DistillationRequest = parse_distillation(json.dumps(record.spec))
        self._limits = self._spec.limits.of_step()
        self.folder = SearchFolder.of(record.id, settings=leader.settings)
        self.steps = Steps(record, leader=leader, folder=self.folder, resources=self._spec.resources, pauses_on_full_disk=False)

    def reload(self) -> None:
        """Read it from the store again; attempts that run there and not here are lost."""
        self.steps.lose_unknown()
        self.record = self._store.get_search(self.record.id)

    def note(self, active: ActiveSearch) -> None:
        """It as the store has it now: a user may have cancelled it."""
        if active.state is not self.record.state:
            self.record = replace(self.record, state=active.state)

    def advance(self, *, may_prepare: Callable[[], bool]) -> None:
        """Pass on progress, enforce limits, and start what should run next."""
        self.steps.follow()
        if self.record.state is SearchState.CANCELLING:
            self.steps.watch.stop("cancelled")
        self.steps.enforce(self._limits)
        match self.record.state:
            case SearchState.QUEUED:
                self._move(SearchState.RUNNING)
            case SearchState.RUNNING | SearchState.CANCELLING if self.record.winner is not None:
                self._end(SearchState.SUCCEEDED)
            case SearchState.RUNNING if not self.steps.running:
                self._start()
            case SearchState.CANCELLING if not self.steps.running:
                self._end(SearchState.CANCELLED)
            case _:
                pass

    # -- what ended --------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Record how its step ended."""
        self.steps.settle(self)

    def check_result(self, attempt: AttemptRecord, result: dict[str, Any]) -> None:
        """Refuse what no step can have come to.

        Raises:
            Untrue
        """
        check_distilled(result, recipe=self.record.spec["recipe"], folders=self.folder)

    def keep_result(self, attempt: AttemptRecord, result: dict[str, Any], *, log: str | None, device_seconds: float) -> None:
        """The result first: after a crash between the two it is recorded once more, and is the same."""
        place = str(Path(result["file"]).relative_to(self._leader.settings.data_folder))
        self._store.save_distilled(self.record.id, {**result, "file": place}, fence=self._fence)
        self._store.finish_attempt(attempt.id, state=AttemptState.SUCCEEDED, reason=None, log=log, device_seconds=device_seconds, fence=self._fence)
        self.record = replace(self._store.get_search(self.record.id), state=self.record.state)

    def note_failure(self, attempt: AttemptRecord, outcome: Outcome, *, device_seconds: float) -> None:
        """Nothing follows from it but the next attempt, which `_start` begins or refuses."""

    # -- what is next ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the step, unless it has failed for good."""
        spent = self.steps.find_spent(self._store.list_attempts(self.record.id), limits=self._limits)
        if spent is not None:
            self.fail(reason=spent.reason, message=spent.message[:4000], log=self.steps.last_lines(spent.last))
            return
        try:
            student = self._student()
        except NotFound as gone:
            self.fail(reason="unavailable", message=str(gone))
            return
        request = {"folder": str(self.folder.path), "recipe": self.record.spec["recipe"], "inputs": self.record.inputs, **student}
        self.steps.start("distil", request=request, trial=self.record.spec["trial"])

    def _student(self) -> dict[str, Any]:
        """Where its bundle is, and the digest of the tar beside it, or what the bundle is written from.

        Raises:
            NotFound: the search is gone.
        """
        settings, trial = self._leader.settings, self.record.spec["trial"]
        search = self._store.get_search(self.record.spec["search_id"])
        winner = winner_of(search, trial=trial)
        if winner is not None:
            student = (settings.data_folder / winner["bundle"]).with_name(BUNDLE)
            return {"student": str(student), "student_sha256": winner["bundle_sha256"], "bundle": None}
        prepared = settings.prepared_folder / prepared_key(parse_spec(json.dumps(search.spec)), inputs=search.inputs)
        folder, own = SearchFolder.of(search.id, settings=settings).trial(trial), self.folder.path / OWN_BUNDLE
        request = bundle_request(search, trial, store=self._store, student=folder, prepared=prepared, folder=own)
        source = {} if self.folder.shared is None else {"trial_source": find_tree(search.id, trial, store=self._store)}
        return {"student": None, "bundle": {**request, **source}}

    # -- the end -----------------------------------------------------------------------------------------------------------

    def fail(self, *, reason: str, message: str, log: str = "") -> None:
        """End it, with the reason and the last lines of its log for the user to read."""
        logger.error("distillation failed: %s", reason, extra={"action": "distillation_failed", "search_id": self.record.id, "reason": reason})
        self._end(SearchState.FAILED, error={"reason": reason, "message": message, **({"log": log} if log else {})})

    def _end(self, to: SearchState, *, error: dict[str, Any] | None = None) -> None:
        """It is over: nothing of it runs, and its files but the result go, before its state says so."""
        failed = self.steps.end_all("the distillation ended")
        self.folder.clear(keep_attempts=failed, keep_trials=())
        self.folder.clear_distillation()
        self._move(to, error=error)

    def _move(self, to: SearchState, *, error: dict[str, Any] | None = None) -> None:
        """Change its state. It may have been cancelled since the tick began: the next tick sees that."""
        cancelled = self.record.state is SearchState.CANCELLING and to.is_terminal
        expected = (SearchState.CANCELLING,) if cancelled else (SearchState.QUEUED, *WORKING)
        try:
            self.record = self._store.change_search(self.record.id, fence=self._fence, to=to, expected=expected, error=error)
        except Conflict as conflict:
            logger.info("state not changed: %s", conflict, extra={"action": "state_conflict", "search_id": self.record.id, "to": to})
