"""Where a trial's files are when machines share them by URL: in one tree for each attempt that trained it. Light: no torch."""

from __future__ import annotations

from nas.store.records import AttemptState
from nas.store.store import Store

REUSED = "reused"
"""The tree of a student that was taken over from another search."""


def find_tree(search_id: str, number: int, *, store: Store) -> str | None:
    """The name of the tree that holds what the trial's last rung left: its attempt; None where no rung has ended."""
    rungs = store.list_rungs(search_id, trial=number, with_documents=False)
    if not rungs:
        return None
    if rungs[-1].result.get("reused_from") is not None:
        return REUSED
    made = [attempt for attempt in store.list_attempts(search_id, trial=number) if attempt.stage == "rung" and attempt.rung == rungs[-1].rung]
    return next((attempt.id for attempt in made if attempt.state is AttemptState.SUCCEEDED), None)
