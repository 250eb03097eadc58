"""What the whole service is at, in a few grouped queries, of all projects together: for its metrics."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select

from nas.store.database import Database
from nas.store.records import AttemptState, SearchState, TrialState
from nas.store.tables import attempts, searches, trial_counts

_OPEN = [state for state in SearchState if not state.is_terminal]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceFigures:
    """Counts at one moment. Trials and attempts are those of searches that have not ended: the others do not change any more."""

    searches: dict[SearchState, int]
    trials: dict[TrialState, int]
    attempts: dict[tuple[str, AttemptState, str], int]
    """By stage, state and reason; the reason of one that runs or succeeded is empty."""
    oldest_queued_seconds: float
    """Since the search that waits longest for a controller was queued; 0 when none waits."""


class Figures(Database):
    """Counts over all searches."""

    def read_figures(self) -> ServiceFigures:
        """Cost: as much as the searches, and the attempts of those that are open."""
        of_open = select(searches.c.id).where(searches.c.state.in_(_OPEN))
        with self.read() as connection:
            states = {
                SearchState(state): count
                for state, count in connection.execute(select(searches.c.state, func.count()).where(searches.c.distils.is_(None)).group_by(searches.c.state))
            }
            kept = select(trial_counts.c.state, func.sum(trial_counts.c.num_trials))
            trial_states = kept.where(trial_counts.c.search_id.in_(of_open)).group_by(trial_counts.c.state)
            counts = {TrialState(state): int(count) for state, count in connection.execute(trial_states)}
            # "timeout: 30 s are over" counts as timeout; messages would make a series of their own each.
            position = func.instr if self.is_sqlite else func.strpos
            end = func.coalesce(func.nullif(position(attempts.c.reason, ":"), 0), func.length(attempts.c.reason) + 1)
            reason = func.coalesce(func.substr(attempts.c.reason, 1, end - 1), "").label("reason")
            columns = (attempts.c.stage, attempts.c.state, reason)
            grouped = select(*columns, func.count()).where(attempts.c.search_id.in_(of_open)).group_by(*columns)
            tries = {(stage, AttemptState(state), why): count for stage, state, why, count in connection.execute(grouped)}
            since = func.coalesce(searches.c.state_since, searches.c.updated_at)
            waiting_since = connection.execute(select(func.min(since)).where(searches.c.state == SearchState.QUEUED)).scalar()
            waited = (self.steady_time(connection) - waiting_since).total_seconds() if waiting_since is not None else 0.0
        return ServiceFigures(
            searches={state: states.get(state, 0) for state in SearchState},
            trials={state: counts.get(state, 0) for state in TrialState},
            attempts=tries,
            oldest_queued_seconds=max(0.0, waited),
        )
