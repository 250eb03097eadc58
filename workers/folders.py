"""Where the files of a search are, and when they go. It deletes; it reads and writes nothing.

trials/N/          a trial's checkpoints and its student, until the trial or the search has ended
attempts/ID/       an attempt's mailbox (see step.py), until the search has ended; that of a failed attempt stays, for its log
winner/            the bundle
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchFolder:
    """The folder of one search. What is not there can be deleted all the same: a restart may do it twice."""

    path: Path

    def trial(self, number: int) -> Path:
        return self.path / "trials" / str(number)

    def attempt(self, attempt_id: str) -> Path:
        return self.path / "attempts" / attempt_id

    @property
    def winner(self) -> Path:
        return self.path / "winner"

    def drop_trial(self, number: int) -> None:
        """A trial that ended without a student worth keeping."""
        shutil.rmtree(self.trial(number), ignore_errors=True)

    def clear(self, *, keep_attempts: Collection[str]) -> None:
        """The search has ended: its bundle holds the winner, and the store what was measured of the others."""
        shutil.rmtree(self.path / "trials", ignore_errors=True)
        attempts = self.path / "attempts"
        for folder in attempts.iterdir() if attempts.exists() else ():
            if folder.name not in keep_attempts:
                shutil.rmtree(folder, ignore_errors=True)
