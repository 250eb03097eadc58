"""Searches whose steps run on machines that share nothing with the controller but a URL: each step in another machine's folders."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from api.files import find_file
from nas.compress import distillation
from nas.compress.train_state import TrainState
from nas.node_cache import NodeCache
from nas.search import confirm, prepare
from nas.search.layout import SIGNALS
from nas.settings import Settings
from nas.shared_files import PARTIAL, SharedFiles
from nas.spec import dump_spec, parse_spec
from nas.store.records import AttemptState, BundleRecord, SearchRecord, SearchState
from nas.store.store import Store
from nas.submission import check_submission
from nas.trial_files import UNFINISHED
from workers import folders
from workers.away import run_here
from workers.controller import Controller
from workers.folders import MODEL
from workers.liveness import supersede
from workers.outcome import Outcome
from workers.step import Step, execute

SMALL = {"sampler": {"name": "tpe", "max_trials": 3, "num_startup_trials": 2}, "controls": {"anchors": False, "num_random": 0}}


class Nodes:
    """An executor of one step at a time, each on the next of two machines."""

    def __init__(self, folder: Path, *, url: str | None, data_folder: Path) -> None:
        self.shared = None if url is None else SharedFiles(url)
        self.caches = [NodeCache(folder=folder / f"node{index}", max_bytes=None) for index in range(2)]
        self.data_folder = data_folder
        self.steps: list[Step] = []
        self.history: list[Step] = []
        self.checkpoint_seconds = 60.0
        self.before: Callable[[Step, Path], None] = lambda step, mailbox: None

    def start(self, step: Step) -> None:
        self.steps.append(step)
        self.history.append(step)

    def wait(self, *, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        return [(step.key, self.run(step)) for step in (self.steps.pop(0),)] if self.steps else []

    def run(self, step: Step) -> Outcome:
        if self.shared is None:
            return execute(step)
        cache = self.caches[len(self.history) % 2]
        with cache.scratch() as mailbox:
            self.before(step, mailbox)
            return run_here(step, mailbox=mailbox, shared=self.shared, cache=cache, data_folder=self.data_folder, checkpoint_seconds=self.checkpoint_seconds)

    def kill(self, key: str) -> None:
        self.steps = [step for step in self.steps if step.key != key]

    def close(self) -> None:
        self.steps.clear()


@pytest.fixture(scope="module", autouse=True)
def verified_here() -> Iterator[None]:
    """A fresh process for each finalist takes three times as long as all the rest of a search."""
    verify = confirm.verify
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confirm, "verify", lambda *arguments, **named: verify(*arguments, **{**named, "with_reload": False}))
        yield


@dataclasses.dataclass
class Deployment:
    settings: Settings
    store: Store
    nodes: Nodes

    def submit(self, spec: dict[str, Any]) -> str:
        parsed = parse_spec(json.dumps(spec))
        submission = check_submission(parsed, store=self.store)
        return self.store.create_search(spec=dump_spec(parsed), inputs=submission.inputs, plan=submission.plan, label="").id

    def run(self, search_id: str) -> SearchRecord:
        """A controller, until the search ends."""
        self.tick_until(lambda: self.store.get_search(search_id).state.is_terminal)
        return self.store.get_search(search_id)

    def tick_until(self, condition: Callable[[], bool]) -> None:
        """A controller of its own."""
        controller = Controller(store=self.store, executor=self.nodes, settings=self.settings)
        while not condition():
            controller.tick(timeout_seconds=0.0)
        folders._remover().submit(lambda: None).result()  # all that was to be deleted is

    def pack(self, search: SearchRecord, number: int) -> BundleRecord:
        """A controller, until the bundle of a trial is packed or given up."""
        self.store.request_bundle(search.id, number)
        controller = Controller(store=self.store, executor=self.nodes, settings=self.settings)
        while self.store.waiting_bundles(limit=1):
            controller.tick(timeout_seconds=0.0)
        bundle = self.store.find_bundle(search.id, number)
        assert bundle is not None
        return bundle


def make_deployment(folder: Path, *, url: str | None, register: Callable[..., None]) -> Deployment:
    settings = Settings.from_environment({"NAS_DATA": str(folder / "data"), "NAS_SHARED": url or "", "NAS_LEASE_SECONDS": "1"})
    settings.data_folder.mkdir(parents=True)
    store = Store.open(settings.database_url, migrate=True)
    register(store=store, settings=settings)
    return Deployment(settings=settings, store=store, nodes=Nodes(folder, url=url, data_folder=settings.data_folder))


def figures(store: Store, search_id: str) -> list[Any]:
    board = store.whole_board(search_id)
    assert board is not None, store.get_search(search_id).error
    names = ("number", "rank", "shape", "rung", "score", "kl", "tasks", "state")
    return [{name: row[name] for name in names} for row in board["rows"]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]) -> list[Any]:
    """The figures of the search on one machine, its files in place."""
    deployment = make_deployment(tmp_path_factory.mktemp("in_place"), url=None, register=register_tiny)
    return figures(deployment.store, deployment.run(deployment.submit(tiny_spec(**SMALL))).id)


def test_a_search_over_s3_is_the_search_in_a_folder(
    s3_url: str, undisturbed: list[Any], register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    deployment = make_deployment(tmp_path, url=s3_url, register=register_tiny)

    search = deployment.run(deployment.submit(tiny_spec(**SMALL)))

    assert search.state is SearchState.SUCCEEDED, search.error
    assert figures(deployment.store, search.id) == undisturbed
    shared = SharedFiles(s3_url)
    assert search.winner is not None
    with shared.open(search.winner["bundle"]) as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == search.winner["bundle_sha256"]
    confirmed = [trial.number for trial in deployment.store.list_trials(search.id) if trial.confirmation and trial.confirmation["verified"]]
    assert [int(name) for name in shared.children(f"searches/{search.id}/trials")] == confirmed
    assert all(len(shared.children(f"searches/{search.id}/trials/{number}")) == 1 for number in confirmed), "a tree that nobody reads"
    assert shared.children(f"searches/{search.id}/attempts") == []
    assert list(deployment.settings.data_folder.rglob("*.safetensors")) == [], "weights on the controller's machine"
    assert (
        find_file(search.winner["bundle"], sha256=search.winner["bundle_sha256"], settings=deployment.settings).stat().st_size == search.winner["bundle_bytes"]
    )
    again = deployment.pack(search, search.winner["trial"])
    assert (again.sha256, again.error) == (search.winner["bundle_sha256"], None)
    assert find_file(str(again.path), sha256=str(again.sha256), settings=deployment.settings).stat().st_size == again.num_bytes
    assert shared.children(Path(str(again.path)).parent.as_posix()) == ["bundle.tar"], "what nobody's teacher is lies there twice"


class Killed(BaseException):
    """The controller's process has ended."""


def test_what_was_written_is_taken_over_what_was_superseded_leaves_no_trace_and_what_is_not_there_is_not_believed(
    undisturbed: list[Any], register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    deployment = make_deployment(tmp_path, url=f"file://{tmp_path / 'shared'}", register=register_tiny)
    nodes, run, shared = deployment.nodes, deployment.nodes.run, SharedFiles(f"file://{tmp_path / 'shared'}")
    superseded: list[Step] = []
    unheard: list[Step] = []
    lying: list[Step] = []

    def run_badly(step: Step) -> Outcome:
        is_trained = step.stage == "rung" and step.request["rung"] > 0
        if is_trained and not superseded:
            superseded.append(step)
            nodes.before = lambda step, mailbox: supersede(mailbox) if step is superseded[0] else None
            return run(step)
        outcome = run(step)
        if step.stage == "rung" and step.request["rung"] == 2:
            if not unheard:
                unheard.append(step)
                raise Killed
            if not lying:
                lying.append(step)
                shared.delete(f"searches/{search_id}/trials/{step.context['trial']}/{step.key}")
        return outcome

    nodes.run = run_badly  # type: ignore[method-assign]
    search_id = deployment.submit(tiny_spec(**SMALL))
    with pytest.raises(Killed):
        deployment.run(search_id)
    nodes.close()
    time.sleep(deployment.settings.lease_seconds + 0.1)

    search = deployment.run(search_id)

    assert search.state is SearchState.SUCCEEDED, search.error
    assert figures(deployment.store, search_id) == undisturbed
    attempts = {attempt.id: attempt for attempt in deployment.store.list_attempts(search_id)}
    assert attempts[superseded[0].key].state is AttemptState.LOST
    assert attempts[unheard[0].key].state is AttemptState.SUCCEEDED, "its result was written, and it ran again"
    assert attempts[lying[0].key].state is AttemptState.FAILED
    assert "invalid_result: student: expected its weights" in (attempts[lying[0].key].reason or "")
    trees = list((tmp_path / "shared" / "searches" / search_id).rglob(superseded[0].key))
    assert trees == []


class LostNode:
    """The node of the first attempt that trains is gone, with all its files, once others can have what it had trained by then.

    Every step is saved; `saved` has those of each attempt.
    """

    def __init__(self, nodes: Nodes, *, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes, self.saved, self.mailbox = nodes, dict[str, list[int]](), Path()
        nodes.checkpoint_seconds = 0.01
        nodes.before, self._run = self._begin, nodes.run
        nodes.run = self._run_and_lose  # type: ignore[method-assign]
        self._save = distillation.save_state
        monkeypatch.setattr(distillation, "save_state", self._save_and_hang)
        monkeypatch.setitem(distillation.distil.__kwdefaults__, "checkpoint_every_seconds", 0.0)

    def _begin(self, step: Step, mailbox: Path) -> None:
        self.mailbox = mailbox

    def _run_and_lose(self, step: Step) -> Outcome:
        outcome = self._run(step)
        if list(self.saved) == [step.key]:
            shutil.rmtree(self.nodes.caches[len(self.nodes.history) % 2].folder)
            return Outcome(succeeded=False, reason="preempted", message="its node went away")
        return outcome

    def _save_and_hang(self, state: TrainState, **named: Any) -> None:
        self._save(state, **named)
        step = self.nodes.history[-1]
        self.saved.setdefault(step.key, []).append(state.step)
        if len(self.saved) == 1 and state.step == 5:
            deadline = time.monotonic() + 30
            assert self.nodes.shared is not None
            folder = Path(step.request.get("trial_folder") or f"{step.request['folder']}/{MODEL}").relative_to(self.nodes.data_folder)
            while self.nodes.shared.find_tree(f"{folder}/{step.key}{UNFINISHED}") is None:
                assert time.monotonic() < deadline, "nothing is published while it trains"
                time.sleep(0.01)
            supersede(self.mailbox)

    def check(self) -> None:
        """The second attempt went on from what the first had published."""
        first, second = list(self.saved.values())[:2]
        assert first[-1] == 5
        assert 2 <= second[0] <= 6, "trained again from the start, or not where it had come to"


def test_a_rung_that_is_lost_with_its_node_goes_on_on_another(
    undisturbed: list[Any], register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = make_deployment(tmp_path, url=f"file://{tmp_path / 'shared'}", register=register_tiny)
    lost = LostNode(deployment.nodes, monkeypatch=monkeypatch)

    search = deployment.run(deployment.submit(tiny_spec(**SMALL)))

    lost.check()
    assert search.state is SearchState.SUCCEEDED, search.error
    assert figures(deployment.store, search.id) == undisturbed
    assert list((tmp_path / "shared" / "searches" / search.id).rglob(f"*{UNFINISHED}")) == []


def test_a_prepare_step_that_is_lost_with_its_node_goes_on_on_another(
    undisturbed: list[Any], register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = make_deployment(tmp_path, url=f"file://{tmp_path / 'shared'}", register=register_tiny)
    nodes, run, sort, measure = deployment.nodes, deployment.nodes.run, prepare._sort, prepare._measure_baselines
    nodes.checkpoint_seconds = 0.01
    sorted_on, mailboxes = list[Path](), list[Path]()

    def note(*arguments: Any, **named: Any) -> Any:
        sorted_on.append(named["folder"])
        return sort(*arguments, **named)

    def measure_or_hang(*arguments: Any, **named: Any) -> Any:
        if len(mailboxes) == 1:
            assert nodes.shared is not None
            deadline, key = time.monotonic() + 30, f"prepared/{nodes.history[0].request['prepared'].rpartition('/')[2]}"
            while (parts := nodes.shared.find_tree(key, name=PARTIAL)) is None or f"{SIGNALS}/choice.json" not in parts.files:
                assert time.monotonic() < deadline, "nothing is published while it prepares"
                time.sleep(0.01)
            supersede(mailboxes[0])
            raise prepare.StoppedEarly
        return measure(*arguments, **named)

    def run_and_lose(step: Step) -> Outcome:
        outcome = run(step)
        if len(nodes.history) == 1:
            shutil.rmtree(nodes.caches[1].folder)
            return Outcome(succeeded=False, reason="preempted", message="its node went away")
        return outcome

    nodes.before = lambda step, mailbox: mailboxes.append(mailbox)
    nodes.run = run_and_lose  # type: ignore[method-assign]
    monkeypatch.setattr(prepare, "_sort", note)
    monkeypatch.setattr(prepare, "_measure_baselines", measure_or_hang)

    search = deployment.run(deployment.submit(tiny_spec(**SMALL)))

    assert search.state is SearchState.SUCCEEDED, search.error
    assert len(sorted_on) == 1, "sorted again"
    assert figures(deployment.store, search.id) == undisturbed


@pytest.mark.parametrize("what", ["all of it", "one file"])
def test_a_prepared_folder_of_which_a_part_is_gone_is_made_again(
    what: str, undisturbed: list[Any], register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    deployment = make_deployment(tmp_path, url=f"file://{tmp_path / 'shared'}", register=register_tiny)
    nodes, shared = deployment.nodes, SharedFiles(f"file://{tmp_path / 'shared'}")

    def lose(step: Step, mailbox: Path) -> None:
        if step.stage == "rung" and not any(earlier.stage == "rung" for earlier in nodes.history[:-1]):
            key = Path(step.request["prepared"]).relative_to(nodes.data_folder).as_posix()
            shared.delete(key if what == "all of it" else f"{key}/{next(name for name in shared.children(key) if not name.endswith('.json'))}")
            for cache in nodes.caches:
                for entry in cache.folder.iterdir():
                    if (entry / "prepared.json").exists():
                        shutil.rmtree(entry)

    nodes.before = lose

    search = deployment.run(deployment.submit(tiny_spec(**SMALL)))

    assert search.state is SearchState.SUCCEEDED, search.error
    assert [step.stage for step in nodes.history].count("prepare") == 2
    assert figures(deployment.store, search.id) == undisturbed


def test_a_thing_that_was_registered_before_there_was_a_url_is_asked_for(
    register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    deployment = make_deployment(tmp_path, url=f"file://{tmp_path / 'shared'}", register=register_tiny)
    SharedFiles(f"file://{tmp_path / 'shared'}").delete("registry/corpora")

    search = deployment.run(deployment.submit(tiny_spec(**SMALL)))

    assert search.state is SearchState.FAILED
    assert search.error is not None
    assert search.error["reason"] == "unavailable"
    assert "words: expected at file://" in search.error["message"]
    assert "register it again (`nas corpora add`) with NAS_SHARED set" in search.error["message"]


def test_a_winner_is_a_teacher_where_files_are_shared_by_url(
    tmp_path: Path, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]
) -> None:
    deployment = make_deployment(tmp_path, url=f"file://{tmp_path}/shared", register=register_tiny)
    first = deployment.submit(tiny_spec(**SMALL))
    insist = [{"name": "choice", "insist": True}]  # a tiny winner knows next to nothing
    second = deployment.submit(tiny_spec(**SMALL | {"teacher": first, "tasks": insist, "budget": {"max_fraction": 0.9}}))

    search = deployment.run(second)

    assert search.state is SearchState.SUCCEEDED, search.error
    won = deployment.store.get_search(first).winner
    assert won is not None
    assert search.inputs["teacher"]["digest"] == won["as_teacher"]["digest"]
