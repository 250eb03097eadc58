"""Files that no search needs: folders of searches that were deleted, and prepared folders that nothing will read again. Finds and deletes them.

Nothing that is needed is ever deleted, whatever starts meanwhile. A search's row is written before its folder and deleted before it, and ids never come
again, so a folder without a row is nobody's. A prepared folder is filled, and found filled, under the lease of its key: whoever holds that lease while
no search needs the folder may delete it, and a search that is submitted meanwhile waits, and fills it again. A file that is being downloaded stays
readable until its reader closes it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nas.errors import InvalidSpec
from nas.files import folder_bytes
from nas.search.layout import prepared_key, prepared_lease
from nas.settings import Settings
from nas.shared_files import SharedFiles
from nas.spec import parse_spec
from nas.store.records import SearchRecord, new_id
from nas.store.store import Store

LEASE_SECONDS = 60.0
"""For so long a controller waits for the lease of a prepared folder whose remover was killed."""
_PAGE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Unused:
    """A folder that no search needs."""

    kind: Literal["search", "prepared"]
    path: Path
    num_bytes: int


def find_unused(store: Store, *, settings: Settings) -> list[Unused]:
    """What could be deleted now, folders of deleted searches first. Deletes nothing."""
    # Listed first: a folder that is made after this is not on the list, and one that was has its row, or never will.
    searches, prepared = _folders(settings.searches_folder), _folders(settings.prepared_folder)
    known = store.search_ids()
    orphans = [Unused(kind="search", path=path, num_bytes=folder_bytes(path)) for path in searches if path.name not in known]
    needed = needed_prepared(store, settings=settings) if prepared else set()
    unneeded = [Unused(kind="prepared", path=path, num_bytes=folder_bytes(path)) for path in prepared if path.name not in needed]
    return orphans + unneeded


def needed_prepared(store: Store, *, settings: Settings) -> set[str]:
    """Keys of the prepared folders that a search reads: one that has not ended, and one whose students can still be bundled."""
    return {
        key
        for search in _all_searches(store)
        if (not search.state.is_terminal or (settings.searches_folder / search.id / "trials").is_dir()) and (key := _key(search)) is not None
    }


def remove(unused: Unused, *, store: Store, settings: Settings) -> bool:
    """Delete a folder, if it is still unused; whether it was."""
    if unused.kind == "search":
        if unused.path.name in store.search_ids():
            return False
        shutil.rmtree(unused.path, ignore_errors=True)
        return True
    lease = store.claim(prepared_lease(unused.path.name), owner=new_id("gc"), seconds=LEASE_SECONDS)
    if lease is None:
        return False
    try:
        if unused.path.name in needed_prepared(store, settings=settings):
            return False
        # Out of the way in one step: a deletion that is killed half-way must not leave a folder that looks filled.
        doomed = unused.path.with_name(f".{unused.path.name}.unused")
        shutil.rmtree(doomed, ignore_errors=True)
        unused.path.rename(doomed)
    finally:
        store.release(lease)
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def remove_orphans(store: Store, *, settings: Settings) -> list[Path]:
    """Delete the folders of searches that were deleted, those that the nodes share by URL too; what a controller does now and then.

    Raises:
        FilesUnavailable: the URL cannot be reached; what is on this machine is gone.
    """
    there, known = _folders(settings.searches_folder), store.search_ids()
    orphans = [path for path in there if path.name not in known]
    for path in orphans:
        shutil.rmtree(path, ignore_errors=True)
    if settings.shared_url is not None:
        shared, parent = SharedFiles(settings.shared_url), settings.searches_folder.name
        published = set(shared.children(parent))  # listed before the searches are asked for, as above
        for name in published - store.search_ids():
            shared.delete(f"{parent}/{name}")
    return orphans


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink()) if parent.is_dir() else []


def _all_searches(store: Store) -> Iterator[SearchRecord]:
    after: str | None = None
    while page := store.list_searches(after=after, limit=_PAGE):
        yield from page
        after = page[-1].id


def _key(search: SearchRecord) -> str | None:
    try:
        return prepared_key(parse_spec(json.dumps(search.spec)), inputs=search.inputs)
    except (InvalidSpec, KeyError):
        if search.state.is_terminal:  # of an older version: nothing here can bundle it any more
            return None
        raise
