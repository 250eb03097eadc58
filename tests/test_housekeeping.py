from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.housekeeping import find_unused, remove, remove_orphans
from nas.search.layout import prepared_key, prepared_lease
from nas.settings import Settings
from nas.shared_files import SharedFiles
from nas.spec import dump_spec, parse_spec
from nas.store.records import SearchRecord, SearchState
from nas.store.store import Store
from tests.simulation.simulator import INPUTS, make_spec


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_environment({"NAS_DATA": str(tmp_path)})


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    store = Store.open(settings.database_url, migrate=True)
    yield store
    store.close()


def submit(store: Store, settings: Settings, **changes: Any) -> tuple[SearchRecord, Path]:
    """A search with a folder, and its prepared folder."""
    spec = parse_spec(json.dumps(make_spec(num_trials=4, num_workers=1, **changes)))
    search = store.create_search(spec=dump_spec(spec), inputs=INPUTS, plan={}, label="")
    prepared = settings.prepared_folder / prepared_key(spec, inputs=INPUTS)
    for folder in (settings.searches_folder / search.id / "trials" / "0", prepared):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "file").write_bytes(b"x" * 1000)
    return search, prepared


def end(store: Store, search: SearchRecord) -> None:
    store.change_search(search.id, to=SearchState.SUCCEEDED, expected=list(SearchState), fence=None)


def test_only_what_no_search_needs_is_unused(store: Store, settings: Settings) -> None:
    _, running = submit(store, settings, seed=1)
    kept, of_kept = submit(store, settings, seed=2)
    end(store, kept)
    ended, of_ended = submit(store, settings, seed=3)
    end(store, ended)
    (settings.searches_folder / ended.id / "trials" / "0" / "file").unlink()
    (settings.searches_folder / ended.id / "trials" / "0").rmdir()
    (settings.searches_folder / ended.id / "trials").rmdir()
    deleted, of_deleted = submit(store, settings, seed=4)
    end(store, deleted)
    store.delete_search(deleted.id)

    unused = find_unused(store, settings=settings)

    assert {(one.kind, one.place, one.num_bytes) for one in unused} == {
        ("search", str(settings.searches_folder / deleted.id), 1000),
        ("prepared", str(of_ended), 1000),
        ("prepared", str(of_deleted), 1000),
    }
    assert all(remove(one, store=store, settings=settings) for one in unused)
    assert find_unused(store, settings=settings) == []
    assert running.exists()
    assert of_kept.exists()


def test_a_prepared_folder_that_is_needed_by_now_is_kept(store: Store, settings: Settings) -> None:
    search, prepared = submit(store, settings)
    end(store, search)
    store.delete_search(search.id)
    (unused,) = [one for one in find_unused(store, settings=settings) if one.kind == "prepared"]
    submit(store, settings)

    assert not remove(unused, store=store, settings=settings)
    assert prepared.exists()


def test_a_prepared_folder_is_not_deleted_while_a_search_fills_or_reads_it(store: Store, settings: Settings) -> None:
    search, prepared = submit(store, settings)
    end(store, search)
    store.delete_search(search.id)
    (unused,) = [one for one in find_unused(store, settings=settings) if one.kind == "prepared"]
    lease = store.claim(prepared_lease(prepared.name), owner="a controller", seconds=60.0)
    assert lease is not None

    assert not remove(unused, store=store, settings=settings)
    store.release(lease)
    assert remove(unused, store=store, settings=settings)
    assert not prepared.exists()
    assert store.claim(prepared_lease(prepared.name), owner="a controller", seconds=60.0) is not None, "whoever deletes gives the lease back"


def test_a_file_that_is_being_downloaded_is_read_to_its_end(store: Store, settings: Settings) -> None:
    search, _ = submit(store, settings)
    end(store, search)
    with (settings.searches_folder / search.id / "trials" / "0" / "file").open("rb") as download:
        store.delete_search(search.id)
        assert [path.name for path in remove_orphans(store, settings=settings)] == [search.id]

        assert len(download.read()) == 1000
    assert remove_orphans(store, settings=settings) == []


@pytest.fixture(params=["file", "s3"])
def by_url(request: pytest.FixtureRequest, settings: Settings, tmp_path: Path) -> Settings:
    """The same, with the files of all searches where machines share them by URL."""
    url = f"file://{tmp_path / 'shared'}" if request.param == "file" else request.getfixturevalue("s3_url")
    return dataclasses.replace(settings, shared_url=url)


def publish(settings: Settings, *keys: str) -> SharedFiles:
    assert settings.shared_url is not None
    shared, file = SharedFiles(settings.shared_url), settings.data_folder / "content"
    file.write_bytes(b"x" * 1000)
    for key in keys:
        shared.publish_tree({"file": file}, key=key)
    return shared


def key_of(search: SearchRecord) -> str:
    return f"prepared/{prepared_key(parse_spec(json.dumps(search.spec)), inputs=INPUTS)}"


def test_by_url_too_only_what_no_search_needs_is_unused(store: Store, by_url: Settings) -> None:
    running, kept, ended, deleted = searches = [
        submit(store, dataclasses.replace(by_url, data_folder=by_url.data_folder / "x"), seed=seed)[0] for seed in range(4)
    ]
    shape = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    for number in (0, 1):
        store.add_trial(kept.id, number=number, origin="sampler", shape={**shape, "intermediate_size": 32 + number}, choices=None, parameters=1, fence=None)
    store.save_confirmation(None, search_id=kept.id, trial=1, confirmation={"verified": True}, fence=None)
    for search in searches[1:]:
        end(store, search)
    store.delete_search(deleted.id)
    shared = publish(by_url, *(key_of(search) for search in searches))
    for search in (running, kept, deleted):
        publish(by_url, *(f"searches/{search.id}/{part}" for part in ("trials/0/att_1", "trials/1/att_2", "attempts/att_1")))
    publish(by_url, f"searches/{ended.id}/winner")

    unused = find_unused(store, settings=by_url)

    assert all(one.place == f"{by_url.shared_url}/{one.key}" and one.num_bytes > 1000 for one in unused)
    assert {(one.kind, one.key) for one in unused} == {
        ("search", f"searches/{deleted.id}"),
        ("prepared", key_of(ended)),
        ("prepared", key_of(deleted)),
        ("leftover", f"searches/{kept.id}/trials/0"),
        ("leftover", f"searches/{kept.id}/attempts"),
    }
    assert all(remove(one, store=store, settings=by_url) for one in unused)
    assert find_unused(store, settings=by_url) == []
    assert shared.children(f"searches/{running.id}") == ["attempts", "trials"]
    assert shared.find_tree(f"searches/{kept.id}/trials/1/att_2") is not None
    assert shared.find_tree(key_of(kept)) is not None


def test_a_prepared_tree_that_is_needed_by_now_is_kept(store: Store, by_url: Settings) -> None:
    elsewhere = dataclasses.replace(by_url, data_folder=by_url.data_folder / "x")
    search, _ = submit(store, elsewhere)
    end(store, search)
    store.delete_search(search.id)
    shared = publish(by_url, key_of(search))
    (unused,) = find_unused(store, settings=by_url)
    submit(store, elsewhere)

    assert not remove(unused, store=store, settings=by_url)
    assert shared.find_tree(key_of(search)) is not None
