"""Steps as Ray tasks, on a local cluster or on one by address. It and `ray_nodes.py` import ray.

One task per step, `max_retries=0`: retries are ours, bounded and with a reason. CPU workers stay warm between steps; a GPU
step gets a process of its own (`max_calls=1` on the decorator: `.options` would not set it), so that its memory returns.
Ray's own failure detection takes a minute; the controller's leases do not wait for it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError, NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nas.errors import FilesUnavailable, InvalidSpec, Problem
from nas.settings import Settings
from nas.shared_files import SharedFiles
from nas.store.machines import NodeRecord
from workers import on_node
from workers.courier import Deliverer, PostOffice, raised_flags
from workers.executor import NOT_FOR_STEPS
from workers.outcome import RESULT, Outcome, read_outcome
from workers.ray_nodes import RayNodes
from workers.step import Step

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 * 2**20
"""Steps pass paths, never weights; Ray's default of 30 % of the memory would only take it away from training."""
EXCHANGE_SECONDS = 0.5
"""Between two looks at what the steps have sent."""
SESSION_PREFIX = "nas-ray-"
MAX_PARENT = 107 - 85
"""Length of the temporary folder's path: a socket's has at most 107 bytes, of which Ray's names and ours take 85."""
LOCK = "lock"


class RayExecutor:
    """The Ray driver; lives in the controller's process. Losing the cluster's head ends this process (its supervisor restarts it).

    Args:
        save_node: told of every node of the cluster, when it changes and now and then.
        work: module:function that runs a step on a node and returns its outcome; None: `step.execute`, or `away.run` where files are shared by URL.
    Raises:
        InvalidSpec: the cluster asks nobody for a token, or not for ours.
        FilesUnavailable: the shared files cannot be reached from here.
    """

    def __init__(self, settings: Settings, *, save_node: Callable[[NodeRecord], None], work: str | None = None) -> None:
        # Steps that use no GPU must not see one: since Ray 2.55 the list is no longer emptied for them.
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "1"
        environment = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
        self._session: _Session | None = None
        self._capacity: dict[str, float] = {}
        if settings.ray_address:
            _connect(settings.ray_address, insecure=settings.ray_insecure, environment=environment)
        else:
            environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
            environment |= dict.fromkeys(NOT_FOR_STEPS, "")  # its processes inherit this one's environment; empty counts as absent
            self._session = _Session()
            ray.init(
                address="local",  # without it Ray joins whatever cluster already runs on the machine
                num_cpus=settings.num_cpus,
                num_gpus=settings.num_gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(self._session.folder / "r"),  # Ray opens this one to everybody; its parent is closed
                **_common(environment),
            )
            self._capacity = ray.cluster_resources()
        ray_logger = logging.getLogger("ray")
        ray_logger.propagate = True  # its messages in our format: without this and with `configure_logging` off they go nowhere
        ray_logger.setLevel(logging.WARNING)
        ray.cloudpickle.register_pickle_by_value(on_node)
        # This machine is like itself; that its files are being edited is nobody's concern.
        versions = {} if settings.ray_address is None else on_node.versions()
        self._nodes = RayNodes(expected={"versions": versions, "files": _mark_files(settings)}, save=save_node)
        self._work, self._arguments = work or "workers.step:execute", dict[str, Any]()
        self._post: _Post | None = None
        self._files: SharedFiles | None = None
        self._data_folder = settings.data_folder
        if settings.shared_url is not None and work is None:
            self._post, self._files = _Post(), SharedFiles(settings.shared_url)
            self._work = "workers.away:run"
            self._arguments = {
                "url": settings.shared_url,
                "data_folder": str(settings.data_folder),
                "checkpoint_seconds": settings.checkpoint_seconds,
                "post_office": self._post.office,
            }
        self._on_cpu = ray.remote(num_cpus=1, max_retries=0)(on_node.run_step)
        self._on_gpu = ray.remote(num_cpus=1, num_gpus=1, max_calls=1, max_retries=0)(on_node.run_step)
        self._running: dict[Any, Step] = {}
        self._refused: list[tuple[str, Outcome]] = []

    def start(self, step: Step) -> None:
        if (refusal := self._refusal(step)) is not None:
            self._refused.append((step.key, refusal))
            return
        task = self._on_gpu if step.gpus else self._on_cpu
        reference = task.options(num_cpus=step.cpus, num_gpus=step.gpus, name=f"{step.stage} {step.key}", label_selector=self._nodes.selector()).remote(
            asdict(step), work=self._work, expected=self._nodes.expected, arguments=self._arguments
        )
        self._running[reference] = step

    def _refusal(self, step: Step) -> Outcome | None:
        """A local cluster never grows, so what does not fit it would wait for ever. One by address may."""
        for field, wanted, there in (("cpus", step.cpus, "CPU"), ("gpus", step.gpus, "GPU")):
            if self._capacity and wanted > self._capacity.get(there, 0.0):
                message = f"resources.{field}: expected at most the {self._capacity.get(there, 0.0):g} of this machine's cluster, got {wanted:g}"
                return Outcome(succeeded=False, reason="unavailable", message=message, retryable=False)
        return None

    def wait(self, *, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        self._nodes.look()
        refused, self._refused = self._refused, []
        if refused:
            return refused
        if not self._running:
            time.sleep(timeout_seconds)
            return []
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout_seconds)
        more, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        ended = list(dict.fromkeys([*ready, *more]))
        if self._post is not None:  # before the outcomes: what a step has said belongs to it
            self._post.exchange(self._running.values(), at_once=bool(ended))
        return [self._settle(reference) for reference in ended]

    def _settle(self, reference: Any) -> tuple[str, Outcome]:
        step = self._running.pop(reference)
        try:
            answer = ray.get(reference, timeout=10)
        except (RayError, GetTimeoutError) as error:
            # The step may have ended its work before its worker died.
            return step.key, self._find_outcome(step) or _died(error)
        if answer["check"] is not None:
            self._nodes.note(answer["node"], answer["check"])
        return step.key, Outcome.from_dict(answer["outcome"])

    def _find_outcome(self, step: Step) -> Outcome | None:
        """What a step left before its worker died."""
        if self._files is None:
            return read_outcome(Path(step.folder))
        try:
            found = self._files.read_json(f"{Path(step.folder).relative_to(self._data_folder).as_posix()}/{RESULT}")
        except FilesUnavailable as error:
            logger.warning("outcome not found: %s", error, extra={"action": "outcome_unreadable", "attempt_id": step.key})
            return None
        return None if found is None else Outcome.from_dict(found)

    def kill(self, key: str) -> None:
        for reference, step in self._running.items():
            if step.key == key:
                ray.cancel(reference, force=True)

    def close(self) -> None:
        for reference in self._running:
            ray.cancel(reference, force=True)
        self._running.clear()
        ray.shutdown()
        if self._session is not None:
            self._session.remove()


class _Post:
    """The controller's side of the steps' mailboxes where it shares no folder with them."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.office = ray.remote(num_cpus=0, max_restarts=-1)(PostOffice).options(scheduling_strategy=here).remote()
        self._deliverers: dict[str, Deliverer] = {}
        self._exchanged = 0.0

    def exchange(self, running: Iterable[Step], *, at_once: bool) -> None:
        """Deliver what came, and tell which flags are up; every EXCHANGE_SECONDS, or now."""
        now = time.monotonic()
        if not at_once and now - self._exchanged < EXCHANGE_SECONDS:
            return
        self._exchanged = now
        folders = {step.key: Path(step.folder) for step in running}
        try:
            parcels = ray.get(self.office.exchange.remote({key: flags for key, folder in folders.items() if (flags := raised_flags(folder))}), timeout=10)
        except (RayActorError, GetTimeoutError) as error:
            logger.warning("post office does not answer: %s", error, extra={"action": "post_failed"})
            return
        self._deliverers = {key: self._deliverers.get(key) or Deliverer(folder=folder) for key, folder in folders.items()}
        for key, sent in parcels.items():
            # A folder that is gone belongs to a search that ended: it is not made again.
            if key in folders and folders[key].is_dir():
                for parcel in sent:
                    self._deliverers[key].deliver(parcel)


class _Session:
    """The local cluster's folder for sockets and logs, for nobody else to read, held by a lock for as long as this process lives.

    In the system's temporary folder and not among the data, because the path of a socket must be short. Ray removes
    nothing itself; a killed process leaves its folder, and the next one to start removes it.
    """

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        if len(os.fsencode(parent)) > MAX_PARENT:
            parent = Path("/tmp")
        for other in parent.glob(f"{SESSION_PREFIX}*/{LOCK}"):
            _remove_abandoned(other)
        self.folder = Path(tempfile.mkdtemp(prefix=SESSION_PREFIX, dir=parent))
        # Locked before it gets its name: nobody finds it without its lock.
        self._lock = (self.folder / f".{LOCK}").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.folder / f".{LOCK}").rename(self.folder / LOCK)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def _remove_abandoned(lock: Path) -> None:
    try:
        with lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    except OSError:
        logger.debug("Ray session of another process: %s", lock.parent)


def _died(error: Exception) -> Outcome:
    if isinstance(error, OutOfMemoryError):
        return Outcome(succeeded=False, reason="out_of_memory", message=str(error)[:1000])
    if isinstance(error, RayTaskError):
        return Outcome(succeeded=False, reason="error", message=str(error)[:2000])
    with_its_node = isinstance(error, NodeDiedError)
    return Outcome(succeeded=False, reason="preempted" if with_its_node else "worker_died", message=f"{type(error).__name__}: {error}"[:1000])


def _common(environment: Mapping[str, str]) -> dict[str, Any]:
    return {"log_to_driver": False, "configure_logging": False, "runtime_env": {"env_vars": dict(environment)}}


def _connect(address: str, *, insecure: bool, environment: Mapping[str, str]) -> None:
    """Join a cluster by address, if it asks for a token: whoever reaches one that does not runs code there."""
    if os.environ.get("RAY_AUTH_MODE") != "token" and not insecure:
        raise InvalidSpec(Problem(field="RAY_AUTH_MODE", expected="token (or NAS_RAY_INSECURE=1)", got=repr(os.environ.get("RAY_AUTH_MODE"))))
    try:
        ray.init(address=address, **_common(environment))
    except Exception as refused:  # a ConnectionError, whose cause says why; others where there is no token at all
        if not _is_about_the_token(refused):
            raise
        raise InvalidSpec(Problem(field="RAY_AUTH_TOKEN", expected="the token of the cluster", got="none, or one that it refuses")) from refused
    if not insecure and _answers_everybody(ray.get_runtime_context().gcs_address):
        ray.shutdown()
        expected = "a cluster that asks for a token (start its nodes with RAY_AUTH_MODE=token), or NAS_RAY_INSECURE=1"
        raise InvalidSpec(Problem(field="NAS_RAY_ADDRESS", expected=expected, got="one that answers without"))


def _is_about_the_token(error: BaseException | None) -> bool:
    while error is not None:
        # Ray gives the reason of a failed connection as text.
        if isinstance(error, AuthenticationError) or AuthenticationError.__name__ in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _answers_everybody(gcs_address: str) -> bool:
    """Whether the cluster's head answers somebody who has no token; asked by another process, since Ray knows one mode for each."""
    ask = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
    asked = subprocess.run([sys.executable, "-c", ask, gcs_address], env=environment, capture_output=True, text=True, timeout=60, check=False)
    if asked.returncode == 0:
        return True
    if "InvalidAuthToken" in asked.stderr:
        return False
    raise ConnectionError(f"{gcs_address}: expected the head to answer or to refuse, got {asked.stderr[-500:]}")


def _mark_files(settings: Settings) -> dict[str, Any]:
    """Leave a token in the shared files, by which a node knows that it sees the same; every controller of a deployment finds the first one's."""
    url = settings.shared_url or f"file://{settings.data_folder}"
    shared, key = SharedFiles(url), on_node.TOKEN
    if shared.read_json(key) is None:
        shared.write_json({"token": secrets.token_hex(16)}, key=key)
    return {"url": url, "token": (shared.read_json(key) or {})["token"], "copies": settings.shared_url is not None}
