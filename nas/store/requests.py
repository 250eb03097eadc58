"""What a user asks of a search that is there: pause, resume, cancel, retry a trial, extend, delete.

A request is written down and answered at once; whoever conducts the search sees the new state, or the grown `num_requests`, and reads
the search again. Each is one transaction under the search's lock, so of two at the same moment one comes first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, delete, select, update

from nas.errors import Conflict, PreconditionFailed
from nas.search.results import is_searched
from nas.spec import parse_spec
from nas.store.database import Database
from nas.store.quotas import charge, lock_project
from nas.store.records import AttemptState, Json, SearchRecord, SearchState, TrialRecord, TrialState
from nas.store.searches import get_search, move_search, write_event
from nas.store.tables import attempts, metadata, searches, trials
from nas.store.trials import get_trial, update_trial


class Requests(Database):
    """Requests of users. What takes an id raises NotFound; every one of them raises Conflict when the search has ended, but `delete_search`."""

    def request_cancel(self, search_id: str) -> SearchRecord:
        """A search that was never begun is cancelled at once, any other goes to cancelling; one that is cancelling already is left alone."""
        with self.write(fence=None) as connection:
            search = _get_open(connection, search_id)
            if search.state is SearchState.CANCELLING:
                return search
            return self._move(connection, search, to=SearchState.CANCELLING if _is_begun(search) else SearchState.CANCELLED)

    def request_pause(self, search_id: str) -> SearchRecord:
        """A search that was never begun is paused at once, any other goes to pausing; one that pauses or is paused already is left alone.

        Raises:
            Conflict: it is being cancelled.
        """
        with self.write(fence=None) as connection:
            search = _get_open(connection, search_id)
            if search.state in (SearchState.PAUSING, SearchState.PAUSED):
                return search
            _refuse_cancelling(search)
            return self._move(connection, search, to=SearchState.PAUSING if _is_begun(search) else SearchState.PAUSED)

    def request_resume(self, search_id: str) -> SearchRecord:
        """A paused search is queued again, also while it still pauses; what it does next follows from what is stored. One that is not paused is left alone.

        Raises:
            Conflict: it is being cancelled.
        """
        with self.write(fence=None) as connection:
            search = _get_open(connection, search_id)
            _refuse_cancelling(search)
            if search.state not in (SearchState.PAUSING, SearchState.PAUSED):
                return search
            return self._move(connection, search, to=SearchState.QUEUED, event="search.resumed")

    def retry_trial(self, search_id: str, number: int) -> TrialRecord:
        """A failed trial waits for its next rung again, and its failures so far count no more. Event `trial.retried`.

        Raises:
            Conflict: the trial has not failed, or its search confirms already.
        """
        with self.write(fence=None) as connection:
            search = _get_searching(connection, search_id, what=f"trial {number}")
            trial = get_trial(connection, search_id, number)
            if trial.state is not TrialState.FAILED:
                raise Conflict(f"trial {number} of search {search_id}: expected one that has failed, got state {trial.state}")
            of_trial = update(attempts).where(attempts.c.search_id == search_id, attempts.c.trial == number)
            connection.execute(of_trial.values(counts=False))
            update_trial(connection, search_id, number, {"state": TrialState.WAITING, "failure": None})
            _count_request(connection, search)
            write_event(connection, search_id, "trial.retried", {"trial": number, "failure": trial.failure})
            return get_trial(connection, search_id, number)

    def update_search(
        self,
        search_id: str,
        *,
        version: int | None,
        max_trials: int | None = None,
        max_parallel_trials: int | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> SearchRecord:
        """Change what may change of a search that has not ended; None leaves a value as it is. Event `search.updated` with what changed.

        Args:
            version: `SearchRecord.version` that the caller decided on; None: whatever it is.
            max_trials: per budget; promotions that were made stay. max_parallel_trials: more than it allows may run until they end.
            labels: all of them, in place of those that were there.
        Raises:
            PreconditionFailed: the search has changed since that version.
            Conflict: more than max_trials shapes are proposed already, or it confirms already and would need more.
            QuotaExceeded: its project may not have so many trials or tokens now.
        """
        with self.write(fence=None) as connection:
            search = _get_open(connection, search_id)
            if version is not None and version != search.version:
                raise PreconditionFailed(f"search {search_id}: expected version {search.version}, got {version}; it has changed, read it again")
            spec, plan, changed = search.spec, search.plan, dict[str, Any]()
            if max_trials is not None and max_trials != spec.get("sampler", {}).get("max_trials"):
                _get_searching(connection, search_id, what="max_trials")
                _check_max_trials(connection, search_id, max_trials)
                spec, changed["max_trials"] = _with(spec, "sampler", "max_trials", max_trials), max_trials
                plan = _extend_plan(plan, spec=spec)
            if max_parallel_trials is not None and max_parallel_trials != spec.get("resources", {}).get("max_parallel_trials"):
                spec, changed["max_parallel_trials"] = _with(spec, "resources", "max_parallel_trials", max_parallel_trials), max_parallel_trials
            if labels is not None and dict(labels) != search.labels:
                spec, changed["labels"] = {**spec, "labels": dict(labels)}, dict(labels)
            if not changed:
                return search
            values = {"spec": spec, "plan": plan, "labels": changed.get("labels", search.labels)}
            connection.execute(update(searches).where(searches.c.id == search_id).values(values))
            _charge_more(connection, search, plan=plan)
            _count_request(connection, search)
            write_event(connection, search_id, "search.updated", changed)
            return get_search(connection, search_id)

    def delete_search(self, search_id: str) -> None:
        """Forget a search that has ended, with all that hangs from it. Its files become nobody's, and go when the controller next looks for such.

        Raises:
            Conflict: it has not ended, or a search or a distillation that has not ended builds on it.
        """
        with self.write(fence=None) as connection:
            search = get_search(connection, search_id, lock=True)
            if not search.state.is_terminal:
                raise Conflict(f"search {search_id}: expected one that has ended, got state {search.state}; cancel it first")
            open_states = [state for state in SearchState if not state.is_terminal]
            distilled = select(searches.c.id).where(searches.c.distils == search_id, searches.c.state.in_(open_states))
            if (running := connection.execute(distilled).scalar()) is not None:
                raise Conflict(f"search {search_id}: expected one of which nothing is distilled, got one whose student {running} distils")
            for other, spec in connection.execute(select(searches.c.id, searches.c.spec).where(searches.c.state.in_(open_states))):
                if search_id == spec.get("teacher"):
                    raise Conflict(f"search {search_id}: expected one that no open search builds on, got one whose winner is the teacher of {other}")
                if search_id in spec.get("warm_start_from", ()):
                    raise Conflict(f"search {search_id}: expected one that no open search builds on, got one that {other} starts from")
            for table in reversed(metadata.sorted_tables):
                if "search_id" in table.c:
                    connection.execute(delete(table).where(table.c.search_id == search_id))
            connection.execute(delete(searches).where(searches.c.id == search_id))

    def _move(self, connection: Connection, search: SearchRecord, *, to: SearchState, event: str | None = None) -> SearchRecord:
        values = {"num_requests": search.num_requests + 1}
        return move_search(connection, search, now=self.steady_time(connection, is_kept=True), to=to, event=event, values=values)


def _get_open(connection: Connection, search_id: str) -> SearchRecord:
    search = get_search(connection, search_id, lock=True)
    if search.state.is_terminal:
        raise Conflict(f"{search.kind} {search_id}: expected one that has not finished, got state {search.state}")
    return search


def _get_searching(connection: Connection, search_id: str, *, what: str) -> SearchRecord:
    """An open search that may still evaluate shapes: what comes when finalists are chosen would come too late."""
    search = _get_open(connection, search_id)
    _refuse_cancelling(search)
    bundled = select(attempts.c.id).where(attempts.c.search_id == search_id, attempts.c.stage == "bundle", attempts.c.state != AttemptState.FAILED)
    if search.state is SearchState.CONFIRMING or search.winner is not None or connection.execute(bundled).first() is not None:
        raise Conflict(f"search {search_id}: expected one that still evaluates shapes, for {what} to change, got one that confirms its finalists")
    return search


def _refuse_cancelling(search: SearchRecord) -> None:
    if search.state is SearchState.CANCELLING:
        raise Conflict(f"search {search.id}: expected one that is not being cancelled, got state {search.state}")


def _is_begun(search: SearchRecord) -> bool:
    """Whether it may have trials and steps, for its controller to end."""
    return search.started_at is not None


def _extend_plan(plan: Json, *, spec: Json) -> Json:
    from nas.estimate import extended_plan  # with numpy: whoever only reads the store does without

    return extended_plan(plan, spec=parse_spec(json.dumps(spec))) if "budgets" in plan else plan  # plans of the first version had one budget and did not say so


def _charge_more(connection: Connection, search: SearchRecord, *, plan: Json) -> None:
    more_trials, more_tokens = (plan.get(name, 0) - search.plan.get(name, 0) for name in ("max_trials", "max_distillation_tokens"))
    if more_trials > 0:
        quotas = lock_project(connection, search.project)
        charge(connection, search.project, quotas=quotas, num_searches=0, num_trials=more_trials, tokens=more_tokens)


def _check_max_trials(connection: Connection, search_id: str, max_trials: int) -> None:
    found = connection.execute(select(trials.c.budget, trials.c.origin).where(trials.c.search_id == search_id))
    proposed = max(Counter(row.budget for row in found if is_searched(row.origin)).values(), default=0)
    if max_trials < proposed:
        raise Conflict(f"search {search_id}: max_trials: expected at least the {proposed} shapes that are proposed already, got {max_trials}")


def _count_request(connection: Connection, search: SearchRecord) -> None:
    connection.execute(update(searches).where(searches.c.id == search.id).values(num_requests=search.num_requests + 1))


def _with(spec: Json, section: str, name: str, value: Any) -> Json:
    return {**spec, section: {**spec.get(section, {}), name: value}}
