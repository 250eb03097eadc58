"""Real processes, killed for real: `nas serve` as a user runs it, in the middle of a search, on SQLite and on PostgreSQL.

Whatever is killed, the search ends with the leaderboard of a search that nothing disturbed, and nothing ran twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from nas.client import Client
from nas.settings import Settings
from nas.spec import dump_spec, parse_spec
from nas.store.records import AttemptState, TrialState
from nas.store.store import Store
from nas.submission import check_submission
from tests.faults.history import History
from tests.faults.summary import RecordProperty, record
from tests.waiting import BUSY_SECONDS, wait_until
from workers.controller import Controller
from workers.folders import SearchFolder
from workers.outcome import RESULT, Outcome
from workers.step import PROGRESS, Step, execute

pytestmark = [pytest.mark.faults, pytest.mark.ray]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class Service:
    """`nas serve` in its own process group, with its data; started again as often as a test likes."""

    environment: dict[str, str]
    settings: Settings
    process: subprocess.Popen[bytes] | None = None
    seen: dict[int, psutil.Process] = field(default_factory=dict)
    """Every process of the service there ever was."""

    def start(self) -> None:
        with (self.settings.data_folder / "serve.log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "nas.cli", "serve"], env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def tree(self) -> list[psutil.Process]:
        assert self.process is not None
        try:
            root = psutil.Process(self.process.pid)
            found = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            found = []
        self.seen.update({process.pid: process for process in found})
        return found

    def find(self, *words: str) -> psutil.Process | None:
        for process in self.tree():
            try:
                if all(word in " ".join(process.cmdline()) for word in words):
                    return process
            except psutil.Error:
                continue
        return None

    def kill(self) -> None:
        """SIGKILL to the supervisor and to all that it started, at once."""
        for process in self.tree():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        assert self.process is not None
        self.process.wait()

    def stop(self) -> int:
        """As Ctrl-C does; the exit code."""
        self.tree()
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=BUSY_SECONDS)

    def left(self) -> list[str]:
        """What still runs of all that there was."""
        return [f"{process.pid} {' '.join(process.cmdline())}" for process in self.seen.values() if is_alive(process)]

    def wait_until_gone(self) -> None:
        deadline = time.monotonic() + 30
        while left := self.left():
            assert time.monotonic() < deadline, f"still there after 30 s: {left}"
            time.sleep(0.1)

    def log(self) -> str:
        return (self.settings.data_folder / "serve.log").read_text()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'data' / 'nas.db'}"
    return str(request.getfixturevalue("new_postgresql_url")())


@pytest.fixture
def service(tmp_path: Path, database_url: str, register_tiny: Callable[..., None]) -> Iterator[Service]:
    with serving(tmp_path, database_url=database_url, register=register_tiny) as service:
        yield service


@contextmanager
def serving(folder: Path, *, database_url: str, register: Callable[..., None]) -> Iterator[Service]:
    data, home = folder / "data", folder / "home"
    for made in (data, home):
        made.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NAS_", "RAY_"))}
    # Its own, to see what stays there; short, for the paths of Ray's sockets.
    temporary = tempfile.mkdtemp(prefix="nas-t-")
    environment |= {
        "TMPDIR": temporary,
        "NAS_DATA": str(data),
        "NAS_DATABASE_URL": database_url,
        "NAS_PORT": str(port),
        "NAS_NUM_CPUS": "1",
        "NAS_NUM_GPUS": "0",
        "NAS_LEASE_SECONDS": "2",
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
    }
    service = Service(environment=environment, settings=Settings.from_environment(environment))
    store = Store.open(database_url, migrate=True)
    register(store=store, settings=service.settings)
    store.close()
    try:
        yield service
    finally:
        if service.process is not None and service.process.poll() is None:
            service.kill()
        shutil.rmtree(temporary, ignore_errors=True)


def submit(service: Service, spec: dict[str, Any]) -> str:
    with Client(f"http://127.0.0.1:{service.settings.port}") as client:
        wait_until(client.is_ready, what="the API answers")
        return str(client.submit(json.dumps(spec).encode())["id"])


def catch_running_rung(service: Service, store: Store, search_id: str, *, trial: int) -> int:
    """Waits until a trained rung of this trial, or of a later one, is being trained, and stops its worker (SIGSTOP): it cannot end before it is killed."""

    def catch() -> int | None:
        assert not store.get_search(search_id).state.is_terminal, f"too late: {store.get_search(search_id).error}"
        for attempt in store.list_attempts(search_id):
            if attempt.state is AttemptState.RUNNING and attempt.stage == "rung" and attempt.rung and (attempt.trial or 0) >= trial:
                folder = SearchFolder(path=service.settings.searches_folder / search_id).attempt(attempt.id)
                lines = (folder / PROGRESS).read_text().splitlines(keepends=True) if (folder / PROGRESS).exists() else []
                if lines and lines[0].endswith("\n"):
                    pid = int(json.loads(lines[0])["pid"])
                    time.sleep(0.1)  # into the training
                    os.kill(pid, signal.SIGSTOP)
                    if not (folder / RESULT).exists():
                        return pid
                    os.kill(pid, signal.SIGCONT)
        return None

    pid = int(wait_until(catch, what="a running rung"))
    service.tree()
    return pid


def wait_for_terminal(store: Store, search_id: str) -> None:
    wait_until(lambda: store.get_search(search_id).state.is_terminal, what="the search ends")


def wait_for_end(store: Store, search_id: str) -> None:
    wait_for_terminal(store, search_id)
    search = store.get_search(search_id)
    assert search.state == "succeeded", search.error


def figures(store: Store, search_id: str) -> list[Any]:
    """What must be the same bit for bit, in the leaderboard's order."""
    board = store.whole_board(search_id)
    assert board is not None
    names = ("number", "rank", "origin", "shape", "rung", "tokens", "score", "standard_error", "kl", "loss", "tasks", "state")
    return [{name: row[name] for name in names} for row in board["rows"]]


def check_history(store: Store, search_id: str) -> None:
    """Every trial ended once, and no rung that had a result ran again."""
    assert all(trial.state in (TrialState.COMPLETED, TrialState.STOPPED) for trial in store.list_trials(search_id))
    attempts = store.list_attempts(search_id)
    assert all(attempt.state is not AttemptState.RUNNING for attempt in attempts)
    finished: set[Any] = set()
    for attempt in attempts:
        step = (attempt.stage, attempt.trial, attempt.rung)
        assert step not in finished, f"{step} ran again after it had succeeded"
        if attempt.state is AttemptState.SUCCEEDED:
            finished.add(step)
    rungs = [(rung.trial, rung.rung) for rung in store.list_rungs(search_id, with_documents=False)]
    assert len(rungs) == len(set(rungs))
    assert {("rung", trial, rung) for trial, rung in rungs} == {step for step in finished if step[0] == "rung"}
    ends = [event.type for event in store.list_events(search_id, limit=100_000) if event.type in ("search.succeeded", "search.failed", "search.cancelled")]
    assert ends == ["search.succeeded"]


@pytest.fixture(scope="module")
def spec(tiny_spec: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return tiny_spec(
        rungs={"first_tokens": 4096, "factor": 2, "num_trained": 2, "keep": 0.5},
        distillation={"learning_rate": 3e-3, "batch_size": 2},
    )


class InlineExecutor:
    """Steps in this process, one after the other: nothing to kill, and no Ray."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def start(self, step: Step) -> None:
        self.steps.append(step)

    def wait(self, *, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        steps, self.steps = self.steps, []
        return [(step.key, execute(step)) for step in steps]

    def kill(self, key: str) -> None:
        raise AssertionError("nothing is killed here")

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, register_tiny: Callable[..., None], spec: dict[str, Any]) -> list[Any]:
    """The figures of the search when nothing is killed, nor restarted, nor run by Ray."""
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path_factory.mktemp("undisturbed"))})
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    parsed = parse_spec(json.dumps(spec))
    submission = check_submission(parsed, store=store)
    search = store.create_search(spec=dump_spec(parsed), inputs=submission.inputs, plan=submission.plan, label="")
    controller = Controller(store=store, executor=InlineExecutor(), settings=settings)
    threading.Thread(target=lambda: (wait_for_terminal(store, search.id), controller.stop()), daemon=True).start()
    controller.run()
    wait_for_end(store, search.id)
    check_history(store, search.id)
    found = figures(store, search.id)
    store.close()
    return found


def kill_controller(service: Service, worker: int) -> None:
    controller = service.find("-m", "workers")
    assert controller is not None
    controller.kill()
    # Ray's worker ends itself when its raylet is gone, which a stopped process cannot; it is in a process group of its own.
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)


def kill_worker(service: Service, worker: int) -> None:
    os.kill(worker, signal.SIGKILL)


def kill_service(service: Service, worker: int) -> None:
    service.kill()
    service.start()


def kill_supervisor(service: Service, worker: int) -> None:
    """Its children must notice by themselves, and be gone before the next service asks for their port."""
    assert service.process is not None
    service.process.kill()
    service.process.wait()
    service.wait_until_gone()
    service.start()


def interrupt_service(service: Service, worker: int) -> None:
    """Ctrl-C while a rung runs."""
    os.kill(worker, signal.SIGCONT)
    assert service.stop() == 0
    service.wait_until_gone()
    service.start()


NAMES = {
    kill_controller: "controller killed",
    kill_worker: "worker killed",
    kill_service: "service killed",
    kill_supervisor: "supervisor killed",
    interrupt_service: "service interrupted",
}
ENDS = {kill_worker: AttemptState.FAILED}
"""How the attempt that was hit ends; after any other kill it is lost, which does not count against it."""


def check_kills(
    service: Service, *, url: str, kills: list[Callable[[Service, int], None]], spec: dict[str, Any], undisturbed: list[Any], record_property: RecordProperty
) -> None:
    """One search through all kills, each at a later trial than the one before."""
    service.start()
    search_id = submit(service, spec)
    store = Store.open(url)
    for trial, kill in enumerate(kills):
        kill(service, catch_running_rung(service, store, search_id, trial=trial))
    wait_for_end(store, search_id)
    check_history(store, search_id)
    record(record_property, [History(store=store, search_id=search_id)], kills=Counter(f"{NAMES[kill]} on {url.partition(':')[0]}" for kill in kills))
    assert figures(store, search_id) == undisturbed
    states = [attempt.state for attempt in store.list_attempts(search_id)]
    hits = [ENDS.get(kill, AttemptState.LOST) for kill in kills]
    assert states.count(AttemptState.FAILED) == hits.count(AttemptState.FAILED)
    # A rung that ended in the moment of a Ctrl-C left its result, which is taken over: nothing is lost then.
    may_have_ended = kills.count(interrupt_service)
    assert hits.count(AttemptState.LOST) - may_have_ended <= states.count(AttemptState.LOST) <= hits.count(AttemptState.LOST)
    store.close()
    check_stopped(service)


def check_stopped(service: Service) -> None:
    """Ctrl-C ends all there ever was, and it leaves no temporary file, no file in the home, and no noise of a library's in the log."""
    assert service.stop() == 0
    service.wait_until_gone()
    assert list(Path(service.environment["TMPDIR"]).glob("nas-ray-*")) == []
    assert not (Path(service.environment["HOME"]) / ".ray").exists()
    log = service.log()
    assert [words for words in ("alembic", "Token authentication", "Loading weights", "Traceback") if words in log] == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_controller_worker_and_service_are_killed_in_one_search(
    service: Service, database_url: str, spec: dict[str, Any], undisturbed: list[Any], record_property: RecordProperty
) -> None:
    check_kills(
        service, url=database_url, kills=[kill_controller, kill_worker, kill_service], spec=spec, undisturbed=undisturbed, record_property=record_property
    )


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_the_service_is_killed_on_postgresql(
    service: Service, database_url: str, spec: dict[str, Any], undisturbed: list[Any], record_property: RecordProperty
) -> None:
    check_kills(service, url=database_url, kills=[kill_service], spec=spec, undisturbed=undisturbed, record_property=record_property)


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_controller_and_worker_are_killed_on_postgresql(
    service: Service, database_url: str, spec: dict[str, Any], undisturbed: list[Any], record_property: RecordProperty
) -> None:
    check_kills(service, url=database_url, kills=[kill_controller, kill_worker], spec=spec, undisturbed=undisturbed, record_property=record_property)


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
def test_the_supervisor_is_killed_and_the_service_interrupted(
    service: Service, database_url: str, spec: dict[str, Any], undisturbed: list[Any], record_property: RecordProperty
) -> None:
    check_kills(service, url=database_url, kills=[kill_supervisor, interrupt_service], spec=spec, undisturbed=undisturbed, record_property=record_property)
