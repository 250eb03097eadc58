"""One suite for both kinds of shared files: a folder, and S3 (moto's server)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nas.errors import CorruptFile, FilesUnavailable, NotFound
from nas.shared_files import MANIFEST, SharedFiles

CONTENT = {"config.json": b"{}", "blocks/train.bin": b"\0\1" * 5000, "blocks/same.bin": b"\0\1" * 5000}


@pytest.fixture(params=["file", "s3"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> SharedFiles:
    return SharedFiles(f"file://{tmp_path / 'shared'}" if request.param == "file" else request.getfixturevalue("s3_url"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENT.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(content)
    return tmp_path / "source"


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def objects(shared: SharedFiles, key: str) -> list[str]:
    return sorted(shared.sizes(key))


def test_a_tree_comes_back_as_it_was(shared: SharedFiles, folder: Path, tmp_path: Path) -> None:
    manifest = shared.publish_tree(folder, key="prepared/k")

    assert shared.fetch_tree("prepared/k", folder=tmp_path / "target") == manifest == shared.find_tree("prepared/k")
    assert read(tmp_path / "target") == CONTENT
    assert manifest.bytes == 20002


def test_links_and_unfinished_files_are_no_part_of_a_tree(shared: SharedFiles, folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to("/etc/passwd")
    (folder / ".config.json.123").write_bytes(b"half")

    assert sorted(shared.publish_tree(folder, key="k").files) == sorted(CONTENT)


def test_a_tree_is_there_with_its_manifest_and_an_upload_goes_on(shared: SharedFiles, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = SharedFiles._write, []

    def die_at_manifest(self: SharedFiles, key: str, *arguments: Any) -> None:
        if key.endswith(MANIFEST):
            raise OSError("killed")
        write(self, key, *arguments)

    def note(self: SharedFiles, key: str, *arguments: Any) -> None:
        written.append(key)
        write(self, key, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SharedFiles, "_write", die_at_manifest)
        with pytest.raises(FilesUnavailable, match="killed"):
            shared.publish_tree(folder, key="k")
    assert shared.find_tree("k") is None
    monkeypatch.setattr(SharedFiles, "_write", note)

    shared.publish_tree(folder, key="k")

    assert written == [f"k/{MANIFEST}"], "what was there was uploaded again"
    assert len(objects(shared, "k")) == 3, "equal files are one object"


def test_a_copied_tree_outlives_its_source(shared: SharedFiles, folder: Path, tmp_path: Path) -> None:
    shared.publish_tree(folder, key="a/1")

    assert shared.copy_tree("a/1", to="b/2")
    assert not shared.copy_tree("a/none", to="b/3")
    shared.delete("a")
    shared.delete("a")

    assert shared.find_tree("a/1") is None
    assert objects(shared, "a") == []
    shared.fetch_tree("b/2", folder=tmp_path / "target")
    assert read(tmp_path / "target") == CONTENT


def test_a_damaged_object_is_refused(shared: SharedFiles, folder: Path, tmp_path: Path) -> None:
    manifest = shared.publish_tree(folder, key="k")
    name = manifest.files["config.json"].sha256
    with shared._fs.open(shared._path(f"k/{name}"), "wb") as file:
        file.write(b"[]")

    with pytest.raises(CorruptFile, match=r"config.json: expected sha256 44136fa.*, got 4f53cda"):
        shared.fetch_tree("k", folder=tmp_path / "target")
    assert not list((tmp_path / "target").glob("*config*"))


def test_a_fetch_keeps_what_is_there_and_right(shared: SharedFiles, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared.publish_tree(folder, key="k")
    shared.fetch_tree("k", folder=tmp_path / "target")
    (tmp_path / "target" / "config.json").write_bytes(b"[]")
    fetched: list[str] = []
    get_file = shared._fs.get_file
    monkeypatch.setattr(shared._fs, "get_file", lambda source, target: (fetched.append(target), get_file(source, target)))

    shared.fetch_tree("k", folder=tmp_path / "target")

    assert [os.path.basename(target) for target in fetched] == [".config.json.partial"]
    assert read(tmp_path / "target") == CONTENT


def test_a_manifest_cannot_write_outside_its_tree(shared: SharedFiles, tmp_path: Path) -> None:
    for path in ("../escaped", "/tmp/escaped", "a/../../escaped"):
        shared.write_json({"files": {path: {"sha256": "0" * 64, "bytes": 1}}}, key=f"k/{MANIFEST}")

        with pytest.raises(CorruptFile, match="expected paths inside the tree"):
            shared.fetch_tree("k", folder=tmp_path / "target")


def test_single_files_are_published_and_read(shared: SharedFiles, folder: Path) -> None:
    shared.publish_file(folder / "config.json", key="searches/s/winner/bundle.tar")

    assert shared.size("searches/s/winner/bundle.tar") == 2
    with shared.open("searches/s/winner/bundle.tar") as file:
        assert file.read() == b"{}"
    assert shared.size("searches/s/winner/none") is None
    assert shared.read_json("none.json") is None
    with pytest.raises(NotFound, match="no such file"), shared.open("none"):
        pass


def test_what_cannot_be_reached_says_so(monkeypatch: pytest.MonkeyPatch, s3_server: str, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    (tmp_path / "file").touch()

    with pytest.raises(FilesUnavailable, match=r"^s3://nas-test-unreachable/x: expected an answer, got"):
        SharedFiles("s3://nas-test-unreachable").read_json("x")
    with pytest.raises(FilesUnavailable, match="expected an answer, got"):
        SharedFiles(f"file://{tmp_path / 'file'}").write_json({}, key="x/y")
