"""One contract for both executors: every step that was started ends in exactly one outcome, whatever becomes of its process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nas.search.layout import prepared_key
from nas.settings import Settings
from nas.spec import dump_spec, parse_spec
from nas.store.store import Store
from nas.submission import check_submission
from tests.waiting import BUSY_SECONDS, wait_until
from workers.executor import Executor, LocalExecutor
from workers.liveness import read_beat, supersede
from workers.logs import LOG
from workers.outcome import RESULT, Outcome, read_outcome
from workers.step import PROGRESS, Step, execute

DATABASE_URL = "postgresql://nas:correct-horse@db.example.org/nas"


@pytest.fixture(scope="module")
def ray_executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    from workers.ray_executor import RayExecutor

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAS_DATABASE_URL", DATABASE_URL)
        executor = RayExecutor(settings_in(tmp_path_factory.mktemp("ray")), save_node=lambda node: None)
    yield executor
    executor.close()


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "ray":
        yield request.getfixturevalue("ray_executor")
        return
    local = LocalExecutor()
    yield local
    local.close()


def settings_in(folder: Path) -> Settings:
    return dataclasses.replace(Settings.from_environment({"NAS_DATA": str(folder)}), num_cpus=1, num_gpus=0)


@pytest.fixture(scope="module")
def request_of(tmp_path_factory: pytest.TempPathFactory, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What the controller sends with every step of a search whose prepared folder is filled."""
    settings = settings_in(tmp_path_factory.mktemp("data"))
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    spec = parse_spec(json.dumps(tiny_spec()))
    inputs = check_submission(spec, store=store).inputs
    store.close()
    prepared = settings.prepared_folder / prepared_key(spec, inputs=inputs)
    request = {"spec": dump_spec(spec), "inputs": inputs, "prepared": str(prepared)}
    (settings.data_folder / "p").mkdir()
    outcome = execute(Step(key="p", stage="prepare", folder=str(settings.data_folder / "p"), request=request, cpus=1.0, gpus=0.0))
    assert outcome.succeeded, outcome.message
    return request


@pytest.fixture
def make_step(request_of: dict[str, Any], tmp_path: Path) -> Callable[..., Step]:
    made: list[Step] = []

    def make(*, stage: str = "rung", **changes: Any) -> Step:
        shape = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        request = {**request_of, "shape": shape, "rung": 0, "trial_folder": str(tmp_path / "trial"), **changes}
        key = f"att_{len(made)}"
        (tmp_path / key).mkdir()
        made.append(Step(key=key, stage=stage, folder=str(tmp_path / key), request=request, cpus=1.0, gpus=0.0, beat_seconds=0.2))
        return made[-1]

    return make


@pytest.fixture
def endless(make_step: Callable[..., Step], request_of: dict[str, Any]) -> Step:
    """A rung that would train for hours."""
    spec = json.loads(json.dumps(request_of["spec"]))
    spec["distillation"]["decay_share"] = 0.0
    spec["rungs"]["first_tokens"] = 2**40
    spec["rungs"]["num_trained"] = 1
    return make_step(spec=spec, rung=1)


def wait_for(executor: Executor, *, num_outcomes: int = 1) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    deadline = time.monotonic() + BUSY_SECONDS
    while len(outcomes) < num_outcomes:
        assert time.monotonic() < deadline, f"{len(outcomes)} of {num_outcomes} outcomes after {BUSY_SECONDS} s"
        for key, outcome in executor.wait(timeout_seconds=0.5):
            assert key not in outcomes, "a second outcome of one step"
            outcomes[key] = outcome
    return outcomes


def wait_for_start(step: Step) -> int:
    """The process id that a step reports when it begins."""
    path = Path(step.folder) / PROGRESS
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"), what="the start of a step")
    return int(json.loads(path.read_text().splitlines()[0])["pid"])


def test_every_step_ends_once_in_its_result_or_its_failure(executor: Executor, make_step: Callable[..., Step]) -> None:
    good, bad = (dataclasses.replace(step, context={"search_id": f"srch_{step.stage}"}) for step in (make_step(), make_step(stage="polish")))
    executor.start(good)
    executor.start(bad)

    outcomes = wait_for(executor, num_outcomes=2)

    assert outcomes[good.key].succeeded, outcomes[good.key].message
    assert (outcomes[good.key].result or {})["rung"] == 0
    assert read_outcome(Path(good.folder)) == outcomes[good.key]
    assert not outcomes[bad.key].succeeded
    assert outcomes[bad.key].reason == "error"
    assert "expected prepare, rung, confirm or bundle, got 'polish'" in outcomes[bad.key].message
    assert executor.wait(timeout_seconds=0.1) == []
    logs = [(Path(step.folder) / LOG).read_text() for step in (good, bad)]  # of one warm worker, with Ray
    assert [f"{step.stage} begins search_id=srch_{step.stage} attempt_id={step.key}" in log for step, log in zip((good, bad), logs, strict=True)] == [
        True,
        True,
    ]
    assert ["Traceback" in log for log in logs] == [False, True]
    assert "polish" not in logs[0]


def test_a_step_does_not_inherit_the_password_of_the_database(executor: Executor, endless: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_DATABASE_URL", DATABASE_URL)

    executor.start(endless)
    inherited = Path(f"/proc/{wait_for_start(endless)}/environ").read_bytes()
    executor.kill(endless.key)
    wait_for(executor)

    assert b"PATH=" in inherited
    assert b"correct-horse" not in inherited


def test_a_killed_process_is_a_dead_worker(executor: Executor, endless: Step) -> None:
    executor.start(endless)
    os.kill(wait_for_start(endless), signal.SIGKILL)

    outcome = wait_for(executor)[endless.key]

    assert (outcome.succeeded, outcome.reason, outcome.retryable) == (False, "worker_died", True)
    assert executor.wait(timeout_seconds=0.1) == []


def test_a_step_that_was_stopped_and_superseded_leaves_nothing_when_it_wakes(executor: Executor, endless: Step) -> None:
    """Else it would save its training beside the attempt that took its place, as one that is only asked to stop does."""
    executor.start(endless)
    pid = wait_for_start(endless)
    progress = Path(endless.folder) / PROGRESS
    wait_until(lambda: "tokens" in progress.read_text(), what="training")
    beat = read_beat(Path(endless.folder))
    wait_until(lambda: read_beat(Path(endless.folder)) != beat, what="a beat while it trains")
    os.kill(pid, signal.SIGSTOP)
    supersede(Path(endless.folder))
    trial = Path(endless.request["trial_folder"])
    before = {path: path.stat().st_mtime_ns for path in trial.rglob("*") if path.is_file()}
    os.kill(pid, signal.SIGCONT)

    outcome = wait_for(executor)[endless.key]

    assert outcome.reason in ("superseded", "worker_died"), outcome  # the local executor knows a step by its result, of which there is none
    assert {path: path.stat().st_mtime_ns for path in trial.rglob("*") if path.is_file()} == before
    assert not (Path(endless.folder) / RESULT).exists()


def test_a_step_uses_its_cpus_and_no_more_until_it_is_killed(executor: Executor, endless: Step) -> None:
    """Also after the death of a worker: with Ray this is the second step of a cluster whose first worker was killed."""
    executor.start(endless)
    process = psutil.Process(wait_for_start(endless))
    wait_until(lambda: (Path(endless.folder) / PROGRESS).read_text().count("\n") >= 2, what="a training step")
    busy_percent = process.cpu_percent(interval=1.0)
    threads = process.environ()["OMP_NUM_THREADS"]

    executor.kill(endless.key)

    assert wait_for(executor)[endless.key].reason == "worker_died"
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, what="the end of the process")
    assert threads == "1"
    assert busy_percent < 150.0


def test_waiting_takes_its_time_when_nothing_runs(executor: Executor) -> None:
    began = time.monotonic()

    assert executor.wait(timeout_seconds=0.2) == []
    assert time.monotonic() - began >= 0.19


def test_killing_what_does_not_run_does_nothing(executor: Executor) -> None:
    executor.kill("att_unknown")

    assert executor.wait(timeout_seconds=0.0) == []


@pytest.mark.ray
def test_a_step_that_can_never_fit_is_refused_at_once(ray_executor: Executor, make_step: Callable[..., Step]) -> None:
    step = dataclasses.replace(make_step(), cpus=64.0)

    ray_executor.start(step)

    ((key, outcome),) = ray_executor.wait(timeout_seconds=0.0)
    assert key == step.key
    assert (outcome.reason, outcome.retryable) == ("unavailable", False)
    assert outcome.message == "resources.cpus: expected at most the 1 of this machine's cluster, got 64"


@pytest.mark.ray
def test_a_local_cluster_removes_the_folders_of_dead_ones_only(ray_executor: Any) -> None:
    import fcntl

    from workers import ray_executor as module

    session = ray_executor._session
    assert session.folder.stat().st_mode & 0o077 == 0
    abandoned = session.folder.parent / f"{module.SESSION_PREFIX}abandoned{os.getpid()}"
    abandoned.mkdir()
    (abandoned / module.LOCK).touch()

    other = module._Session()

    assert not abandoned.exists()
    assert session.folder.exists(), "the folder of a living cluster was removed"
    with (other.folder / module.LOCK).open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    other.remove()
    assert not other.folder.exists()
