from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nas.store.records import AttemptRecord
from nas.store.store import Store
from workers.logs import FAILURE_LINES, LOG, LOG_SECONDS, MAX_LOG_BYTES, LogKeeper, captured, last_lines, read_tail

TWO_STEPS = """
import ctypes, logging, os, subprocess, sys, warnings
from pathlib import Path
from workers.logs import captured

print("before")
for number in (1, 2):
    folder = Path(sys.argv[1]) / str(number)
    folder.mkdir()
    with captured(folder, context={"search_id": "srch_1", "trial": number, "attempt_id": f"att_{number}"}):
        logging.getLogger("nas.x").info("logged %d", number)
        warnings.warn(f"warned {number}")
        print("printed", number)
        print("to standard error", number, file=sys.stderr)
        os.write(2, f"written {number}\\n".encode())
        ctypes.CDLL(None).puts(f"from C {number}".encode())
        subprocess.run(["/bin/echo", "from a child", str(number)], check=True)
        if number == 2 and len(sys.argv) > 2:
            ctypes.string_at(0)
    print("between", file=sys.stderr)
"""


def run_two_steps(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Two steps in one process, as a warm worker runs them."""
    return subprocess.run([sys.executable, "-c", TWO_STEPS, str(folder), *options], capture_output=True, text=True, check=False)


def test_each_step_of_a_worker_has_what_was_said_in_it_and_nothing_else(tmp_path: Path) -> None:
    done = run_two_steps(tmp_path)

    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("before\n", "between\nbetween\n")
    for number in (1, 2):
        lines = (tmp_path / str(number) / LOG).read_text().splitlines()
        said = {"printed", "to standard error", "written", "from C", "from a child"}
        assert {line.removesuffix(f" {number}") for line in lines if not line[0].isdigit()} == said
        ours, warning = (line for line in lines if line[0].isdigit())
        assert ours.endswith(f"INFO    nas.x: logged {number} search_id=srch_1 trial={number} attempt_id=att_{number}")
        assert f"WARNING py.warnings: UserWarning: warned {number} search_id=srch_1" in warning


def test_a_crash_of_native_code_leaves_its_stack_in_the_log(tmp_path: Path) -> None:
    done = run_two_steps(tmp_path, "crash")

    assert done.returncode < 0
    text = (tmp_path / "2" / LOG).read_text()
    assert "Fatal Python error: Segmentation fault" in text
    assert "string_at" in text


def test_a_step_that_raises_leaves_everything_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with captured(tmp_path, context={}):
            os.write(1, b"inside\n")
            raise ValueError("no")

    root = logging.getLogger()
    before = (root.level, root.handlers[:], len(os.listdir("/proc/self/fd")))
    with pytest.raises(ValueError, match="no"):
        fail()
    os.write(1, b"outside\n")

    assert (root.level, root.handlers[:], len(os.listdir("/proc/self/fd"))) == before
    assert capfd.readouterr().out == "outside\n"
    assert (tmp_path / LOG).read_text() == "inside\n"


def test_of_a_long_log_the_end_is_kept_in_whole_lines(tmp_path: Path) -> None:
    lines = [f"line {number} of many ümläut" for number in range(10_000)]
    (tmp_path / LOG).write_text("\n".join(lines) + "\n", encoding="utf-8")

    tail = read_tail(tmp_path)

    assert tail is not None
    first, *rest = tail.splitlines()
    assert first.startswith("... ")
    assert first.endswith(" bytes before this are not kept")
    assert rest == lines[-len(rest) :]
    assert MAX_LOG_BYTES - 100 < len("\n".join(rest).encode()) <= MAX_LOG_BYTES


def test_bytes_that_are_no_text_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(b"\xff\x00 native\n")

    assert read_tail(tmp_path) == "\ufffd\0 native\n"


def test_the_log_of_a_node_that_is_gone_is_none(tmp_path: Path) -> None:
    assert read_tail(tmp_path / "gone") is None


def test_no_secret_leaves_the_node_in_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    (tmp_path / LOG).write_text("native: wJalrXUtnFEMI/K7MDENG\npostgresql://nas:hunter2hunter2@db/nas\n", encoding="utf-8")

    assert read_tail(tmp_path) == "native: ***\npostgresql://nas:***@db/nas\n"


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Store, AttemptRecord]]:
    """A store in which a prepare step runs."""
    store = Store.open(f"sqlite:///{tmp_path / 'nas.db'}", migrate=True)
    search = store.create_search(spec={}, inputs={}, plan={}, label="")
    yield store, store.start_attempt(search.id, stage="prepare", trial=None, rung=None, fence=None)
    store.close()


def test_the_log_of_a_running_step_can_be_followed(tmp_path: Path, running: tuple[Store, AttemptRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    store, attempt = running
    now, written = [0.0], []
    fence = store.claim(attempt.search_id, owner="me", seconds=60.0)
    assert fence is not None
    save = store.save_logs
    monkeypatch.setattr(store, "save_logs", lambda *values, **options: (written.append(1), save(*values, **options)))
    keeper = LogKeeper(attempt.search_id, store=store, fence=fence, clock=lambda: now[0])
    seen = []
    for text in ("", "began\n", "", "step 1\n"):
        with (tmp_path / LOG).open("a", encoding="utf-8") as file:
            file.write(text)
        for _ in range(3):
            keeper.keep({attempt.id: tmp_path})
        seen.append(log.text if (log := store.read_log(attempt.id)) else None)
        now[0] += LOG_SECONDS

    assert seen == [None, "began\n", "began\n", "began\nstep 1\n"]
    assert len(written) == 2, "a log was written that had not grown"


def test_a_failure_carries_the_last_lines_only() -> None:
    assert last_lines("\n".join(map(str, range(100)))).splitlines() == [str(number) for number in range(100 - FAILURE_LINES, 100)]
    assert last_lines(None) == ""
    assert len(last_lines("x" * 100_000)) <= 4000
