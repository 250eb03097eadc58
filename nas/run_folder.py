"""The folder of a run outside of a search: claimed once, gone on with by the same run only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.errors import Conflict
from nas.files import write_json

WORK = ".work"
"""Inside the output folder: blocks and checkpoints, removed at the end."""
RUN = "run.json"
"""Inside the work folder: what the run depends on, so that another one does not go on from it."""
CHECKPOINT = "checkpoint"


def claim(out: Path, *, mark: str, facts: Mapping[str, Any], inputs: Sequence[Path]) -> Path:
    """The work folder inside `out`, once it is sure that `out` is free, or holds this very run, begun or done.

    Args:
        mark: file in `out` that a finished run leaves.
        facts: all that the result depends on.
    """
    if out.resolve() in {path.resolve() for path in inputs}:
        raise Conflict(f"out: expected a folder of its own, got the folder of an input: {out}")
    work = out / WORK
    done, begun = (out / mark).exists(), (work / RUN).exists()
    if not done and not begun and out.exists() and any(path.name != WORK for path in out.iterdir()):
        raise Conflict(f"out: expected a new or empty folder, or one of an earlier run, got one with other files: {out}")
    differences = _differences(facts, read_run(out / mark if done else work / RUN)) if done or begun else []
    if differences and (done or (work / CHECKPOINT).exists()):
        raise Conflict(f"out: {out} holds another run; " + "; ".join(differences) + "; give it another folder")
    if differences:  # nothing was trained: an attempt that failed at once does not bind the next one
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(facts, target=work / RUN)
    return work


def _differences(wanted: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """What is not the same in two runs, as `field: expected what is there, got what is wanted`."""
    found = []
    for name, value in wanted.items():
        if isinstance(value, Mapping) and isinstance(there.get(name), Mapping):
            found += _differences(value, there[name])
        elif json.loads(json.dumps(value)) != there.get(name):
            found.append(f"{name}: expected {there.get(name)}, with which it was begun, got {value}")
    return found


def read_run(path: Path) -> dict[str, Any]:
    """What `run.json` or a finished run's summary says."""
    values = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values
