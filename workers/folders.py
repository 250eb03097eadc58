"""Where the files of a search are, and when they go. It deletes; but for students that are taken over it writes nothing.

trials/N/          a trial's checkpoints and its student, until the trial or the search has ended; that of a verified finalist stays, to
                   be bundled when somebody asks, and for searches that start from this one
attempts/ID/       an attempt's mailbox (see step.py), until the search has ended; that of a failed attempt stays, for its log
model.tar          of a full distillation, what came out; model/ (its checkpoints among it) and student/ (the bundle that it
                   starts from, where the search has none) until it has ended
winner/            the bundle; those of further budgets beside it: winner-1/, ...
bundles/N/         that of another trial, packed when it was asked for (see packing.py)

Where the nodes share files by URL (NAS_SHARED) the same paths are keys below it. There a trial has a tree for each attempt that
trained it, attempts/ID/ has the outcome alone, and what is deleted is so a little later, by a thread of its own.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nas.errors import FilesUnavailable
from nas.files import folder_bytes, link_or_copy
from nas.search.layout import STUDENT, trial_folder
from nas.settings import Settings
from nas.shared_files import SharedFiles
from nas.store.records import AttemptRecord
from nas.store.store import Store
from nas.trial_files import REUSED, UNFINISHED
from workers.outcome import RESULT, Outcome, read_outcome

logger = logging.getLogger(__name__)

MODEL, MODEL_TAR, OWN_BUNDLE = "model", "model.tar", "student"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUse:
    """The bytes of one search."""

    num_bytes: int
    of_trial: Callable[[int], int]
    """Those of one trial."""
    seconds: float
    """That counting them took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchFolder:
    """The folder of one search. What is not there can be deleted all the same: a restart may do it twice."""

    path: Path
    shared: SharedFiles | None = None
    """Where the nodes share files by URL: those."""

    @classmethod
    def of(cls, search_id: str, *, settings: Settings) -> SearchFolder:
        return cls(path=settings.searches_folder / search_id, shared=None if settings.shared_url is None else _open(settings.shared_url))

    def trial(self, number: int) -> Path:
        return trial_folder(self.path, number=number)

    def tree(self, attempt: AttemptRecord) -> str:
        """By URL, the key of what the rung of an attempt left."""
        return self._key(f"trials/{attempt.trial}/{attempt.id}")

    def attempt(self, attempt_id: str) -> Path:
        return self.path / "attempts" / attempt_id

    def winner(self, *, budget: int) -> Path:
        return self.path / (f"winner-{budget}" if budget else "winner")

    def drop_trial(self, number: int, *, attempts: Collection[str]) -> None:
        """Delete a trial's files.

        Args:
            attempts: all that were begun of its rungs. By URL it is theirs that go, so that a deletion that comes late takes nothing of a later one's.
        """
        shutil.rmtree(self.trial(number), ignore_errors=True)
        self._delete_trees(number, attempts=attempts, keep=None)

    def drop_superseded(self, number: int, *, attempts: Collection[str], tree: str) -> None:
        """By URL: of the trees that these attempts of a trial have, keep that whose result counts."""
        self._delete_trees(number, attempts=attempts, keep=tree)

    def _delete_trees(self, number: int, *, attempts: Collection[str], keep: str | None) -> None:
        if self.shared is not None:
            names = {*attempts, *(f"{attempt}{UNFINISHED}" for attempt in attempts)} - {keep}
            _remover().submit(_delete_among, self.shared, self._key(f"trials/{number}"), names=names)

    def take_student(self, number: int, *, source: SearchFolder, source_number: int, tree: str | None) -> bool:
        """Make the student of another search's trial this trial's; False where it is not there any more.

        Linked where the disk allows it: a student is never written to again, only replaced.

        Args:
            tree: the other's, see `nas.trial_files`.
        """
        if self.shared is not None:
            return tree is not None and self.shared.copy_tree(source._key(f"trials/{source_number}/{tree}"), to=self._key(f"trials/{number}/{REUSED}"))
        if not (source.trial(source_number) / STUDENT).is_dir():
            return False
        target = self.trial(number)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source.trial(source_number), target, copy_function=link_or_copy)
        return True

    def find_outcomes(self, attempt_ids: Collection[str]) -> dict[str, Outcome]:
        """The outcomes that steps left, of those that did: also of steps whose controller died before it heard."""
        found = {attempt_id: outcome for attempt_id in attempt_ids if (outcome := read_outcome(self.attempt(attempt_id))) is not None}
        if self.shared is not None:
            for attempt_id in set(self.shared.children(self._key("attempts"))) & (set(attempt_ids) - found.keys()):
                if (values := self.shared.read_json(self._key(f"attempts/{attempt_id}/{RESULT}"))) is not None:
                    found[attempt_id] = Outcome.from_dict(values)
        return found

    def measure(self) -> Future[DiskUse]:
        """Count the search's bytes: at once in a folder; by URL in the remover's thread, after all that was to be deleted."""
        if self.shared is not None:
            return _remover().submit(_measure, self.shared, self._key("").rstrip("/"))
        measured, began = Future[DiskUse](), time.perf_counter()
        num_bytes = folder_bytes(self.path)
        use = DiskUse(num_bytes=num_bytes, of_trial=lambda number: folder_bytes(self.trial(number)), seconds=time.perf_counter() - began)
        measured.set_result(use)
        return measured

    def clear(self, *, keep_attempts: Collection[str], keep_trials: Collection[int]) -> None:
        """The search has ended: its bundle holds the winner, and the store what was measured of the others."""
        trials = self.path / "trials"
        for folder in trials.iterdir() if trials.exists() else ():
            if folder.name not in map(str, keep_trials):
                shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # not there, or something is kept
            trials.rmdir()
        attempts = self.path / "attempts"
        for folder in attempts.iterdir() if attempts.exists() else ():
            if folder.name not in keep_attempts:
                shutil.rmtree(folder, ignore_errors=True)
        self.delete_shared("trials", keep=tuple(map(str, keep_trials)))
        self.delete_shared("attempts")

    def clear_distillation(self) -> None:
        """A full distillation has ended: what came out is in its tar."""
        for name in (MODEL, OWN_BUNDLE):
            shutil.rmtree(self.path / name, ignore_errors=True)
            self.delete_shared(name)

    def _key(self, name: str) -> str:
        return f"{self.path.parent.name}/{self.path.name}/{name}"

    def delete_shared(self, name: str, *, keep: Collection[str] = ()) -> None:
        """By URL: delete all below a name in this folder but what is right below it and kept; a little later."""
        if self.shared is not None:
            _remover().submit(_delete_all_but, self.shared, self._key(name), keep=tuple(keep))


@lru_cache(maxsize=4)
def _open(url: str) -> SharedFiles:
    return SharedFiles(url)


@lru_cache(maxsize=1)
def _remover() -> ThreadPoolExecutor:
    """One thread: an object store that is slow to delete must not keep the controller from its leases."""
    return ThreadPoolExecutor(1, thread_name_prefix="remover")


def sweep_by_url(store: Store, *, settings: Settings) -> None:
    """Delete what searches that were deleted have left where the nodes share files by URL; by the remover's thread, a little later."""
    if settings.shared_url is not None:
        _remover().submit(_sweep, _open(settings.shared_url), store)


def _sweep(shared: SharedFiles, store: Store) -> None:
    try:
        there = shared.children("searches")  # before the store is asked: a search has its row before it has files
        for name in set(there) - store.search_ids():
            shared.delete(f"searches/{name}")
            logger.info("files of a deleted search removed", extra={"action": "swept", "search_id": name})
    # Broad: nobody waits for this thread; the next sweep asks once more.
    except Exception:
        logger.exception("files of deleted searches not removed", extra={"action": "sweep_failed"})


def _measure(shared: SharedFiles, key: str) -> DiskUse:
    began, trials = time.perf_counter(), Counter[str]()
    sizes = shared.sizes(key)
    for path, num_bytes in sizes.items():
        top, _, below = path.partition("/")
        if top == "trials":
            trials[below.partition("/")[0]] += num_bytes
    return DiskUse(num_bytes=sum(sizes.values()), of_trial=lambda number: trials[str(number)], seconds=time.perf_counter() - began)


def _delete_among(shared: SharedFiles, key: str, *, names: Collection[str]) -> None:
    try:
        for name in shared.children(key):
            if name in names:
                shared.delete(f"{key}/{name}")
    except FilesUnavailable as error:
        # The end of the search asks once more.
        logger.warning("not deleted: %s", error, extra={"action": "delete_failed", "key": key})


def _delete_all_but(shared: SharedFiles, key: str, *, keep: Collection[str]) -> None:
    try:
        if not keep:
            shared.delete(key)
        for name in shared.children(key) if keep else ():
            if name not in keep:
                shared.delete(f"{key}/{name}")
    except FilesUnavailable as error:
        # The end of the search, or its deletion, asks once more.
        logger.warning("not deleted: %s", error, extra={"action": "delete_failed", "key": key})
