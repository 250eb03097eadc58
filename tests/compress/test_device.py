"""What is left for a process: the kernel's number, and the limits around it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nas.compress import device
from nas.compress.device import available_memory, capacity, free_disk

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB available and no cgroups."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {16 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\n")
    (tmp_path / "proc/self/status").write_text(f"Name:\tpython\nRssAnon:\t{2 * 2**20} kB\n")
    (tmp_path / "proc/self/cgroup").write_text("")
    monkeypatch.setattr(device, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(device, "_CGROUPS", tmp_path / "cgroup")
    return tmp_path


def cgroup(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_without_limits_it_is_the_kernels_estimate(machine):
    assert available_memory() == 8 * GIB


def test_the_tightest_enclosing_cgroup_counts_and_cached_files_are_free(machine):
    (machine / "proc/self/cgroup").write_text("0::/pod/container\n")
    cgroup(machine / "cgroup/pod", memory__max=str(4 * GIB), memory__current=str(3 * GIB), memory__stat=f"anon {GIB}\ninactive_file {GIB}")
    cgroup(machine / "cgroup/pod/container", memory__max="max", memory__current=str(GIB))
    assert available_memory() == 2 * GIB


def test_version_1_limits_count_too(machine):
    (machine / "proc/self/cgroup").write_text("5:cpu:/\n4:memory:/job\n0::/\n")
    cgroup(machine / "cgroup/memory/job", memory__limit_in_bytes=str(3 * GIB), memory__usage_in_bytes=str(2 * GIB))
    assert available_memory() == GIB


def test_what_the_process_holds_already_counts_as_room(machine):
    assert capacity("cpu").device_bytes == capacity("cpu").host_bytes == 10 * GIB - 400_000_000


def test_this_machine_can_be_read(tmp_path):
    assert capacity("cpu").device_bytes > 0
    assert free_disk(tmp_path / "not" / "yet") > 0
