"""Documents, and files of them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path


def stories(count: int, *, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [f"{seed}.{index} " + " ".join(generator.choices(["cat", "dog", "sun", "tree", "ran"], k=20)) for index in range(count)]


def write_jsonl(path: Path, documents: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return path
