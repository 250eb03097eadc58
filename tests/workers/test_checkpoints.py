"""What a step has trained so far, published by URL: a folder, and S3 (moto's server)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nas.compress.train_state import TrainState, load_state, load_trunk, save_state
from nas.errors import FilesUnavailable, NotFound
from nas.files import publishing_unless
from nas.node_cache import NodeCache
from nas.shared_files import MANIFEST, PARTIAL, SharedFiles
from nas.trial_files import UNFINISHED
from workers.checkpoints import Checkpoint, PartialTree, Publisher, _go_on, beside

PARENT = "searches/srch_1/trials/0"


@pytest.fixture(params=["file", "s3"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> SharedFiles:
    return SharedFiles(f"file://{tmp_path / 'shared'}" if request.param == "file" else request.getfixturevalue("s3_url"))


@pytest.fixture
def attempt(shared: SharedFiles, tmp_path: Path) -> Callable[[str, str], Publisher]:
    """An attempt on a node."""

    def make(name: str, node: str) -> Publisher:
        cache = NodeCache(folder=tmp_path / node, max_bytes=None)
        (cache.folder / "work").mkdir(parents=True, exist_ok=True)
        checkpoint = Checkpoint(folder=cache.folder / "work", states="rung1", beside="reconstruction.json")
        return Publisher(checkpoint=checkpoint, parent=PARENT, attempt=name, shared=shared, cache=cache)

    return make


def train(publisher: Publisher, *, step: int, name: str = "trunk") -> None:
    """As the training saves."""
    (publisher.checkpoint.folder / "reconstruction.json").write_text("{}")
    state = TrainState(step=step, tensors={"weight/w": torch.full((4,), float(step))}, recipe={}, recent_losses=(), untrained_loss=None)
    save_state(state, checkpoint=publisher.checkpoint.folder / "rung1", name=name, tokens=step)


def objects(shared: SharedFiles, attempt: str) -> int:
    return len(shared.children(f"{PARENT}/{attempt}{UNFINISHED}"))


def test_another_node_goes_on_from_the_furthest_that_is_whole(attempt: Callable[[str, str], Publisher], shared: SharedFiles) -> None:
    for name, step in (("att_1", 3), ("att_2", 9), ("att_3", 7)):
        publisher = attempt(name, name)
        train(publisher, step=step)
        shared.publish_tree(publisher.checkpoint.link(_outbox(publisher)), key=f"{PARENT}/{name}{UNFINISHED}")
    shared.delete(f"{PARENT}/att_2{UNFINISHED}/{MANIFEST}")  # of an upload that was killed
    after = attempt("att_4", "b")

    after.fetch()

    assert after.checkpoint.num_steps() == 7
    assert load_trunk(after.checkpoint.folder / "rung1").tensors["weight/w"].tolist() == [7.0] * 4
    assert (after.checkpoint.folder / "reconstruction.json").read_text() == "{}"


def test_a_tree_that_goes_while_it_is_read_is_passed_over(
    attempt: Callable[[str, str], Publisher], shared: SharedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, step in (("att_1", 3), ("att_2", 9)):
        publisher = attempt(name, name)
        train(publisher, step=step)
        shared.publish_tree(publisher.checkpoint.link(_outbox(publisher)), key=f"{PARENT}/{name}{UNFINISHED}")
    find = Publisher._find

    def find_and_lose(self: Publisher) -> list[object]:
        found = list(find(self))
        shared.delete(f"{PARENT}/att_2{UNFINISHED}")
        return list(found)

    monkeypatch.setattr(Publisher, "_find", find_and_lose)
    after = attempt("att_3", "b")

    after.fetch()

    assert after.checkpoint.num_steps() == 3


def test_what_a_node_has_itself_is_kept_where_it_is_as_far(attempt: Callable[[str, str], Publisher]) -> None:
    first, second = attempt("att_1", "a"), attempt("att_2", "b")
    train(first, step=5)
    first.publish()
    train(second, step=5, name="branch")
    train(second, step=4)

    second.fetch()

    assert load_state(second.checkpoint.folder / "rung1", name="branch").step == 5


def test_one_that_is_further_replaces_those_before(attempt: Callable[[str, str], Publisher], shared: SharedFiles) -> None:
    first, second = attempt("att_1", "a"), attempt("att_2", "b")
    for step in (1, 2):
        train(first, step=step)
        first.publish()
    assert objects(shared, "att_1") == 4, "the manifest, the state's two files and what is beside them"
    second.fetch()
    train(second, step=3)
    second.publish()

    assert shared.children(PARENT) == [f"att_2{UNFINISHED}"]
    assert attempt("att_3", "c").checkpoint.num_steps() == 0
    train(first, step=9)
    first.publish()
    train(second, step=4)
    second.publish()
    assert len(shared.children(PARENT)) == 2, "one that is less far removed one that is further"


def test_a_superseded_attempt_publishes_nothing_and_removes_nothing(attempt: Callable[[str, str], Publisher], shared: SharedFiles) -> None:
    first, second = attempt("att_1", "a"), attempt("att_2", "b")
    train(second, step=1)
    second.publish()
    with publishing_unless(lambda: True), beside(first.publish, seconds=0.01):
        with publishing_unless(lambda: False):  # the training itself, before it was superseded
            train(first, step=9)
        time.sleep(0.1)

    assert shared.find_tree(f"{PARENT}/att_1{UNFINISHED}") is None
    assert shared.find_tree(f"{PARENT}/att_2{UNFINISHED}") is not None


def test_an_upload_is_of_one_moment_whatever_the_training_saves_meanwhile(attempt: Callable[[str, str], Publisher]) -> None:
    publisher = attempt("att_1", "a")
    train(publisher, step=1)
    outbox = _outbox(publisher)
    publisher.checkpoint.link(outbox)

    train(publisher, step=2)

    assert load_trunk(outbox).step == 1
    assert not (outbox / "branch.json").exists()


def test_it_is_published_beside_the_training_and_trouble_there_is_no_failure(
    attempt: Callable[[str, str], Publisher], shared: SharedFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publisher, replace = attempt("att_1", "a"), SharedFiles.replace_tree
    troubles = [FilesUnavailable("away"), OSError("no room")]

    def replace_with_trouble(self: SharedFiles, *arguments: object, **named: object) -> object:
        if troubles:
            raise troubles.pop()
        return replace(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(SharedFiles, "replace_tree", replace_with_trouble)
    key, deadline = f"{PARENT}/att_1{UNFINISHED}", time.monotonic() + 30
    with beside(publisher.publish, seconds=0.01):
        train(publisher, step=1)
        while shared.find_tree(key) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    assert [record.getMessage() for record in caplog.records if "not published" in record.getMessage()] == [
        "checkpoint not published: no room",
        "checkpoint not published: away",
    ]


def test_uploads_take_a_bounded_share_of_the_time() -> None:
    pauses = list[float]()

    class Ended(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            pauses.append(timeout)
            return len(pauses) == 3

    durations = iter((0.0, 0.05))

    _go_on(lambda: time.sleep(next(durations)), Ended(), 0.2)

    assert pauses[:2] == [0.2, 0.2]
    assert pauses[2] >= 20 * 0.05


def test_nothing_is_taken_of_what_is_not_there(attempt: Callable[[str, str], Publisher], shared: SharedFiles) -> None:
    publisher = attempt("att_1", "a")
    publisher.fetch()
    publisher.publish()

    assert publisher.checkpoint.num_steps() == 0
    assert shared.children(PARENT) == []
    with pytest.raises(NotFound):
        load_trunk(publisher.checkpoint.folder / "rung1")


def _outbox(publisher: Publisher) -> Path:
    outbox = publisher.cache.folder / "outbox"
    outbox.mkdir()
    return outbox


@pytest.fixture
def filled(shared: SharedFiles, tmp_path: Path) -> Callable[[str], PartialTree]:
    """A prepare step's folder on a node."""

    def make(node: str) -> PartialTree:
        cache = NodeCache(folder=tmp_path / node, max_bytes=None)
        (cache.folder / "work").mkdir(parents=True, exist_ok=True)
        return PartialTree(folder=cache.folder / "work", key="prepared/k", last="prepared.json", shared=shared, cache=cache)

    return make


def fill(parts: PartialTree, *paths: str) -> None:
    for path in paths:
        (parts.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (parts.folder / path).write_text(f"{path} of {parts.cache.folder.name}")


def test_parts_that_are_made_are_gone_on_with_elsewhere_all_of_one_machine_and_never_taken_for_the_whole(
    filled: Callable[[str], PartialTree], shared: SharedFiles
) -> None:
    first, second = filled("a"), filled("b")
    fill(
        first,
        "sorted/model",
        "sorted/sorting.json",
        "signals/0.json",
        "signals/0",
        "signals/1.json",
        "signals/.1.writing",
        "teacher/.training/trunk",
        "prepared.json",
    )
    first.publish()
    assert shared.find_tree("prepared/k") is None
    fill(second, "signals/0.json", "signals/0", "prepared.json")

    second.fetch()

    found = {path.relative_to(second.folder).as_posix(): path.read_text()[-1] for path in second.folder.rglob("*") if path.is_file()}
    assert found == {"sorted/model": "a", "sorted/sorting.json": "a", "signals/0.json": "a", "signals/0": "a", "signals/1.json": "a"}
    shared.publish_tree(second.folder, key="prepared/k")
    assert shared.find_tree("prepared/k") is not None


def test_parts_are_taken_only_where_they_are_more_and_whole(filled: Callable[[str], PartialTree], shared: SharedFiles) -> None:
    first, second = filled("a"), filled("b")
    second.fetch()
    fill(first, "sorted/model")
    first.publish()
    fill(second, "sorted/model", "signals/0")
    second.fetch()
    assert (second.folder / "sorted" / "model").read_text() == "sorted/model of b"
    third = filled("c")
    for name in shared.children("prepared/k"):
        if name != PARTIAL:
            shared.delete(f"prepared/k/{name}")

    third.fetch()

    assert list(third.folder.iterdir()) == []


def test_a_part_that_goes_while_it_is_uploaded_is_uploaded_later(filled: Callable[[str], PartialTree], shared: SharedFiles) -> None:
    parts = filled("a")
    fill(parts, "signals/0")
    gone = {"signals/1": parts.folder / "signals" / "1", **parts._parts()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialTree, "_parts", lambda self: gone)
        parts.publish()

    assert shared.find_tree("prepared/k", name=PARTIAL) is None
    parts.publish()
    assert shared.find_tree("prepared/k", name=PARTIAL) is not None
