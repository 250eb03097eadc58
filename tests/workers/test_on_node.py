"""What a node is asked before it runs anything, asked of this process."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nas.shared_files import SharedFiles
from workers import on_node


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """As the controller on this machine would say it."""
    monkeypatch.setenv("NAS_CACHE", str(tmp_path / "cache"))
    shared = SharedFiles(f"file://{tmp_path / 'shared'}")
    shared.write_json({"token": "t0ken"}, key=on_node.TOKEN)
    return {"versions": on_node.versions(), "files": {"url": shared.url, "token": "t0ken", "copies": True}}


def problems(expected: dict[str, Any]) -> str:
    return "; ".join(on_node.check_node(expected)["problems"])


def test_a_node_like_the_controllers_machine_is_fit(expected: dict[str, Any], tmp_path: Path) -> None:
    check = on_node.check_node(expected)

    assert (check["problems"], check["warnings"]) == ([], [])
    assert check["facts"]["cache_free_bytes"] > 0
    assert [path.name for path in (tmp_path / "shared" / "nodes").iterdir()] == ["token.json"], "what it tried to write stays"


def test_another_version_of_a_package_or_of_python_is_named(expected: dict[str, Any]) -> None:
    expected["versions"] |= {"transformers": "1.0", "python": "3.9.1"}

    assert "transformers: expected 1.0 as on the controller's machine, got 5." in problems(expected)
    assert "python: expected 3.9.1 as on the controller's machine, got 3." in problems(expected)


def test_builds_of_one_version_are_one_version(expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    builds = {"torch": version("torch").partition("+")[0] + "+cu130"}
    monkeypatch.setattr(importlib.metadata, "version", lambda package: builds.get(package) or version(package))

    assert problems(expected) == ""


def test_what_the_controllers_machine_lacks_only_has_to_be_there(expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected["versions"]["torch"] = None
    assert problems(expected) == ""

    monkeypatch.setattr(on_node, "PACKAGES", (*on_node.PACKAGES, "no-such-package"))

    assert problems(expected) == "no-such-package: expected to be installed, got nothing"


def test_one_changed_line_of_ours_is_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = on_node.source_digest()
    for package in on_node.SOURCES:
        shutil.copytree(Path(__file__).parents[2] / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(on_node.importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path / name)]))
    assert on_node.source_digest() == digest

    with (tmp_path / "nas" / "shape.py").open("a") as file:
        file.write("# changed\n")

    assert on_node.source_digest() != digest


def test_other_shared_files_of_the_same_name_are_noticed(expected: dict[str, Any]) -> None:
    expected["files"]["token"] = "another"

    assert problems(expected) == (
        f"shared files {expected['files']['url']}: expected the controller's token another, got t0ken: another place under the same name"
    )


def test_a_cache_that_cannot_be_written_is_named(expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NAS_CACHE", str(tmp_path / "cache" / "file" / "x"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "file").touch()
    assert problems(expected).startswith("shared files and copies: NotADirectoryError")
