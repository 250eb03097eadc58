from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from nas.compress.manifest import load_tensors, save_tensors
from nas.errors import Fenced
from nas.files import is_disk_full, publishing_unless, whole_file, withdraw, write_json


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a").exists()
    with pytest.raises(UnicodeEncodeError), whole_file(tmp_path / "a") as temporary:
        temporary.write_text("half \ud800", encoding="utf-8")

    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_known_by_whatever_exception_it_comes(number: int) -> None:
    error = OSError(number, os.strerror(number))
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = error

    assert is_disk_full(error)
    assert is_disk_full(wrapped)
    assert is_disk_full(SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})"))


def test_other_errors_are_no_full_disk() -> None:
    assert not is_disk_full(OSError(errno.EACCES, os.strerror(errno.EACCES)))
    assert not is_disk_full(MemoryError("no room"))


SMALL_FILES = """
import resource, sys
from pathlib import Path
import torch
from nas.compress.manifest import save_tensors
from nas.files import is_disk_full
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_tensors(Path(sys.argv[1]), name="trunk", tensors={"weight": torch.ones(10_000)}, facts={})
except BaseException as error:
    sys.exit(0 if is_disk_full(error) else f"{error!r}")
"""


def test_tensors_that_do_not_fit_the_disk_leave_the_old_ones_and_no_half_file(tmp_path: Path) -> None:
    save_tensors(tmp_path, name="trunk", tensors={"weight": torch.zeros(10)}, facts={"step": 1})
    before = sorted(path.name for path in tmp_path.iterdir())

    done = subprocess.run([sys.executable, "-c", SMALL_FILES, str(tmp_path)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert load_tensors(tmp_path, name="trunk")[1] == {"step": 1}


def test_json_that_does_not_fit_the_disk_leaves_the_old_one(tmp_path: Path) -> None:
    write_json({"kept": True}, target=tmp_path / "a.json")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_json({"long": "x" * 5000}, target=tmp_path / "a.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert json.loads((tmp_path / "a.json").read_text()) == {"kept": True}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_process_that_was_replaced_publishes_and_withdraws_nothing(tmp_path: Path) -> None:
    """Whatever it had begun: its place was taken while it wrote, and what the other one left stays, byte for byte."""
    save_tensors(tmp_path, name="trunk", tensors={"w": torch.ones(3)}, facts={"step": 500})
    write_json({"a": 1}, target=tmp_path / "facts.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    is_replaced = [False]

    with publishing_unless(lambda: is_replaced[0]):
        late_file = whole_file(tmp_path / "facts.json")
        late_file.__enter__().write_text("late")
        is_replaced[0] = True
        for late in (
            lambda: late_file.__exit__(None, None, None),
            lambda: save_tensors(tmp_path, name="trunk", tensors={"w": torch.zeros(3)}, facts={"step": 100}),
            lambda: write_json({"a": 2}, target=tmp_path / "facts.json"),
            lambda: withdraw(tmp_path / "trunk.json"),
        ):
            with pytest.raises(Fenced, match="got a process that was replaced"):
                late()

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_json({"a": 2}, target=tmp_path / "facts.json")


def test_what_a_process_writes_beside_another_never_mixes(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a") as one, whole_file(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
        assert one != other
    assert (tmp_path / "a").read_text() in ("one", "other")
