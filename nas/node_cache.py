"""This machine's copies of shared files: each tree fetched once, under a lock, checked against its digests, the least recently used removed first.

All processes of a machine share the folder. An entry is a folder under its key; beside it a lock file, held shared by whoever
reads the entry and alone by whoever fills or removes it, whose time of change is the entry's last use. A process that dies
lets go of its locks; what it was filling is taken up by the next one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nas.errors import DoesNotFit, NotFound
from nas.shared_files import SharedFiles

logger = logging.getLogger(__name__)

FREE_SHARE = 0.1
"""Of the disk, left free where no size is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCache:
    """The copies below one folder."""

    folder: Path
    max_bytes: int | None
    """All entries together; None: as many as leave FREE_SHARE of the disk free. What is in use is never removed."""

    @contextmanager
    def reading(self, key: str, *, source: SharedFiles) -> Iterator[Path]:
        """A published tree as a folder of this machine, for as long as the context lasts. Nobody writes into it.

        Raises:
            NotFound, CorruptFile, FilesUnavailable: as `SharedFiles.fetch_tree`. DoesNotFit: the tree is larger than the cache may be.
        """
        entry = self._entry(f"{source.url}/{key}")
        while True:
            with _locked(entry, fcntl.LOCK_SH):
                if entry.is_dir():
                    yield entry
                    return
            with _locked(entry, fcntl.LOCK_EX):
                if not entry.is_dir():
                    self._fill(entry, key=key, source=source)

    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """A folder of this machine's own under a key, alone: work that a later step of the same trial may take up.

        Another process that still holds it, an attempt that was given up for instance, is not waited for: then it is an empty folder, gone afterwards.
        """
        entry = self._entry(key)
        with _locked(entry, fcntl.LOCK_EX, wait=False) as is_ours:
            if is_ours:
                entry.mkdir(exist_ok=True)
                yield entry
                return
        with self.scratch() as folder:
            yield folder

    def keep(self, work: Path, *, key: str, source: SharedFiles) -> None:
        """Make a folder of `writing` the copy of the tree that was published from it, so that this machine does not fetch what it made."""
        entry = self._entry(f"{source.url}/{key}")
        with _locked(entry, fcntl.LOCK_EX):
            if not entry.is_dir():
                work.rename(entry)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder, gone afterwards; one that a killed process left is removed like any entry."""
        entry = self._entry(os.urandom(16).hex())
        with _locked(entry, fcntl.LOCK_EX):
            entry.mkdir()
            try:
                yield entry
            finally:
                shutil.rmtree(entry, ignore_errors=True)

    def make_room(self, num_bytes: int) -> None:
        """Remove the least recently used entries until so many bytes more are allowed.

        Raises:
            DoesNotFit: the cache may never hold so many.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes = {lock: _size(_entry_of(lock)) for lock in self.folder.glob("*.lock")}
        held, disk = sum(sizes.values()), shutil.disk_usage(self.folder)
        limit = self.max_bytes if self.max_bytes is not None else int(held + disk.free - FREE_SHARE * disk.total)
        if num_bytes > limit:
            raise DoesNotFit(f"cache of this machine (NAS_CACHE={self.folder}): expected room for {num_bytes} bytes, got {max(limit, 0)}")
        for lock in sorted(sizes, key=_last_use):
            if held + num_bytes <= limit:
                return
            if _remove(_entry_of(lock)):
                held -= sizes[lock]
        if held + num_bytes > limit:
            logger.warning("cache is over its size: all of it is in use", extra={"action": "cache_over", "bytes": held + num_bytes, "max_bytes": limit})

    def _fill(self, entry: Path, *, key: str, source: SharedFiles) -> None:
        manifest = source.find_tree(key)
        if manifest is None:
            raise NotFound(f"{source.url}/{key}: expected a published tree, got none")
        partial = entry.with_name(f"{entry.name}.partial")
        self.make_room(manifest.bytes)
        partial.mkdir(exist_ok=True)
        source.fetch_tree(key, folder=partial, manifest=manifest)
        partial.rename(entry)
        logger.info("fetched %s", key, extra={"action": "cache_fill", "key": key, "bytes": manifest.bytes})

    def _entry(self, key: str) -> Path:
        """A short flat name: keys have slashes, and a tokenizer's or a socket's path must not grow long."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / hashlib.sha256(key.encode()).hexdigest()[:32]


@contextmanager
def _locked(entry: Path, kind: int, *, wait: bool = True) -> Iterator[bool]:
    """Hold an entry's lock; yields False where somebody else does and we do not wait. The lock file's time tells the last use."""
    path = entry.with_name(f"{entry.name}.lock")
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            if error.errno != errno.EWOULDBLOCK:
                raise
            yield False
            return
        if _is_same(file, path):
            break
        os.close(file)  # removed with its entry while we waited
    try:
        os.utime(file)
        yield True
        os.utime(file)
    finally:
        os.close(file)


def _is_same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _remove(entry: Path) -> bool:
    """Remove an entry that nobody uses; False: it is in use."""
    with _locked(entry, fcntl.LOCK_EX, wait=False) as is_ours:
        if not is_ours:
            return False
        for folder in (entry, entry.with_name(f"{entry.name}.partial")):
            shutil.rmtree(folder, ignore_errors=True)
        entry.with_name(f"{entry.name}.lock").unlink(missing_ok=True)
    return True


def _entry_of(lock: Path) -> Path:
    return lock.with_name(lock.name.removesuffix(".lock"))


def _last_use(lock: Path) -> float:
    try:
        return lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(entry: Path) -> int:
    """Bytes of an entry, filled or being filled; what is removed meanwhile counts nothing."""
    total = 0
    for folder in (entry, entry.with_name(f"{entry.name}.partial")):
        for parent, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.stat(os.path.join(parent, name)).st_size
                except FileNotFoundError:
                    continue
    return total
