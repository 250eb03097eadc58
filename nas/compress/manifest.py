"""Tensors that survive a kill and show a flipped bit: one safetensors file and a JSON manifest with its sha256.

The tensors' file is named after its content and the manifest is renamed into place last, so a reader sees the old pair or
the new pair, never a mixture. Does not know what the tensors mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nas.errors import CorruptFile, NotFound
from nas.files import file_digest, link_or_copy, publish, temporary_for, write_json


def save_tensors(folder: Path, *, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write `folder/name.json` (the facts and the digest) and the tensors beside it; replaces an older pair of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(folder / f"{name}.safetensors")
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
        digest = file_digest(temporary)
        weights = folder / f"{name}-{digest[:16]}.safetensors"
        publish(temporary, target=weights)
    finally:
        temporary.unlink(missing_ok=True)
    write_json({"file": weights.name, "sha256": digest, "facts": dict(facts)}, target=folder / f"{name}.json")
    # Also what processes that were killed had not finished, and one that was replaced has not yet.
    for stale in (*folder.glob(f"{name}-{'[0-9a-f]' * 16}.safetensors"), *folder.glob(f".{name}.safetensors.*")):
        if stale != weights:
            stale.unlink(missing_ok=True)


def load_tensors(folder: Path, *, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The memory-mapped tensors and the facts of `save_tensors`.

    Raises:
        NotFound: there is no manifest of that name.
        CorruptFile: the manifest cannot be read, or the tensors' file is gone or differs from it.
    """
    manifest = folder / f"{name}.json"
    if not manifest.exists():
        raise NotFound(f"{manifest}: no such file")
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        weights, expected, facts = folder / content["file"], content["sha256"], content["facts"]
        found = file_digest(weights)
        if found != expected:
            raise CorruptFile(f"{weights}: expected sha256 {expected}, got {found}")
        return load_file(weights), facts
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise CorruptFile(f"{manifest}: expected a manifest and the file it names, got {error!r}") from error


def read_manifest(folder: Path, *, name: str) -> dict[str, Any] | None:
    """The manifest alone: `file`, `sha256` and `facts`; None where there is none, or one that cannot be read."""
    try:
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) and {"file", "sha256", "facts"} <= content.keys() else None


def link_tensors(folder: Path, *, name: str, into: Path) -> None:
    """Give the pair of that name, if there is one, second names in another folder of the same disk: there it stays when the first ones are replaced."""
    seen: dict[str, Any] | None = None
    while (content := read_manifest(folder, name=name)) is not None and content != seen:
        try:
            link_or_copy(str(folder / content["file"]), str(into / content["file"]))
        except FileNotFoundError:  # replaced since the manifest was read, or lost
            seen = content
            continue
        write_json(content, target=into / f"{name}.json")
        return
