"""What the device, the host and the disk have left for this process. Reads the machine; what is needed is computed in nas/memory.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from nas.memory import Capacity

_LIBRARIES = 400_000_000
"""Anonymous memory of a process that has imported torch and transformers and holds nothing yet, in bytes."""
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def capacity(device: str) -> Capacity:
    """What this process may still take, with what it has taken: a model that it holds already is part of every estimate.

    Args:
        device: cpu, cuda or cuda:N. On CUDA a share set by `set_per_process_memory_fraction` holds.
    """
    kind = torch.device(device).type
    host = available_memory() + max(0, _own_memory() - _LIBRARIES)
    if kind != "cuda":
        return Capacity(device=kind, device_bytes=host, host_bytes=host)
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return Capacity(device=kind, device_bytes=min(free + torch.cuda.memory_reserved(device), share), host_bytes=host)


def available_memory() -> int:
    """Bytes of the host's memory that new allocations may take without swapping: the kernel's estimate, and every enclosing cgroup's limit."""
    meminfo = dict(line.split(":", 1) for line in (_PROC / "meminfo").read_text(encoding="ascii").splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    return max(0, min([available, *_cgroup_rooms()]))


def free_disk(folder: Path) -> int:
    """Free bytes of the file system that will hold `folder`, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    disk = os.statvfs(existing)
    return disk.f_bavail * disk.f_frsize


def _own_memory() -> int:
    """Anonymous memory of this process, in bytes; memory-mapped files are not among it."""
    status = dict(line.split(":", 1) for line in (_PROC / "self/status").read_text(encoding="ascii").splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def _cgroup_rooms() -> Iterator[int]:
    """Limit less use (page cache that can be dropped is not counted as used) of this process's cgroups, version 1 and 2, up to the root."""
    for line in (_PROC / "self/cgroup").read_text(encoding="ascii").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            names, root = ("memory.max", "memory.current", "inactive_file"), _CGROUPS
        elif "memory" in controllers.split(","):
            names, root = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), _CGROUPS / "memory"
        else:
            continue
        inner = root / path.lstrip("/")
        # In a container the path is the host's, and its own files are at the root.
        for folder in (inner, *inner.parents):
            if (folder / names[0]).exists():
                yield from _room(folder, names=names)
            if folder == root:
                break


def _room(folder: Path, *, names: tuple[str, str, str]) -> Iterator[int]:
    limit, use, statistics = folder / names[0], folder / names[1], folder / "memory.stat"
    text = limit.read_text(encoding="ascii").strip()
    if text == "max" or not use.exists():
        return
    counted = dict(line.split() for line in statistics.read_text(encoding="ascii").splitlines() if len(line.split()) == 2) if statistics.exists() else {}
    yield int(text) - int(use.read_text(encoding="ascii")) + int(counted.get(names[2], 0))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it: on a CPU without, bfloat16 is emulated and far slower than float32."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device.type == "cuda"
