"""Files that no search needs: folders of searches that were deleted, and prepared folders that nothing will read again. Finds and deletes them.

Nothing that is needed is ever deleted, whatever starts meanwhile. A search's row is written before its folder and deleted before it, and ids never come
again, so a folder without a row is nobody's. A prepared folder is filled, and found filled, under the lease of its key: whoever holds that lease while
no search needs the folder may delete it, and a search that is submitted meanwhile waits, and fills it again. A file that is being downloaded stays
readable until its reader closes it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
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
_SEARCHES, _PREPARED, _TRIALS = "searches", "prepared", "trials"
_PASSING = ("attempts", "model")
"""What a search, or a full distillation, has there until it is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unused:
    """Files that no search needs."""

    kind: Literal["search", "prepared", "leftover"]
    """Of a search that was deleted; prepared for searches that are over; or left by one that is over, which by URL is deleted a little after its end,
    and not where its controller dies before that."""
    place: str
    """Path, or URL."""
    key: str
    """Below the data folder, or the URL."""
    num_bytes: int
    shared: SharedFiles | None = None
    """Where machines share files by URL: those. None: a folder in the data folder."""


def find_unused(store: Store, *, settings: Settings) -> list[Unused]:
    """What could be deleted now: in the data folder, then where machines share files by URL. Deletes nothing.

    Raises:
        FilesUnavailable: the URL cannot be reached.
    """
    # Listed first: a folder that is made after this is not on the list, and one that was has its row, or never will.
    names = {parent: [path.name for path in _folders(settings.data_folder / parent)] for parent in (_SEARCHES, _PREPARED)}
    found = [
        Unused(kind=kind, place=str(folder), key=key, num_bytes=folder_bytes(folder))
        for kind, key in _unneeded(names, store=store, has_trials=_has_trials(settings, shared=None))
        if (folder := settings.data_folder / key)
    ]
    if settings.shared_url is None:
        return found
    shared = SharedFiles(settings.shared_url)
    names = {parent: shared.children(parent) for parent in (_SEARCHES, _PREPARED)}
    keys = [*_unneeded(names, store=store, has_trials=_has_trials(settings, shared=shared)), *_leftovers(names[_SEARCHES], store=store, shared=shared)]
    return found + [Unused(kind=kind, place=f"{shared.url}/{key}", key=key, num_bytes=sum(shared.sizes(key).values()), shared=shared) for kind, key in keys]


def _unneeded(names: Mapping[str, Collection[str]], *, store: Store, has_trials: Callable[[str], bool]) -> Iterator[tuple[Literal["search", "prepared"], str]]:
    """Folders of deleted searches, then prepared ones that nothing reads."""
    known = store.search_ids()
    yield from (("search", f"{_SEARCHES}/{name}") for name in names[_SEARCHES] if name not in known)
    needed = needed_prepared(store, among=names[_PREPARED], has_trials=has_trials)
    yield from (("prepared", f"{_PREPARED}/{name}") for name in names[_PREPARED] if name not in needed)


def _leftovers(names: Sequence[str], *, store: Store, shared: SharedFiles) -> Iterator[tuple[Literal["leftover"], str]]:
    """Of what is over: what steps said last, what they had trained, and students that were not verified. Its deletion was begun when it ended."""
    states = {name: state for first in range(0, len(names), _PAGE) for name, (_, state) in store.search_versions(names[first : first + _PAGE]).items()}
    for name in names:
        if name in states and states[name].is_terminal:
            top, there = f"{_SEARCHES}/{name}", shared.children(f"{_SEARCHES}/{name}")
            yield from (("leftover", f"{top}/{part}") for part in _PASSING if part in there)
            verified = {str(number) for number, found in store.list_confirmations(name).items() if found.get("verified")}
            for number in shared.children(f"{top}/{_TRIALS}") if _TRIALS in there else ():
                if number not in verified:
                    yield "leftover", f"{top}/{_TRIALS}/{number}"


def needed_prepared(store: Store, *, among: Collection[str], has_trials: Callable[[str], bool]) -> set[str]:
    """Keys of the prepared folders that a search reads: one that has not ended, and one whose students can still be bundled.

    Args:
        has_trials: whether there are students of a search.
    """
    return {
        key
        for search in (_all_searches(store) if among else ())
        if (key := _key(search)) is not None and key in among and (not search.state.is_terminal or has_trials(search.id))
    }


def remove(unused: Unused, *, store: Store, settings: Settings) -> bool:
    """Delete what is unused, if it still is; whether it was."""
    name = PurePosixPath(unused.key).name
    match unused.kind:
        case "search":
            if name in store.search_ids():
                return False
            _delete(unused, settings=settings)
            return True
        case "leftover":
            _delete(unused, settings=settings)
            return True
        case "prepared":
            lease = store.claim(prepared_lease(name), owner=new_id("gc"), seconds=LEASE_SECONDS)
            if lease is None:
                return False
            try:
                if name in needed_prepared(store, among=[name], has_trials=_has_trials(settings, shared=unused.shared)):
                    return False
                _delete(unused, settings=settings)
            finally:
                store.release(lease)
            return True


def _delete(unused: Unused, *, settings: Settings) -> None:
    """What is killed half-way leaves nothing that looks filled: a folder is out of the way in one step, of a tree the manifest goes first."""
    if unused.shared is not None:
        unused.shared.delete(unused.key)
        return
    folder = settings.data_folder / unused.key
    doomed = folder.with_name(f".{folder.name}.unused")
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(FileNotFoundError):  # somebody else was faster
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _has_trials(settings: Settings, *, shared: SharedFiles | None) -> Callable[[str], bool]:
    def has_trials(search_id: str) -> bool:
        if shared is not None:
            return bool(shared.children(f"{_SEARCHES}/{search_id}/{_TRIALS}"))
        return (settings.searches_folder / search_id / _TRIALS).is_dir()

    return has_trials


def remove_orphans(store: Store, *, settings: Settings) -> list[Path]:
    """Delete the folders of searches that were deleted; what a controller does now and then. By URL: `workers.folders.sweep_by_url`."""
    there, known = _folders(settings.searches_folder), store.search_ids()
    orphans = [path for path in there if path.name not in known]
    for path in orphans:
        shutil.rmtree(path, ignore_errors=True)
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
