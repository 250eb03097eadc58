from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nas.errors import CorruptFile, DoesNotFit, NotFound
from nas.node_cache import NodeCache, _locked
from nas.shared_files import SharedFiles


@pytest.fixture
def shared(tmp_path: Path) -> SharedFiles:
    shared = SharedFiles(f"file://{tmp_path / 'shared'}")
    for key in "abcd":
        source = tmp_path / "source" / key
        source.mkdir(parents=True)
        (source / "file").write_bytes(key.encode() * 1000)
        shared.publish_tree(source, key=key)
    return shared


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(folder=tmp_path / "cache", max_bytes=3000)


def fill(cache: NodeCache, shared: SharedFiles, *keys: str) -> None:
    for key in keys:
        with cache.reading(key, source=shared) as folder:
            assert (folder / "file").read_bytes() == key.encode() * 1000
        time.sleep(0.01)  # the order of last uses is the files' times


def held(cache: NodeCache) -> str:
    """The keys whose trees are there."""
    return "".join(sorted(path.read_text()[0] for path in cache.folder.glob("*/file")))


def test_a_tree_is_fetched_once_however_many_ask(cache: NodeCache, shared: SharedFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    fetch = SharedFiles.fetch_tree
    monkeypatch.setattr(SharedFiles, "fetch_tree", lambda self, key, **named: (fetched.append(key), time.sleep(0.05), fetch(self, key, **named)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: fill(cache, shared, "a"), range(8)))

    assert fetched == ["a"]


def test_the_least_recently_used_is_removed_first(cache: NodeCache, shared: SharedFiles) -> None:
    fill(cache, shared, "a", "b", "c", "a", "d")

    assert held(cache) == "acd"


def test_what_is_in_use_is_never_removed(cache: NodeCache, shared: SharedFiles) -> None:
    with cache.reading("a", source=shared) as folder:
        fill(cache, shared, "b", "c", "d")

        assert (folder / "file").exists()
    assert held(cache) == "acd"


def test_a_tree_larger_than_the_cache_is_refused_with_its_numbers(tmp_path: Path, shared: SharedFiles) -> None:
    cache = NodeCache(folder=tmp_path / "cache", max_bytes=999)

    with pytest.raises(DoesNotFit, match="expected room for 1000 bytes, got 999"):
        fill(cache, shared, "a")


def test_what_is_not_published_is_not_found_and_what_is_damaged_is_not_kept(cache: NodeCache, shared: SharedFiles, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="expected a published tree, got none"), cache.reading("none", source=shared):
        pass
    object_ = next(path for path in (tmp_path / "shared" / "a").iterdir() if path.name != "manifest.json")
    object_.write_bytes(b"x" * 1000)
    with pytest.raises(CorruptFile), cache.reading("a", source=shared):
        pass
    object_.write_bytes(b"a" * 1000)
    fill(cache, shared, "a")


def fill_and_hang(cache: NodeCache, shared: SharedFiles, marker: Path) -> None:
    download = SharedFiles._download

    def hang(self: SharedFiles, *arguments: Any, **named: Any) -> None:
        download(self, *arguments, **named)
        marker.touch()
        time.sleep(60)

    SharedFiles._download = hang  # type: ignore[method-assign]
    with cache.reading("a", source=shared):
        pass


def test_a_process_that_is_killed_while_it_fills_leaves_no_half_tree(cache: NodeCache, shared: SharedFiles, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=fill_and_hang, args=(cache, shared, tmp_path / "marker"))
    process.start()
    while not (tmp_path / "marker").exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert held(cache) == "a"  # under its partial name
    assert len(list(cache.folder.glob("*.partial"))) == 1

    fill(cache, shared, "a")

    assert list(cache.folder.glob("*.partial")) == []


def test_work_is_found_again_and_two_never_share_it(cache: NodeCache) -> None:
    with cache.writing("trials/1") as first:
        (first / "checkpoint").write_bytes(b"1")
        with cache.writing("trials/1") as second:
            assert second != first
            assert list(second.iterdir()) == []
    assert not second.exists()

    with cache.writing("trials/1") as again:
        assert (again / "checkpoint").read_bytes() == b"1"


def test_work_makes_room_like_any_entry(cache: NodeCache, shared: SharedFiles) -> None:
    with cache.writing("trials/1") as work:
        (work / "checkpoint").write_bytes(b"1" * 2500)
    time.sleep(0.01)

    fill(cache, shared, "a")

    assert not work.exists()


def test_a_lock_whose_file_was_removed_is_taken_anew(cache: NodeCache) -> None:
    cache.folder.mkdir()
    entry, got = cache.folder / "entry", threading.Event()

    def take() -> None:
        with _locked(entry, fcntl.LOCK_EX):
            got.set()

    with _locked(entry, fcntl.LOCK_EX):
        waiting = threading.Thread(target=take)
        waiting.start()
        time.sleep(0.05)
        entry.with_name("entry.lock").unlink()
    waiting.join(timeout=5)

    assert got.is_set()
    assert entry.with_name("entry.lock").exists()
