"""Trials, their attempts, and what the attempts measured.

Every write that changes a trial locks the search's row first, so the writes of one search follow each other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, RowMapping, Table, func, insert, select, update

from nas.errors import Conflict, NotFound
from nas.search.results import is_repeat
from nas.shape import Shape
from nas.store.counts import count_change
from nas.store.database import Database
from nas.store.logs import keep_log
from nas.store.machines import Fence
from nas.store.quotas import add_device_seconds
from nas.store.records import AttemptRecord, AttemptState, Json, PointRecord, RungRecord, Stage, TrialRecord, TrialState, new_id, utc_now
from nas.store.searches import lock_search, write_event
from nas.store.tables import attempts, points, rungs, trials

TRIAL_COLUMNS = [column for column in trials.c if column.name not in ("shape_key", "confirmation_documents")]
_MAX_NUMBER = 2**31 - 1


class Trials(Database):
    """Propose and change trials, start and finish attempts, keep results and learning curves.

    A terminal state is never left. What takes a `fence` raises Fenced when it is stale; what takes an id raises NotFound.
    """

    def add_trial(
        self, search_id: str, *, number: int, origin: str, shape: Json, choices: Json | None, parameters: int, fence: Fence | None, budget: int = 0
    ) -> TrialRecord:
        """A waiting trial; event `trial.proposed`.

        Raises:
            Conflict: the search has a trial of that number, or of that shape; or that repeat of it.
        """
        now, key = utc_now(), Shape.from_dict(shape).key + (f"/{origin}" if is_repeat(origin) else "")
        with self.write(fence=fence) as connection:
            lock_search(connection, search_id)
            taken = select(trials.c.number).where(trials.c.search_id == search_id)
            if connection.execute(taken.where(trials.c.number == number)).first() is not None:
                raise Conflict(f"trial {number} of search {search_id}: expected a new number, got one that is taken")
            if (twin := connection.execute(taken.where(trials.c.shape_key == key)).scalar()) is not None:
                raise Conflict(f"trial {number} of search {search_id}: expected a new shape, got that of trial {twin}, {key}")
            row = {
                "search_id": search_id,
                "number": number,
                "origin": origin,
                "shape": shape,
                "shape_key": key,
                "choices": choices,
                "parameters": parameters,
                "budget": budget,
                "state": TrialState.WAITING,
                "created_at": now,
                "updated_at": now,
            }
            connection.execute(insert(trials).values(row))
            count_change(connection, search_id, before=None, after=(TrialState.WAITING, None))
            write_event(connection, search_id, "trial.proposed", {"trial": number, "origin": origin, "parameters": parameters, "budget": budget})
            return get_trial(connection, search_id, number)

    def get_trial(self, search_id: str, number: int) -> TrialRecord:
        with self.read() as connection:
            return get_trial(connection, search_id, number)

    def list_trials(
        self,
        search_id: str,
        *,
        states: Collection[TrialState] = (),
        without_result: bool = False,
        budget: int | None = None,
        limit: int | None = None,
    ) -> list[TrialRecord]:
        """Trials of a search by number: all of them, or those in some states, that have finished no rung, of one budget, the first few."""
        query = select(*TRIAL_COLUMNS).where(trials.c.search_id == search_id).order_by(trials.c.number).limit(limit)
        if states:
            query = query.where(trials.c.state.in_(states))
        if without_result:
            query = query.where(trials.c.rung.is_(None))
        if budget is not None:
            query = query.where(trials.c.budget == budget)
        with self.read() as connection:
            return [trial_of(row) for row in connection.execute(query).mappings()]

    def trial_states(self, search_id: str, numbers: Collection[int]) -> dict[int, TrialState]:
        """Of these trials, as far as they exist."""
        query = select(trials.c.number, trials.c.state).where(trials.c.search_id == search_id, trials.c.number.in_(numbers))
        with self.read() as connection:
            return {number: TrialState(state) for number, state in connection.execute(query)}

    def change_trial(self, search_id: str, number: int, *, to: TrialState, fence: Fence | None, failure: Json | None = None) -> TrialRecord:
        """Move a trial; event `trial.<to>` with the failure. Moving it to where it stands does nothing.

        Raises:
            Conflict: it stands in another, terminal state.
        """
        with self.write(fence=fence) as connection:
            lock_search(connection, search_id)
            trial = get_trial(connection, search_id, number)
            if trial.state is to:
                return trial
            if trial.state.is_terminal:
                raise Conflict(f"trial {number} of search {search_id}: expected one that has not ended, got state {trial.state}")
            update_trial(connection, search_id, number, {"state": to, "failure": failure})
            write_event(connection, search_id, f"trial.{to}", {"trial": number, **({"failure": failure} if failure is not None else {})})
            return get_trial(connection, search_id, number)

    def start_attempt(self, search_id: str, *, stage: Stage, trial: int | None, rung: int | None, fence: Fence | None) -> AttemptRecord:
        """A running attempt. At stage rung its trial is running from now on: event `trial.started`; else event `attempt.started`.

        Raises:
            Conflict: stage rung, and the trial is not waiting.
        """
        attempt = AttemptRecord(
            id=new_id("att"),
            search_id=search_id,
            stage=stage,
            trial=trial,
            rung=rung,
            state=AttemptState.RUNNING,
            reason=None,
            started_at=utc_now(),
            finished_at=None,
        )
        with self.write(fence=fence) as connection:
            lock_search(connection, search_id)
            if trial is not None:
                state = get_trial(connection, search_id, trial).state
                if stage == "rung" and state is not TrialState.WAITING:
                    raise Conflict(f"trial {trial} of search {search_id}: expected state waiting, got {state}")
            connection.execute(insert(attempts).values(asdict(attempt)))
            if stage == "rung" and trial is not None:
                update_trial(connection, search_id, trial, {"state": TrialState.RUNNING})
            write_event(connection, search_id, "trial.started" if stage == "rung" else "attempt.started", _attempt_data(attempt))
        return attempt

    def finish_attempt(
        self,
        attempt_id: str,
        *,
        state: AttemptState,
        reason: str | None,
        fence: Fence | None,
        log: str | None = None,
        device_seconds: float | None = None,
    ) -> AttemptRecord:
        """End a running attempt; at stage rung its trial waits again. Event `attempt.<state>` with the reason. Its log is kept with it.

        Raises:
            Conflict: the attempt is not running any more.
        """
        with self.write(fence=fence) as connection:
            attempt = _lock_running(connection, attempt_id)
            keep_log(connection, attempt_id, search_id=attempt.search_id, text=log)
            return _end_attempt(connection, attempt, state=state, reason=reason, device_seconds=device_seconds)

    def lose_running_attempts(self, search_id: str, *, fence: Fence | None) -> list[AttemptRecord]:
        """What a controller does first for a search: the attempts that its predecessor left running are lost, their trials wait again."""
        with self.write(fence=fence) as connection:
            query = select(attempts.c.id).where(attempts.c.search_id == search_id, attempts.c.state == AttemptState.RUNNING).order_by(attempts.c.id)
            running = [_lock_running(connection, attempt_id) for attempt_id in connection.execute(query).scalars().all()]
            return [_end_attempt(connection, attempt, state=AttemptState.LOST, reason="its controller is gone") for attempt in running]

    def list_attempts(self, search_id: str, *, trial: int | None = None, before: str | None = None, limit: int | None = None) -> list[AttemptRecord]:
        """Attempts in the order of their start; of one trial, or of all and of the search itself.

        Args:
            before, limit: only the last so many that began before this one.
        """
        query = _of_search(attempts, search_id, trial).order_by(attempts.c.id if limit is None else attempts.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(attempts.c.id < before)
        with self.read() as connection:
            found = [_attempt(row) for row in connection.execute(query).mappings()]
        return found if limit is None else found[::-1]

    def record_rung(
        self,
        attempt_id: str,
        *,
        search_id: str,
        trial: int,
        rung: int,
        result: Json,
        trial_state: TrialState,
        fence: Fence | None,
        failure: Json | None = None,
        log: str | None = None,
        device_seconds: float | None = None,
    ) -> RungRecord:
        """Keep a rung's result, all in one transaction: the rung, the attempt's success and log, the trial's state, event `trial.rung_finished`.

        Args:
            failure: why this result ends the trial, where it does (a measured cost is over its ceiling).

        Raises:
            Conflict: the attempt is not running, is not of this rung, or the rung has a result.
        """
        with self.write(fence=fence) as connection:
            attempt = _lock_running(connection, attempt_id)
            if (attempt.search_id, attempt.stage, attempt.trial, attempt.rung) != (search_id, "rung", trial, rung):
                raise Conflict(f"attempt {attempt_id}: expected a result of its rung {attempt.rung} of trial {attempt.trial}, got rung {rung} of trial {trial}")
            finished = select(func.max(rungs.c.sequence)).where(rungs.c.search_id == search_id)
            if connection.execute(finished.where(rungs.c.trial == trial, rungs.c.rung == rung)).scalar() is not None:
                raise Conflict(f"rung {rung} of trial {trial} of search {search_id}: expected no result yet, got a second one")
            record = RungRecord(
                search_id=search_id,
                trial=trial,
                rung=rung,
                sequence=1 + (connection.execute(finished).scalar() or 0),
                result=result,
                finished_at=utc_now(),
            )
            connection.execute(insert(rungs).values(_rung_row(record)))
            keep_log(connection, attempt_id, search_id=search_id, text=log)
            ended = {"state": AttemptState.SUCCEEDED, "finished_at": record.finished_at, "device_seconds": device_seconds}
            connection.execute(update(attempts).where(attempts.c.id == attempt_id).values(ended))
            update_trial(connection, search_id, trial, {"state": trial_state, "rung": rung, "failure": failure})
            write_event(connection, search_id, "trial.rung_finished", _rung_data(record, trial_state) | ({} if failure is None else {"failure": failure}))
            add_device_seconds(connection, search_id, device_seconds)
            return record

    def save_confirmation(
        self,
        attempt_id: str | None,
        *,
        search_id: str,
        trial: int,
        confirmation: Json,
        fence: Fence | None,
        log: str | None = None,
        device_seconds: float | None = None,
    ) -> None:
        """Keep what the confirm step found of a finalist, and end its attempt with success and its log. Event `trial.confirmed`.

        Its `documents` are kept apart: `list_confirmations` has them, a TrialRecord has not.

        Args:
            attempt_id: None when the last attempt has failed already, and the confirmation says so.
        Raises:
            Conflict: the attempt is not running.
        """
        with self.write(fence=fence) as connection:
            lock_search(connection, search_id)
            get_trial(connection, search_id, trial)
            if attempt_id is not None:
                _end_attempt(connection, _lock_running(connection, attempt_id), state=AttemptState.SUCCEEDED, reason=None, device_seconds=device_seconds)
                keep_log(connection, attempt_id, search_id=search_id, text=log)
            summary, documents = _split(confirmation)
            update_trial(connection, search_id, trial, {"confirmation": summary, "confirmation_documents": documents})
            write_event(connection, search_id, "trial.confirmed", {"trial": trial, "verified": confirmation["verified"], "reason": confirmation.get("reason")})

    def list_confirmations(self, search_id: str) -> dict[int, Json]:
        """What the confirm step found so far, by trial, with the documents."""
        columns = (trials.c.number, trials.c.confirmation, trials.c.confirmation_documents)
        query = select(*columns).where(trials.c.search_id == search_id, trials.c.confirmation.is_not(None)).order_by(trials.c.number)
        with self.read() as connection:
            return {number: _join(summary, documents or {}) for number, summary, documents in connection.execute(query)}

    def get_confirmation(self, search_id: str, number: int) -> Json | None:
        """What the confirm step found of one trial, with the documents; None if it was not confirmed."""
        wanted = select(trials.c.confirmation, trials.c.confirmation_documents).where(trials.c.search_id == search_id, trials.c.number == number)
        with self.read() as connection:
            row = connection.execute(wanted).one_or_none()
        return None if row is None or row.confirmation is None else _join(row.confirmation, row.confirmation_documents or {})

    def list_rungs(self, search_id: str, *, trial: int | None = None, with_documents: bool = True) -> list[RungRecord]:
        """Results in the order in which they came. Without documents they lack every `documents` key, and most of their bytes."""
        columns = [column for column in rungs.c if with_documents or column.name != "documents"]
        query = _of_search(rungs, search_id, trial).with_only_columns(*columns).order_by(rungs.c.sequence)
        with self.read() as connection:
            return [_rung(row) for row in connection.execute(query).mappings()]

    def add_points(self, new: Iterable[PointRecord], *, fence: Fence | None = None) -> None:
        """Add points of learning curves; one that is there already (same trial, rung and tokens) stays as it is.

        Raises:
            ValueError: a number of a point is not finite.
        """
        rows = [asdict(point) for point in sorted(new, key=lambda point: (point.search_id, point.trial, point.rung, point.tokens))]
        for row in rows:
            for name in ("loss", "learning_rate", "tokens_per_second"):
                if not math.isfinite(row[name]):
                    raise ValueError(f"{name}: expected a finite number, got {row[name]} at {row['tokens']} tokens of trial {row['trial']}")
        if rows:
            with self.write(fence=fence) as connection:
                connection.execute(self.insert_if_new(points), rows)

    def list_points(self, search_id: str, *, trial: int, rung: int | None = None) -> list[PointRecord]:
        """A trial's learning curve, or one rung's part of it, by rung and tokens."""
        query = _of_search(points, search_id, trial).order_by(points.c.rung, points.c.tokens)
        if rung is not None:
            query = query.where(points.c.rung == rung)
        with self.read() as connection:
            return [PointRecord(**row) for row in connection.execute(query).mappings()]


def _of_search(table: Table, search_id: str, trial: int | None) -> Any:
    query = select(table).where(table.c.search_id == search_id)
    return query if trial is None else query.where(table.c.trial == trial)


def get_trial(connection: Connection, search_id: str, number: int) -> TrialRecord:
    """The trial of that number."""
    query = select(*TRIAL_COLUMNS).where(trials.c.search_id == search_id, trials.c.number == number)
    # A number from a URL may be larger than what a database takes for an integer.
    row = connection.execute(query).mappings().one_or_none() if 0 <= number <= _MAX_NUMBER else None
    if row is None:
        raise NotFound(f"trial: expected the number of one of search {search_id!r}, got {number}")
    return trial_of(row)


def update_trial(connection: Connection, search_id: str, number: int, values: Json) -> None:
    """Change columns of a trial; its search is locked."""
    its = trials.c.search_id == search_id, trials.c.number == number
    before = connection.execute(select(trials.c.state, trials.c.rung).where(*its)).one()
    connection.execute(update(trials).where(*its).values(**values, updated_at=utc_now()))
    count_change(connection, search_id, before=(before.state, before.rung), after=(values.get("state", before.state), values.get("rung", before.rung)))


def _lock_running(connection: Connection, attempt_id: str) -> AttemptRecord:
    """The attempt, its search locked; Conflict when it is not running."""
    query = select(attempts).where(attempts.c.id == attempt_id)
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        raise NotFound(f"attempt: expected the id of one, got {attempt_id!r}")
    lock_search(connection, row["search_id"])
    # Read again under the lock: it may have ended while this waited.
    attempt = _attempt(connection.execute(query).mappings().one())
    if attempt.state is not AttemptState.RUNNING:
        raise Conflict(f"attempt {attempt_id}: expected a running one, got state {attempt.state}")
    return attempt


def _end_attempt(
    connection: Connection, attempt: AttemptRecord, *, state: AttemptState, reason: str | None, device_seconds: float | None = None
) -> AttemptRecord:
    values = {"state": state, "reason": reason, "finished_at": utc_now(), "device_seconds": device_seconds}
    change = update(attempts).where(attempts.c.id == attempt.id).values(values)
    ended = _attempt(connection.execute(change.returning(attempts)).mappings().one())
    if ended.stage == "rung" and ended.trial is not None:
        update_trial(connection, ended.search_id, ended.trial, {"state": TrialState.WAITING})
    write_event(connection, ended.search_id, f"attempt.{state}", {**_attempt_data(ended), "reason": ended.reason})
    add_device_seconds(connection, ended.search_id, device_seconds)
    return ended


def _attempt_data(attempt: AttemptRecord) -> Json:
    return {"attempt": attempt.id, "stage": attempt.stage, "trial": attempt.trial, "rung": attempt.rung}


def _rung_data(record: RungRecord, state: TrialState) -> Json:
    """The event's few figures; a result that lacks them is kept all the same."""
    figures: Json = {name: record.result[name]["value"] for name in ("kl", "loss") if name in record.result}
    if record.result.get("reused_from") is not None:
        figures["reused_from"] = record.result["reused_from"]
    return {"trial": record.trial, "rung": record.rung, "tokens": record.result.get("tokens"), "state": state, **figures}


def _rung_row(record: RungRecord) -> Json:
    summary, documents = _split(record.result)
    row = {name: getattr(record, name) for name in ("search_id", "trial", "rung", "sequence", "finished_at")}
    return {**row, "summary": summary, "documents": documents}


def _split(value: Json) -> tuple[Json, Json]:
    """A result without its `documents`, at any depth, and these alone in the same nesting."""
    summary: Json = {}
    documents: Json = {}
    for key, item in value.items():
        if key == "documents":
            documents[key] = item
        elif isinstance(item, dict):
            summary[key], inner = _split(item)
            if inner:
                documents[key] = inner
        else:
            summary[key] = item
    return summary, documents


def _join(summary: Json, documents: Json) -> Json:
    """The inverse of `_split`."""
    nested = {key: _join(summary[key], inner) if key in summary else inner for key, inner in documents.items()}
    return {**summary, **nested}


def trial_of(row: RowMapping) -> TrialRecord:
    """A trial out of its `TRIAL_COLUMNS`."""
    values: dict[str, Any] = {**row}
    return TrialRecord(**values | {"state": TrialState(row["state"])})


def _attempt(row: RowMapping) -> AttemptRecord:
    values: dict[str, Any] = {**row}
    return AttemptRecord(**values | {"state": AttemptState(row["state"])})


def _rung(row: RowMapping) -> RungRecord:
    values: dict[str, Any] = {**row}
    return RungRecord(result=_join(values.pop("summary"), values.pop("documents", {})), **values)
