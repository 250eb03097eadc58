"""Parameters of students, counted by the controller. Where a student lies behind a URL a thread reads its header: an object store that is slow
must not keep the controller from its leases.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

from nas.errors import FilesUnavailable
from nas.search.layout import STUDENT
from nas.store.records import AttemptRecord
from workers.folders import SearchFolder
from workers.verdicts import Undecided, count_file_parameters, count_tree_parameters

logger = logging.getLogger(__name__)


class Recount:
    """The students of one search."""

    def __init__(self, folder: SearchFolder) -> None:
        self._folder = folder
        self._counting: dict[str, Future[int]] = {}
        """By attempt, of students behind a URL."""

    def count(self, attempt: AttemptRecord) -> int:
        """The parameters of the student's file that a last rung's attempt left.

        Raises:
            Untrue: there is no such file. Undecided: it lies behind a URL, and was not read yet; the first question begins to.
        """
        if self._folder.shared is None:
            assert attempt.trial is not None
            return count_file_parameters(self._folder.trial(attempt.trial) / STUDENT)
        if attempt.id not in self._counting:
            self._counting[attempt.id] = _readers().submit(count_tree_parameters, self._folder.shared, self._folder.tree(attempt))
        if not self._counting[attempt.id].done():
            raise Undecided
        try:
            return self._counting.pop(attempt.id).result()
        except FilesUnavailable as away:
            logger.warning("student not counted yet: %s", away, extra={"action": "recount_failed", "attempt_id": attempt.id})
            raise Undecided from away


@lru_cache(maxsize=1)
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="recount")
