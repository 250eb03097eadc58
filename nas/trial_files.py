"""The files that a trial leaves behind its search: whether they are there, and where. By URL: in one tree for each attempt that trained it. Light: no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nas.errors import Conflict
from nas.search.layout import SORTED, STUDENT, prepared_key, trial_folder
from nas.settings import Settings
from nas.shared_files import SharedFiles
from nas.spec import parse_spec
from nas.store.records import AttemptState, SearchRecord, TrialRecord
from nas.store.store import Store

REUSED = "reused"
"""The tree of a student that was taken over from another search."""
UNFINISHED = "-unfinished"
"""Behind an attempt's id: the tree of what it has trained so far."""


def is_verified(trial: TrialRecord) -> bool:
    """Whether the confirm step found its file to be the model that was scored, in a fresh process."""
    confirmation = trial.confirmation or {}
    return bool(confirmation.get("verified") and confirmation.get("reloaded", True))


def check_student(search: SearchRecord, trial: TrialRecord, *, store: Store, settings: Settings) -> None:
    """Refuse a trial whose student cannot be packed any more.

    Raises:
        Conflict: it was not verified, or its student, or what its search prepared, is gone.
        FilesUnavailable: machines share files by URL, which cannot be reached now.
    """
    name, confirmation = f"trial {trial.number} of search {search.id}", trial.confirmation or {}
    if not is_verified(trial):
        got = confirmation.get("reason") or ("one that was counted, but not reloaded" if confirmation else "one that was not confirmed")
        raise Conflict(f"{name}: expected one that the confirm step verified, got {got}")
    if not _has_student(search.id, trial.number, store=store, settings=settings):
        raise Conflict(f"{name}: expected its student on the disk, got one that was not kept (`retention.students`)")
    prepared = settings.prepared_folder / prepared_key(parse_spec(json.dumps(search.spec)), inputs=search.inputs)
    if not ((prepared / SORTED).is_dir() if settings.shared_url is None else _is_shared(prepared, settings=settings)):
        raise Conflict(f"{name}: expected what its search prepared on the disk, got a folder that is gone")


def find_tree(search_id: str, number: int, *, store: Store) -> str | None:
    """The name of the tree that holds what the trial's last rung left: its attempt; None where no rung has ended."""
    rungs = store.list_rungs(search_id, trial=number, with_documents=False)
    if not rungs:
        return None
    if rungs[-1].result.get("reused_from") is not None:
        return REUSED
    made = [attempt for attempt in store.list_attempts(search_id, trial=number) if attempt.stage == "rung" and attempt.rung == rungs[-1].rung]
    return next((attempt.id for attempt in made if attempt.state is AttemptState.SUCCEEDED), None)


def _has_student(search_id: str, number: int, *, store: Store, settings: Settings) -> bool:
    folder = trial_folder(settings.searches_folder / search_id, number=number)
    if settings.shared_url is None:
        return (folder / STUDENT).is_dir()
    tree = find_tree(search_id, number, store=store)
    return tree is not None and _is_shared(folder / tree, settings=settings)


def _is_shared(folder: Path, *, settings: Settings) -> bool:
    assert settings.shared_url is not None
    return SharedFiles(settings.shared_url).find_tree(folder.relative_to(settings.data_folder).as_posix()) is not None


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
