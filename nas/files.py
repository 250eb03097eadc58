"""Files that survive a kill: whole under their name, or not there. Light: no torch.

Everything that others will read gets its name here, so here is also the one place where a process that was replaced is kept
from leaving anything (`publishing_unless`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from nas.errors import Fenced

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left, a quota, and the largest file that this process may write."""

_is_replaced: ContextVar[Callable[[], bool]] = ContextVar("is_replaced", default=lambda: False)


@contextmanager
def publishing_unless(is_replaced: Callable[[], bool]) -> Iterator[None]:
    """Inside, no file is published once `is_replaced` says so: it is asked at the last moment before every one."""
    token = _is_replaced.set(is_replaced)
    try:
        yield
    finally:
        _is_replaced.reset(token)


def check_may_publish(target: Path) -> None:
    """
    Raises:
        Fenced: another process has taken this one's place.
    """
    if _is_replaced.get()():
        raise Fenced(f"{target}: expected to be published by whoever works on it now, got a process that was replaced")


def temporary_for(target: Path, *, suffix: str = "") -> Path:
    """A name beside the target that no other process has: not a process's number, which two containers may share."""
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}{suffix}")


@contextmanager
def whole_file(target: Path, *, suffix: str = "") -> Iterator[Path]:
    """A path to write to, which gets the target's name when the block ends well. Nothing stays of it otherwise: a full disk must not get fuller."""
    temporary = temporary_for(target, suffix=suffix)
    try:
        yield temporary
        publish(temporary, target=target)
    finally:
        temporary.unlink(missing_ok=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception comes of a disk without room, whatever library raised it on the way."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK_FULL:
            return True
        # The writer of safetensors and others hand on the system's text alone.
        if any(f"os error {number}" in str(seen).lower() or os.strerror(number) in str(seen) for number in _DISK_FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def write_json(value: Any, *, target: Path) -> None:
    """One JSON file, written under a temporary name and renamed: whole or absent.

    Raises:
        ValueError: the value holds NaN or infinity, which JSON has not: other readers would refuse the file.
    """
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with whole_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def publish(temporary: Path, *, target: Path) -> None:
    """Give a finished file its name; what a crash leaves behind is the old file or the new one.

    Raises:
        Fenced: another process has taken this one's place; the target is as it was.
    """
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    check_may_publish(target)
    temporary.replace(target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def link_or_copy(source: str, target: str) -> str:
    """A second name for a file that is never written to again, only replaced; returns the target. A `copy_function` of shutil."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
    return target


def empty_folder(folder: Path) -> None:
    """Remove all that is in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def withdraw(target: Path) -> None:
    """Remove a published file before what it vouches for is made anew.

    Raises:
        Fenced: another process has taken this one's place.
    """
    check_may_publish(target)
    target.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """sha256 of one file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(folder: Path) -> int:
    """Bytes of all regular files below a folder; those that go meanwhile do not count. A file with several names counts once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(parent, name))
            except FileNotFoundError:
                continue
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                total += found.st_size
    return total
