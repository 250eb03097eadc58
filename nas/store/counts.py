"""Numbers of trials, kept with every change of one, so that whoever asks how far a search is counts nothing.

Whoever changes a trial has locked its search, so nothing here can meet itself.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, delete, func, insert, select, update

from nas.store.database import Database
from nas.store.machines import Fence
from nas.store.records import TrialCounts, TrialState
from nas.store.tables import trial_counts, trials


class Counts(Database):
    """Read the numbers; count again what another version may have changed."""

    def trial_counts(self, search_ids: Collection[str]) -> dict[str, TrialCounts]:
        """Of each search, in one query."""
        query = select(trial_counts.c.search_id, trial_counts.c.state, trial_counts.c.num_rungs, trial_counts.c.num_trials)
        cells: dict[str, dict[tuple[TrialState, int], int]] = {search_id: {} for search_id in search_ids}
        with self.read() as connection:
            for search_id, state, num_rungs, number in connection.execute(query.where(trial_counts.c.search_id.in_(cells))):
                cells[search_id][TrialState(state), num_rungs] = number
        return {search_id: TrialCounts(cells=found) for search_id, found in cells.items()}

    def recount_trials(self, search_id: str, *, fence: Fence | None) -> None:
        """Count a search's trials again: a controller of an older version, which this one took over from, has not kept the numbers."""
        num_rungs = func.coalesce(trials.c.rung + 1, 0)
        counted = select(trials.c.search_id, trials.c.state, num_rungs, func.count()).where(trials.c.search_id == search_id)
        with self.write(fence=fence) as connection:
            connection.execute(delete(trial_counts).where(trial_counts.c.search_id == search_id))
            names = ["search_id", "state", "num_rungs", "num_trials"]
            connection.execute(insert(trial_counts).from_select(names, counted.group_by(trials.c.search_id, trials.c.state, num_rungs)))


def count_change(connection: Connection, search_id: str, *, before: tuple[str, int | None] | None, after: tuple[str, int | None]) -> None:
    """A trial's (state, rung) was one and is another now; `before` is None for a new trial."""
    if before == after:
        return
    if before is not None:
        _add(connection, search_id, before, -1)
    _add(connection, search_id, after, 1)


def _add(connection: Connection, search_id: str, cell: tuple[str, int | None], number: int) -> None:
    state, rung = cell
    key = {"search_id": search_id, "state": state, "num_rungs": 0 if rung is None else rung + 1}
    found = update(trial_counts).where(*(trial_counts.c[name] == value for name, value in key.items()))
    if connection.execute(found.values(num_trials=trial_counts.c.num_trials + number)).rowcount == 0:
        connection.execute(insert(trial_counts).values(**key, num_trials=number))
