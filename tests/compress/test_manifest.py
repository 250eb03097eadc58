"""Tensors on disk: what was saved is loaded, or an error says why not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from nas.compress.manifest import load_tensors, save_tensors
from nas.errors import CorruptFile, NotFound
from nas.files import write_json


def save(folder: Path, *, value: float) -> None:
    save_tensors(folder, name="state", tensors={"a": torch.full((3,), value)}, facts={"step": int(value)})


def weights_file(folder: Path) -> Path:
    return folder / json.loads((folder / "state.json").read_text())["file"]


def test_tensors_and_facts_come_back(tmp_path: Path) -> None:
    save(tmp_path, value=7.0)
    tensors, facts = load_tensors(tmp_path, name="state")
    assert tensors["a"].tolist() == [7.0] * 3
    assert facts == {"step": 7}


def test_the_newest_save_wins_and_leaves_no_other_file(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        save(tmp_path, value=value)
    assert load_tensors(tmp_path, name="state")[1] == {"step": 3}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_save_that_died_before_its_manifest_leaves_the_old_pair(tmp_path: Path) -> None:
    save(tmp_path, value=1.0)
    (tmp_path / f"state-{'0' * 16}.safetensors").write_bytes(b"half")
    assert load_tensors(tmp_path, name="state")[1] == {"step": 1}


def test_two_names_share_a_folder(tmp_path: Path) -> None:
    save(tmp_path, value=1.0)
    save_tensors(tmp_path, name="state-b", tensors={"b": torch.ones(1)}, facts={})
    save(tmp_path, value=2.0)
    assert load_tensors(tmp_path, name="state-b")[0]["b"].tolist() == [1.0]


def test_a_missing_manifest_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"state\.json"):
        load_tensors(tmp_path, name="state")


def test_a_flipped_bit_is_corrupt(tmp_path: Path) -> None:
    save(tmp_path, value=1.0)
    content = bytearray(weights_file(tmp_path).read_bytes())
    content[-1] ^= 1
    weights_file(tmp_path).write_bytes(content)
    with pytest.raises(CorruptFile, match="expected sha256"):
        load_tensors(tmp_path, name="state")


@pytest.mark.parametrize("manifest", ["", "{}", "[]", '{"file": "gone.safetensors", "sha256": "0", "facts": {}}'])
def test_a_broken_manifest_is_corrupt(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "state.json").write_text(manifest)
    with pytest.raises(CorruptFile, match="expected a manifest"):
        load_tensors(tmp_path, name="state")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_json_is_not_written(tmp_path: Path, value: float) -> None:
    write_json({"loss": 1.0}, target=tmp_path / "a.json")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json({"loss": value}, target=tmp_path / "a.json")
    assert [json.loads(path.read_text()) for path in tmp_path.iterdir()] == [{"loss": 1.0}]
