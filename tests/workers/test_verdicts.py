"""A worker that returns what cannot be is not believed, whatever it returns."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nas.architecture import read_architecture
from nas.errors import FilesUnavailable
from nas.search.layout import STUDENT
from nas.settings import Settings
from nas.shape import Shape
from nas.shared_files import Manifest, SharedFiles
from nas.spec import parse_spec
from nas.store.records import AttemptRecord, AttemptState
from tests.simulation.cluster import count, measure, save_pretended_student
from tests.simulation.simulator import CONFIG, INPUTS, make_spec
from workers.folders import MODEL_TAR, SearchFolder
from workers.outcome import RESULT, Outcome, read_outcome
from workers.recount import Recount
from workers.step import _as_json
from workers.verdicts import Undecided, Untrue, check_bundle, check_confirmation, check_distilled, check_prepared, check_rung, count_file_parameters

SPEC = parse_spec(json.dumps(make_spec(num_trials=4, num_workers=1)))
ARCHITECTURE = read_architecture(CONFIG)
SHAPE = Shape(num_hidden_layers=10, hidden_size=1024, intermediate_size=2048, num_attention_heads=16, num_key_value_heads=4, head_dim=64)
LAST = SPEC.rungs.num_trained


def a_result(*, rung: int = LAST) -> dict[str, Any]:
    tasks = [task.name for task in SPEC.tasks] if SPEC.scores_tasks(rung) else []
    result = measure(SHAPE, rung=rung, tokens=SPEC.rungs.tokens(rung), tasks=tasks).as_dict()
    return {**result, "parameters": count(SHAPE, inputs=INPUTS)}


def check(result: dict[str, Any], folder: Path, *, rung: int = LAST) -> None:
    check_rung(result, spec=SPEC, architecture=ARCHITECTURE, shape=SHAPE, rung=rung, count=lambda: count_file_parameters(folder / STUDENT))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretended_student(tmp_path, parameters=count(SHAPE, inputs=INPUTS))
    return tmp_path


@pytest.mark.parametrize("rung", range(LAST + 1))
def test_what_a_worker_measured_is_believed(folder: Path, rung: int) -> None:
    check(a_result(rung=rung), folder, rung=rung)


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(result: dict[str, Any]) -> None:
        for name in path[:-1]:
            result = result[name]
        result[path[-1]] = to

    return change


LIES = {
    "another rung": (_set("rung", to=LAST - 1), "rung: expected 3, got 2"),
    "fewer tokens": (_set("tokens", to=SPEC.rungs.tokens(LAST) - 1), "tokens: expected"),
    "more tokens": (_set("tokens", to=SPEC.rungs.tokens(LAST) * 2), "tokens: expected"),
    "another size": (_set("parameters", to=1), "parameters: expected"),
    "a score that is not a number": (_set("tasks", "one", "value", to=math.nan), "one: expected finite numbers"),
    "an infinite document": (_set("kl", "documents", to=[math.inf]), "kl: expected finite numbers"),
    "a divergence below zero": (_set("kl", "value", to=-0.5), "kl: expected at least 0"),
    "a negative error": (_set("loss", "standard_error", to=-1.0), "loss: expected a standard error"),
    "a negative cost": (_set("costs", to={"parameters": -1.0}), "cost parameters: expected"),
    "a text for a number": (_set("kl", "value", to="0.1"), "kl: expected finite numbers"),
    "a task that nobody asked for": (_set("tasks", "three", to=a_result()["tasks"]["one"]), "tasks: expected"),
    "nothing": (dict.clear, "result: expected one with all its parts"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_cannot_be_is_not(folder: Path, lie: str) -> None:
    change, message = LIES[lie]
    result = copy.deepcopy(a_result())
    change(result)

    with pytest.raises(Untrue, match=message):
        check(result, folder)


def test_a_score_above_one_is_no_accuracy(folder: Path) -> None:
    spec = parse_spec(json.dumps(make_spec(num_trials=4, num_workers=1, tasks=[{"name": "one", "metric": "acc"}, {"name": "two"}])))
    result = a_result()
    result["tasks"]["one"]["value"] = 1.5

    with pytest.raises(Untrue, match=r"acc of one: expected 0 to 1, got 1\.5"):
        check_rung(result, spec=spec, architecture=ARCHITECTURE, shape=SHAPE, rung=LAST, count=lambda: count(SHAPE, inputs=INPUTS))


def test_a_student_whose_file_is_not_its_shape_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(Untrue, match="student: expected its weights"):
        check(a_result(), tmp_path)
    save_pretended_student(tmp_path, parameters=count(SHAPE, inputs=INPUTS) - 1)
    with pytest.raises(Untrue, match="parameters of the student's file: expected"):
        check(a_result(), tmp_path)
    (tmp_path / STUDENT / "model.safetensors").write_bytes(b"\xff" * 8)
    with pytest.raises(Untrue, match="expected a safetensors header"):
        check(a_result(), tmp_path)
    for header in (b'{"a": 1}', b'{"a": {}}', b'{"a": {"shape": ["x"]}}', b'{"a": {"shape": 3}}'):
        (tmp_path / STUDENT / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(Untrue, match="student: expected the shape of every tensor"):
            check(a_result(), tmp_path)


def test_other_steps_are_not_believed_blindly_either(tmp_path: Path) -> None:
    with pytest.raises(Untrue, match="prepared: expected teacher"):
        check_prepared({})
    with pytest.raises(Untrue, match="confirmation: expected one with all its parts"):
        check_confirmation({"verified": True, "held_out": {"kl": None}})
    with pytest.raises(Untrue, match="verified: expected true or false"):
        check_confirmation({"verified": "yes"})
    sound = {"trial": 3, "bundle": str(tmp_path / "bundle.tar"), "bundle_sha256": "0" * 64}
    check_bundle(sound, trial=3, folder=tmp_path)
    for lie in ({"trial": 4}, {"bundle": "/etc/passwd"}, {"bundle": str(tmp_path / ".." / "x")}, {"bundle_sha256": "none"}):
        with pytest.raises(Untrue):
            check_bundle({**sound, **lie}, trial=3, folder=tmp_path)


def a_distilled(folder: Path) -> dict[str, Any]:
    held_out = {"kl": 0.5, "kl_standard_error": 0.01, "loss": 1.5, "loss_standard_error": 0.02}
    file = {"file": str(folder / MODEL_TAR), "sha256": "a" * 64, "bytes": 10}
    return {"tokens": 128, "seconds": 1.0, "held_out_before": held_out, "held_out_after": held_out, **file}


@pytest.mark.parametrize(
    "lie",
    [
        {"tokens": 127},
        {"tokens": 10**30},
        {"seconds": None},
        {"seconds": -1.0},
        {"seconds": 10**400},
        {"bytes": None},
        {"bytes": -1},
        {"bytes": 2**63},
        {"held_out_after": {"kl": 0.5}},
        {"held_out_after": {"kl": 10**400, "kl_standard_error": 0.0, "loss": 1.0, "loss_standard_error": 0.0}},
        {"file": "/etc/passwd"},
        {"sha256": "none"},
    ],
)
def test_what_no_full_distillation_comes_to_is_found_out(tmp_path: Path, lie: dict[str, Any]) -> None:
    recipe, sound = {"tokens": 128, "batch_size": 1, "sequence_length": 64}, a_distilled(tmp_path)
    check_distilled(sound, recipe=recipe, folders=SearchFolder(path=tmp_path))

    with pytest.raises(Untrue):
        check_distilled({**sound, **lie}, recipe=recipe, folders=SearchFolder(path=tmp_path))


def test_a_result_that_is_no_json_is_an_invalid_one(tmp_path: Path) -> None:
    assert json.loads(_as_json(Outcome(succeeded=True, result={"score": math.nan})))["reason"] == "invalid_result"
    for text in ("", "{", "[]", '{"succeeded": true, "unknown": 1}'):
        (tmp_path / RESULT).write_text(text)
        outcome = read_outcome(tmp_path)
        assert outcome is not None
        assert (outcome.succeeded, outcome.reason) == (False, "invalid_result"), text


@pytest.fixture(params=["file", "s3"])
def recounted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[SharedFiles, Recount]:
    """The students of a search whose trial 3 an attempt has published, by URL."""
    url = f"file://{tmp_path / 'shared'}" if request.param == "file" else request.getfixturevalue("s3_url")
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path / "data"), "NAS_SHARED": url})
    folder = SearchFolder.of("srch_1", settings=settings)
    assert folder.shared is not None
    return folder.shared, Recount(folder)


ATTEMPT = AttemptRecord(
    id="att_1", search_id="srch_1", stage="rung", trial=3, rung=LAST, state=AttemptState.RUNNING, reason=None, started_at=datetime.now(UTC), finished_at=None
)
TREE = "searches/srch_1/trials/3/att_1"


def recount(counted: Recount) -> int:
    """As the controller does, tick by tick."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return counted.count(ATTEMPT)
        except Undecided:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_student_behind_a_url_is_counted_by_its_header_alone(recounted: tuple[SharedFiles, Recount], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, counted = recounted
    shared.publish_tree(folder, key=TREE)
    read, ranges = SharedFiles.read_range, list[int]()

    def note(self: SharedFiles, key: str, *, start: int, length: int) -> bytes:
        ranges.append(length)
        return read(self, key, start=start, length=length)

    monkeypatch.setattr(SharedFiles, "read_range", note)

    assert recount(counted) == count(SHAPE, inputs=INPUTS) == count_file_parameters(folder / STUDENT)
    assert len(ranges) == 2
    assert sum(ranges) < 1000


def test_a_student_behind_a_url_that_is_not_there_or_not_what_it_says_is_found_out(recounted: tuple[SharedFiles, Recount], folder: Path) -> None:
    shared, counted = recounted
    with pytest.raises(Untrue, match=r"student: expected its weights in .*att_1, got none"):
        recount(counted)
    manifest = shared.publish_tree(folder, key=TREE)
    (weights,) = [file for path, file in manifest.files.items() if path.endswith(".safetensors")]
    shared.delete(f"{TREE}/{weights.sha256}")
    with pytest.raises(Untrue, match=r"student: expected its weights, got .* no such file"):
        recount(counted)
    for content in (b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{"):
        (folder / STUDENT / "model.safetensors").write_bytes(content)
        shared.publish_tree(folder, key=TREE)
        with pytest.raises(Untrue, match="expected a safetensors header"):
            recount(counted)


def test_a_url_that_is_away_leaves_the_student_to_be_counted_later(
    recounted: tuple[SharedFiles, Recount], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, counted = recounted
    shared.publish_tree(folder, key=TREE)
    answers, find = iter((True, True)), SharedFiles.find_tree

    def find_later(self: SharedFiles, key: str) -> Manifest | None:
        if next(answers, False):
            raise FilesUnavailable("away")
        return find(self, key)

    monkeypatch.setattr(SharedFiles, "find_tree", find_later)

    assert recount(counted) == count(SHAPE, inputs=INPUTS)
