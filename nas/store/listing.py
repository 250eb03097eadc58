"""Pages of trials in any of their orders, and files by their digest. Each page is one question that an index answers, however deep it is."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import or_, select, tuple_

from nas.store.database import Database
from nas.store.records import ArtifactRecord, TrialRecord, TrialState
from nas.store.tables import artifacts, searches, trials
from nas.store.trials import TRIAL_COLUMNS, trial_of

TrialOrder = Literal["number", "-number", "parameters", "-parameters"]
"""By what trials are ordered; a minus is the largest first."""


class Listing(Database):
    """What only readers ask for."""

    def page_trials(
        self,
        search_id: str,
        *,
        order: TrialOrder = "number",
        state: TrialState | None = None,
        origin: str | None = None,
        after: tuple[int, ...] | None = None,
        limit: int,
    ) -> list[TrialRecord]:
        """Trials behind a place in an order.

        Args:
            origin: a whole one, or its kind: `anchor` for all of `anchor:...`.
            after: `trial_place` of the last one seen.
        """
        place = [trials.c[name] for name in _places(order)]
        query = select(*TRIAL_COLUMNS).where(trials.c.search_id == search_id).limit(limit)
        query = query.order_by(*(column.desc() if order.startswith("-") else column for column in place))
        if state is not None:
            query = query.where(trials.c.state == state)
        if origin is not None:
            query = query.where(or_(trials.c.origin == origin, trials.c.origin.startswith(f"{origin}:", autoescape=True)))
        if after is not None:
            bound: Any = tuple_(*after)
            query = query.where(tuple_(*place) < bound if order.startswith("-") else tuple_(*place) > bound)
        with self.read() as connection:
            return [trial_of(row) for row in connection.execute(query).mappings()]

    def find_artifact(self, sha256: str, *, project: str) -> ArtifactRecord | None:
        """A file of one of the project's searches; of several with the same content, the newest."""
        query = select(artifacts).join(searches, searches.c.id == artifacts.c.search_id).where(artifacts.c.sha256 == sha256, searches.c.project == project)
        with self.read() as connection:
            row = connection.execute(query.order_by(artifacts.c.search_id.desc()).limit(1)).mappings().one_or_none()
        return None if row is None else ArtifactRecord(**row)


def trial_place(trial: TrialRecord, *, order: TrialOrder) -> tuple[int, ...]:
    """Where a trial stands in an order."""
    return tuple(getattr(trial, name) for name in _places(order))


def _places(order: TrialOrder) -> tuple[str, ...]:
    name = order.removeprefix("-")
    return (name,) if name == "number" else (name, "number")
