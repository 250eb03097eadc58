"""What an operator registers: names that a spec can say, digests, and nothing registered twice under one name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.errors import Conflict, CorpusUnavailable, InvalidSpec, TaskUnavailable, TeacherUnavailable
from nas.registration import register_corpus, register_tasks, register_teacher
from nas.settings import Settings
from nas.spec import parse_spec
from nas.store.store import Store
from nas.submission import check_submission


@pytest.fixture
def place(tmp_path: Path) -> Iterator[dict[str, Any]]:
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path / "data")})
    settings.data_folder.mkdir()
    store = Store.open(settings.database_url, migrate=True)
    yield {"store": store, "settings": settings}
    store.close()


def test_what_is_registered_can_be_searched(place: dict[str, Any], register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]) -> None:
    register_tiny(**place)
    submission = check_submission(parse_spec(json.dumps(tiny_spec())), store=place["store"])
    assert submission.inputs["teacher"]["name"] == "tiny"


def test_registering_again_is_the_same_record(place: dict[str, Any], tiny_sources: dict[str, Path]) -> None:
    first, second = (register_teacher(str(tiny_sources["teacher"]), name="t", **place) for _ in range(2))
    assert first == second
    assert [teacher.name for teacher in place["store"].list_teachers()] == ["t"]


def test_a_name_stands_for_one_content(place: dict[str, Any], tiny_sources: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("some text\n")
    register_corpus([str(tiny_sources["corpus"])], name="words", **place)
    with pytest.raises(Conflict, match="choose another name"):
        register_corpus([str(other)], name="words", **place)


@pytest.mark.parametrize(
    ("file", "expected"), [("stories.jsonl", "stories"), ("my stories (1).jsonl", "my-stories--1-"), ("_.v2.jsonl", "v2"), ("...jsonl", "unnamed")]
)
def test_without_a_name_the_file_s_own_is_used_in_characters_that_a_spec_may_say(place: dict[str, Any], tmp_path: Path, file: str, expected: str) -> None:
    (tmp_path / file).write_text('{"text": "one story"}\n')
    record = register_corpus([str(tmp_path / file)], name=None, **place)
    assert record.name == expected
    parse_spec(json.dumps({"teacher": record.name, "corpus": {"parts": [{"name": "a"}]}, "tasks": [{"name": "b"}], "budget": {"max_fraction": 0.5}}))


def test_the_present_folder_has_a_name_too(place: dict[str, Any], tiny_sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_sources["teacher"])
    record = register_teacher(".", name=None, **place)
    assert (record.name, record.path) == ("teacher", str(tiny_sources["teacher"]))


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "x" * 97])
def test_a_name_that_no_spec_could_say_is_refused(place: dict[str, Any], tiny_sources: dict[str, Path], name: str) -> None:
    with pytest.raises(InvalidSpec, match="name: expected at most 96 letters, digits"):
        register_teacher(str(tiny_sources["teacher"]), name=name, **place)
    assert place["store"].list_teachers() == []


def test_what_cannot_be_used_is_not_registered(place: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TeacherUnavailable):
        register_teacher(str(tmp_path), name="t", **place)
    with pytest.raises(CorpusUnavailable):
        register_corpus([str(tmp_path)], name="c", **place)
    with pytest.raises(TaskUnavailable):
        register_tasks(str(tmp_path / "data"), dataset_path=None, **place)


def test_tasks_are_copied_so_that_later_runs_do_not_need_the_source(place: dict[str, Any], tiny_sources: dict[str, Path]) -> None:
    (record,) = register_tasks(str(tiny_sources["tasks"]), dataset_path=None, **place)
    assert Path(record.folder).is_relative_to(place["settings"].data_folder)
    assert record.card["metrics"] == [{"name": "acc", "higher_is_better": True, "paired": True}]
