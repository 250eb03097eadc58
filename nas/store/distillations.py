"""Full distillations of students that searches found.

One is a row of `searches` with `distils` set, so its events, attempts, logs, lease, requests, quotas and files are kept as a search's are; the student is its
one trial, which has the learning curve. Lists of searches leave it out.
"""

from __future__ import annotations

from sqlalchemy import insert, select, update

from nas.errors import Conflict, NotFound
from nas.shape import Shape
from nas.store.database import Database
from nas.store.machines import Fence
from nas.store.quotas import charge, lock_project
from nas.store.records import Json, SearchRecord, SearchState, TrialState, new_id, utc_now
from nas.store.searches import get_search, list_records, lock_search, write_event
from nas.store.tables import artifacts, searches, trials
from nas.store.trials import get_trial


class Distillations(Database):
    """Create, read and list full distillations, and keep what they made. What takes a `fence` raises Fenced when it is stale."""

    def create_distillation(
        self, *, search_id: str, trial: int, spec: Json, inputs: Json, tokens: int, label: str, project: str, traceparent: str | None = None
    ) -> SearchRecord:
        """A queued distillation of the student of a trial; event `distillation.created`.

        Args:
            tokens: that it is charged for.
        Raises:
            NotFound: no such project, search or trial.
            Conflict: the search has not succeeded.
            QuotaExceeded: the project may not have it now; nothing was stored.
        """
        distillation_id, now = new_id("dist"), utc_now()
        row = {
            "id": distillation_id,
            "label": label,
            "labels": {},
            "project": project,
            "state": SearchState.QUEUED,
            "num_events": 0,
            "created_at": now,
            "updated_at": now,
            "spec": spec,
            "inputs": inputs,
            "plan": {"max_distillation_tokens": tokens},
            "traceparent": traceparent,
            "distils": search_id,
        }
        with self.write(fence=None) as connection:
            quotas = lock_project(connection, project)
            lock_search(connection, search_id)  # it may not be deleted from here on
            search, student = get_search(connection, search_id), get_trial(connection, search_id, trial)
            if search.state is not SearchState.SUCCEEDED:
                raise Conflict(f"search {search_id}: expected the state succeeded, got {search.state}; there is nothing to distil")
            connection.execute(insert(searches).values(**row, state_since=self.steady_time(connection, is_kept=True)))
            kept = {"origin": student.origin, "shape": student.shape, "shape_key": Shape.from_dict(student.shape).key, "parameters": student.parameters}
            numbered = {"search_id": distillation_id, "number": trial, "state": TrialState.COMPLETED, "created_at": now, "updated_at": now}
            connection.execute(insert(trials).values(**kept, **numbered))
            charge(connection, project, quotas=quotas, num_searches=1, num_trials=0, tokens=tokens)
            write_event(connection, distillation_id, "distillation.created", {"search": search_id, "trial": trial, "tokens": tokens})
            return get_search(connection, distillation_id)

    def get_distillation(self, distillation_id: str, *, project: str | None = None) -> SearchRecord:
        """The distillation; of one project, or of any. Another project's is not found, as if it did not exist."""
        with self.read() as connection:
            row = connection.execute(select(searches.c.project, searches.c.distils).where(searches.c.id == distillation_id)).one_or_none()
            if row is None or row.distils is None or project not in (None, row.project):
                raise NotFound(f"distillation: expected the id of one, got {distillation_id!r}")
            return get_search(connection, distillation_id)

    def list_distillations(
        self, *, project: str, search_id: str | None = None, state: SearchState | None = None, after: str | None = None, limit: int = 50
    ) -> list[SearchRecord]:
        """A project's, newest first; of one search, in one state. `after` is the id of the last one already seen."""
        wanted = [searches.c.distils.is_not(None) if search_id is None else searches.c.distils == search_id, searches.c.project == project]
        if state is not None:
            wanted.append(searches.c.state == state)
        if after is not None:
            wanted.append(searches.c.id < after)
        with self.read() as connection:
            return list_records(connection, *wanted, limit=limit)

    def save_distilled(self, distillation_id: str, result: Json, *, fence: Fence | None) -> None:
        """Keep what a distillation made, its file under its digest; event `distillation.distilled`."""
        with self.write(fence=fence) as connection:
            write_event(connection, distillation_id, "distillation.distilled", {"tokens": result["tokens"], "sha256": result["sha256"]})
            connection.execute(update(searches).where(searches.c.id == distillation_id).values(winner=result))
            row = {"sha256": result["sha256"], "search_id": distillation_id, "path": result["file"]}
            connection.execute(self.insert_if_new(artifacts).values(row))
