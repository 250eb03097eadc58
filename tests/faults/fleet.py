"""Real controller processes on one database, and searches for them whose steps only pretend (`pretending_controller.py`), or train."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field

from nas.settings import Settings
from nas.spec import dump_spec, parse_spec
from nas.store.records import SearchState
from nas.store.store import Store
from tests.faults.history import History
from tests.faults.summary import RecordProperty, record
from tests.simulation.several import View
from tests.simulation.simulator import INPUTS, make_spec
from tests.waiting import wait_until

LEASE_SECONDS = 1.0
PRETENDING, TRAINING = "tests.faults.pretending_controller", "workers"


@dataclass(kw_only=True)
class Fleet:
    """A store, and controllers on it in processes of their own."""

    environment: dict[str, str]
    module: str = PRETENDING
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    search_ids: list[str] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)
    """What was done to processes on which database."""

    def __post_init__(self) -> None:
        self.settings = Settings.from_environment(self.environment)
        self.settings.data_folder.mkdir(parents=True, exist_ok=True)
        self.store = Store.open(self.settings.database_url, migrate=True)

    def start(self) -> subprocess.Popen[bytes]:
        with (self.settings.data_folder / "controllers.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", self.module], env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.processes.append(process)
        return process

    def searches_of(self, process: subprocess.Popen[bytes]) -> list[str]:
        owners = {controller.owner for controller in self.store.list_controllers() if controller.pid == process.pid}
        return [lease.name for lease in self.store.list_leases() if lease.owner in owners and lease.name in self.search_ids]

    def wait_for_share(self, process: subprocess.Popen[bytes]) -> list[str]:
        return list(wait_until(lambda: self.searches_of(process), what="it leads a search"))

    def num_rungs(self) -> int:
        return sum(len(self.store.list_rungs(search_id, with_documents=False)) for search_id in self.search_ids)

    def wait_for_progress(self) -> None:
        """A few more results than there are now."""
        wanted = self.num_rungs() + 2
        wait_until(lambda: self.num_rungs() >= wanted or self.have_ended(), what="results come in")

    def have_ended(self) -> bool:
        return not self.store.active_searches()

    def can_write(self) -> bool:
        if not self.store.is_sqlite:
            return True
        with closing(sqlite3.connect(self.settings.database_url.removeprefix("sqlite:///"), timeout=0.5)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
            return True

    def stop_beyond_the_lease(self, process: subprocess.Popen[bytes]) -> None:
        """It wakes when others lead what it led."""
        led = set(self.wait_for_share(process))
        os.kill(process.pid, signal.SIGSTOP)
        self.note("controller stopped")
        while not self.can_write():  # it hangs inside a write to SQLite, which has one writer at a time
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.05)
            os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: self.have_ended() or not led & {lease.name for lease in self.store.list_leases() if str(process.pid) in lease.owner}, what="lost")
        self.wait_for_progress()
        os.kill(process.pid, signal.SIGCONT)

    def note(self, what: str) -> None:
        """Something was done to a process, or to the database."""
        self.happened[f"{what} on {'sqlite' if self.store.is_sqlite else 'postgresql'}"] += 1

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL."""
        process.kill()
        process.wait()
        self.note("controller killed")

    def check(self, record_property: RecordProperty) -> None:
        """Every search ends well, and nothing was lost or done twice."""
        wait_until(self.have_ended, what="every search ends")
        for search_id in self.search_ids:
            assert self.store.get_search(search_id).state is SearchState.SUCCEEDED, self.store.get_search(search_id).error
            View(store=self.store, search_id=search_id, history=[]).check()
        record(record_property, [History(store=self.store, search_id=search_id) for search_id in self.search_ids], kills=dict(self.happened))

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGCONT)
                process.kill()
                process.wait()
        self.store.close()


def submit_pretended(fleet: Fleet, *, num: int) -> None:
    for number in range(num):
        spec = make_spec(
            num_trials=4,
            num_workers=2,
            seed=number // 2,
            rungs={"num_trained": 1},
            sampler={"name": "random", "max_trials": 4},
            controls={"anchors": False, "num_random": 0},
            num_finalists=1,
        )
        fleet.search_ids.append(fleet.store.create_search(spec=dump_spec(parse_spec(json.dumps(spec))), inputs=INPUTS, plan={}, label="").id)
