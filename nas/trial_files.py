"""Where a trial's files are when machines share them by URL: in one tree for each attempt that trained it. Light: no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nas.search.layout import trial_folder
from nas.settings import Settings
from nas.shared_files import SharedFiles
from nas.store.records import AttemptState, SearchRecord
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


def has_student(search_id: str, number: int, *, store: Store, settings: Settings) -> bool:
    """Whether the files of a trial are still there.

    Raises:
        FilesUnavailable: machines share files by URL, which cannot be reached now.
    """
    folder = trial_folder(settings.searches_folder / search_id, number=number)
    if settings.shared_url is None:
        return folder.is_dir()
    tree = find_tree(search_id, number, store=store)
    key = folder.relative_to(settings.data_folder).as_posix()
    return tree is not None and SharedFiles(settings.shared_url).find_tree(f"{key}/{tree}") is not None


def bundle_request(search: SearchRecord, number: int, *, store: Store, student: Path, prepared: Path, folder: Path) -> dict[str, Any]:
    """What the bundle of a verified trial is written from, once its search has ended.

    Args:
        student: the trial's folder. prepared: of the search. folder: where the bundle goes.
    """
    trial = store.get_trial(search.id, number)
    return {
        "search_id": search.id,
        "trial": number,
        "shape": trial.shape,
        "trial_folder": str(student),
        "bundle_folder": str(folder),
        "prepared": str(prepared),
        "inputs": search.inputs,
        "spec": search.spec,
        "result": store.list_rungs(search.id, trial=number)[-1].result,
        "confirmation": trial.confirmation,
        "board": search.board,
    }
