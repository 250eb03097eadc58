"""Makes `data.sql` and `files.json`: a database and a data folder in the middle of searches, as another release left them.

Run from the root of a checkout of that release, with its own packages: `PYTHONPATH=. python .../make.py TARGET`. It uses that release's controller, store
and simulated workers. Now: 72bab94, whose schema is revision 0005, in which one controller leads all searches. The files are the mailboxes of the steps;
checkpoints there are none, because simulated steps make none.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import tempfile
from pathlib import Path
from typing import Any

from nas.spec import dump_spec, parse_spec
from nas.store.records import AttemptState, SearchState
from tests.simulation import simulator
from tests.simulation.simulator import INPUTS, Simulation, make_simulation, make_spec

CHANGES: dict[str, Any] = {"controls": {"anchors": False, "num_random": 1}, "num_finalists": 1}


def submit(simulation: Simulation, *, label: str, num_trials: int, seed: int) -> str:
    sampler = {"name": "random", "max_trials": num_trials}
    spec = parse_spec(json.dumps(make_spec(num_trials=num_trials, num_workers=3, seed=seed, rungs={"num_trained": 2}, sampler=sampler, **CHANGES)))
    return str(simulation.store.create_search(spec=dump_spec(spec), inputs=INPUTS, plan={}, label=label)[0].id)


def running(simulation: Simulation, search_id: str) -> list[str]:
    return [attempt.id for attempt in simulation.store.list_attempts(search_id) if attempt.state is AttemptState.RUNNING]


def main(target: Path) -> None:
    simulator.LEASE_SECONDS = 30.0
    folder = Path(tempfile.mkdtemp())
    ended = make_simulation(folder, num_trials=2, num_workers=9, seed=0, rungs={"num_trained": 1}, **CHANGES)
    ended.to_end()
    store = ended.store
    searching = submit(ended, label="searching", num_trials=6, seed=1)
    cancelled = submit(ended, label="cancelling", num_trials=3, seed=2)
    while len(store.list_rungs(searching)) < 8 or len(running(ended, searching)) < 2 or not running(ended, cancelled):
        ended.tick(timeout_seconds=1.0)
    store.request_cancel(cancelled)
    preparing = submit(ended, label="preparing", num_trials=2, seed=3)
    while not running(ended, preparing):
        ended.tick(timeout_seconds=0.01)
    submit(ended, label="queued", num_trials=2, seed=4)
    # One step has ended, and its controller dies before it hears of it.
    unheard = next(run for run in ended.cluster.running if run.outcome.succeeded and run.step.key in running(ended, searching) and run.step.request["rung"] < 2)
    assert unheard.outcome.result is not None
    unheard.outcome.result["parameters"] = next(trial.parameters for trial in store.list_trials(searching) if trial.shape == unheard.step.request["shape"])
    ended.cluster._settle(unheard)
    states = {search.label or "ended": search.state for search in store.list_searches()}
    assert states["searching"] is SearchState.SEARCHING
    assert states["cancelling"] is SearchState.CANCELLING
    assert states["preparing"] is SearchState.PREPARING
    store.close()

    with sqlite3.connect(folder / "nas.db") as connection:
        connection.execute("UPDATE leadership SET owner = 'previous:1:00000000', expires_at = '2026-01-01 00:00:00.000000'")
        (target / "data.sql").write_text("\n".join(connection.iterdump()) + "\n", encoding="utf-8")
    attempts = [attempt for search_id in (searching, cancelled, preparing) for attempt in running(ended, search_id)]
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name in attempts]
    files = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in found}
    (target / "files.json").write_text(json.dumps(files, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
