"""Files that survive a kill: whole under their name, or not there. Light: no torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_json(value: Any, *, target: Path) -> None:
    """One JSON file, written under a temporary name and renamed: whole or absent.

    Raises:
        ValueError: the value holds NaN or infinity, which JSON has not: other readers would refuse the file.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    publish(temporary, target=target)


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
