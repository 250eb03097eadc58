from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.housekeeping import find_unused, remove, remove_orphans
from nas.search.layout import prepared_key, prepared_lease
from nas.settings import Settings
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

    assert {(one.kind, one.path, one.num_bytes) for one in unused} == {
        ("search", settings.searches_folder / deleted.id, 1000),
        ("prepared", of_ended, 1000),
        ("prepared", of_deleted, 1000),
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
