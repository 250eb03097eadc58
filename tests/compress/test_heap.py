"""The heap keeps what a step frees: the next step faults in no pages."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest

ARENAS = """
import ctypes, sys, threading
from nas.compress.heap import use_few_arenas
if sys.argv[1] == "few":
    use_few_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
barrier = threading.Barrier(9)
def work():
    libc.malloc(1000)
    barrier.wait()
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
barrier.wait()
libc.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
barrier.wait()
"""

STEPS = """
import resource, sys
from nas.compress.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def step():
    kept = [bytearray(b"x") * 2**22 for _ in range(8)]
    del kept
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_repeated_step_faults_in_no_pages() -> None:
    """Against a heap that returns every large block, as glibc's does until it has adapted, and whenever the heap's top is free."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    run = partial(subprocess.run, env=environment, capture_output=True, check=True)
    faults = {mode: int(run([sys.executable, "-c", STEPS, mode]).stdout) for mode in ("kept", "returned")}
    assert faults["kept"] < 100 < faults["returned"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_all_threads_share_two_arenas() -> None:
    run = partial(subprocess.run, capture_output=True, check=True)
    arenas = {mode: run([sys.executable, "-c", ARENAS, mode]).stdout.count(b"<heap nr=") for mode in ("few", "many")}
    assert arenas["few"] <= 2 < arenas["many"]
