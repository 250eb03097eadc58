"""Where the files of a search are, and when they go. It deletes; it reads and writes nothing.

trials/N/          a trial's checkpoints and its student, until the trial or the search has ended; that of a verified finalist stays, to
                   be bundled (`nas bundle`), and for searches that start from this one
attempts/ID/       an attempt's mailbox (see step.py), until the search has ended; that of a failed attempt stays, for its log
winner/            the bundle; those of further budgets beside it: winner-1/, ...
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nas.search.layout import STUDENT, trial_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchFolder:
    """The folder of one search. What is not there can be deleted all the same: a restart may do it twice."""

    path: Path

    def trial(self, number: int) -> Path:
        return trial_folder(self.path, number=number)

    def attempt(self, attempt_id: str) -> Path:
        return self.path / "attempts" / attempt_id

    def winner(self, *, budget: int) -> Path:
        return self.path / (f"winner-{budget}" if budget else "winner")

    def drop_trial(self, number: int) -> None:
        """A trial that ended without a student worth keeping."""
        shutil.rmtree(self.trial(number), ignore_errors=True)

    def take_student(self, number: int, *, source: Path) -> bool:
        """Make the student of another search's trial this trial's; False where it is not there any more.

        Linked where the disk allows it: a student is never written to again, only replaced.
        """
        if not (source / STUDENT).is_dir():
            return False
        target = self.trial(number)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, copy_function=_link_or_copy)
        return True

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


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
