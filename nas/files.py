"""Files that survive a kill: whole under their name, or not there. Light: no torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left, a quota, and the largest file that this process may write."""


@contextmanager
def whole_file(target: Path, *, suffix: str = "") -> Iterator[Path]:
    """A path to write to, which gets the target's name when the block ends well. Nothing stays of it otherwise: a full disk must not get fuller."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}{suffix}")
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
    """Give a finished file its name; what a crash leaves behind is the old file or the new one."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def file_digest(path: Path) -> str:
    """sha256 of one file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
