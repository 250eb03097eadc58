"""Checkpoints of a step on a node that shares no folder with others: published while it trains, so that another node goes on from them.

Each attempt publishes under a key of its own, which nobody else writes to, and the next one takes the furthest that it finds whole: all attempts
of a step are one computation, so it does not matter whose checkpoint it is. Publishing runs beside the training, in a thread, of second names
of the files: the training saves as ever, and waits for nothing but the end of an upload that is under way when it ends. A prepare step's folder is
uploaded as it is filled, in the same way; nothing of that was in vain, since the whole is these files.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path

from nas.compress.train_state import STATES, link_states, num_steps, steps_of
from nas.errors import CorruptFile, Fenced, FilesUnavailable, NotFound
from nas.files import empty_folder, link_or_copy
from nas.node_cache import NodeCache
from nas.shared_files import PARTIAL, Manifest, SharedFiles, regular_files
from nas.trial_files import UNFINISHED

logger = logging.getLogger(__name__)

MIN_SHARE = 20
"""Seconds for each second that the last upload took, until the next one: uploads take at most a twentieth of the time, however large the student is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where a step keeps its training's state, in its folder on a node."""

    folder: Path
    """The step's own."""
    states: str
    """The folder of the states in it (`nas/compress/train_state.py`)."""
    beside: str
    """A file in it that belongs to them, where it is there."""

    def num_steps(self) -> int:
        """How far it is; 0 where there is none."""
        return num_steps(self.folder / self.states)

    def link(self, outbox: Path) -> dict[str, Path]:
        """The files as they are now, under second names in an empty folder on the same disk, by their paths within the step's."""
        link_states(self.folder / self.states, into=outbox)
        files = {f"{self.states}/{path.name}": path for path in outbox.iterdir()}
        if (self.folder / self.beside).exists():
            files[self.beside] = Path(link_or_copy(str(self.folder / self.beside), str(outbox / "beside")))
        return files

    def take(self, source: Path) -> None:
        """Replace it by what was fetched into another folder on the same disk; a kill leaves none, and it is fetched again."""
        if (source / self.beside).exists():
            (self.folder / self.beside).parent.mkdir(parents=True, exist_ok=True)
            (source / self.beside).replace(self.folder / self.beside)
        target = self.folder / self.states
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (source / self.states).rename(target)


@contextmanager
def beside(publish: Callable[[], None], *, seconds: float) -> Iterator[None]:
    """While the context lasts, publish now and then; its end waits for an upload that is under way.

    Args:
        seconds: between two uploads, at least.
    """
    ended = threading.Event()
    # In a copy of this context, in which a superseded attempt publishes nothing (`nas.files.publishing_unless`).
    thread = threading.Thread(target=copy_context().run, args=(_go_on, publish, ended, seconds), daemon=True, name="checkpoints")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _go_on(publish: Callable[[], None], ended: threading.Event, seconds: float) -> None:
    pause = seconds
    while not ended.wait(pause):
        began = time.monotonic()
        publish()
        pause = max(seconds, MIN_SHARE * (time.monotonic() - began))


@contextmanager
def _telling(key: str) -> Iterator[None]:
    """What goes wrong with an upload is said, and tried again next time: the work goes on."""
    try:
        yield
    except Fenced as fenced:
        logger.info("%s", fenced, extra={"action": "fenced", "key": key})
    except (FilesUnavailable, NotFound, OSError) as error:
        logger.warning("checkpoint not published: %s", error, extra={"action": "checkpoint_unpublished", "key": key})


@dataclass(slots=True, kw_only=True)
class Publisher:
    """Publishes what one attempt has trained so far."""

    checkpoint: Checkpoint
    parent: str
    """The key under which the attempts of the step have theirs."""
    attempt: str
    shared: SharedFiles
    cache: NodeCache
    _published: int = 0
    """Steps that were there when it was published last, or fetched."""

    def fetch(self) -> None:
        """Bring the furthest that was published into the step's folder, unless what lies there is as far.

        Raises:
            FilesUnavailable: the URL cannot be reached. DoesNotFit: the node's cache is too small.
        """
        self._published = self.checkpoint.num_steps()
        found = sorted(self._find(), key=lambda tree: tree[0], reverse=True)
        for steps, key, manifest in found:
            if steps <= self._published:
                return
            self.cache.make_room(manifest.bytes)
            try:
                with self.cache.scratch() as scratch:
                    self.shared.fetch_tree(key, folder=scratch, manifest=manifest)
                    self.checkpoint.take(scratch)
            except (NotFound, CorruptFile) as gone:  # replaced meanwhile by an attempt that does not know yet that it was given up
                logger.warning("checkpoint not fetched: %s", gone, extra={"action": "checkpoint_gone", "key": key})
                continue
            self._published = steps
            logger.info("going on from step %d", steps, extra={"action": "checkpoint_fetched", "key": key, "bytes": manifest.bytes})
            return

    def publish(self) -> None:
        """Publish the checkpoint as it is now, if it is further than the last one."""
        steps = self.checkpoint.num_steps()
        if steps <= self._published:
            return
        key, began = f"{self.parent}/{self.attempt}{UNFINISHED}", time.monotonic()
        with _telling(key):
            with self.cache.scratch() as outbox:
                manifest = self.shared.replace_tree(self.checkpoint.link(outbox), key=key)
            self._published = steps
            extra = {"action": "checkpoint_published", "key": key, "bytes": manifest.bytes, "seconds": round(time.monotonic() - began, 3)}
            logger.info("checkpoint of step %d published", steps, extra=extra)
            self._remove_those_before(key)

    def _remove_those_before(self, key: str) -> None:
        """Trees of earlier attempts that nobody needs any more."""
        for steps, other, _ in self._find():
            if other != key and steps <= self._published:
                self.shared.delete(other)

    def _find(self) -> Iterator[tuple[int, str, Manifest]]:
        """What attempts of the step have published: steps, key and manifest."""
        for name in self.shared.children(self.parent):
            key = f"{self.parent}/{name}"
            if name.endswith(UNFINISHED) and (manifest := self.shared.find_tree(key)) is not None:
                yield self._steps_of(key, manifest), key, manifest

    def _steps_of(self, key: str, manifest: Manifest) -> int:
        facts = [manifest.files[path] for name in STATES if (path := f"{self.checkpoint.states}/{name}.json") in manifest.files]
        return max((steps_of(found) for file in facts if (found := self.shared.read_json(f"{key}/{file.sha256}")) is not None), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialTree:
    """A folder that is filled part by part, each found whole or made again: what there is of it is uploaded under the key of the whole."""

    folder: Path
    key: str
    last: str
    """The file that vouches for the whole; no part."""
    shared: SharedFiles
    cache: NodeCache

    def fetch(self) -> None:
        """Bring what was published into the folder, where that is more than is there.

        Raises:
            FilesUnavailable: the URL cannot be reached. DoesNotFit: the node's cache is too small.
        """
        manifest = self.shared.find_tree(self.key, name=PARTIAL)
        if manifest is None or manifest.bytes <= sum(path.stat().st_size for path in self._parts().values()):
            return
        self.cache.make_room(manifest.bytes)
        with self.cache.scratch() as scratch:
            try:
                self.shared.fetch_tree(self.key, folder=scratch, manifest=manifest)
            except (NotFound, CorruptFile) as torn:  # uploaded while it was written
                logger.warning("parts not fetched: %s", torn, extra={"action": "parts_gone", "key": self.key})
                return
            # Nothing of what was here stays: parts build on each other, and those of two machines need not agree in every bit.
            empty_folder(self.folder)
            for part in scratch.iterdir():
                part.rename(self.folder / part.name)
        logger.info("going on with what was prepared", extra={"action": "parts_fetched", "key": self.key, "bytes": manifest.bytes})

    def publish(self) -> None:
        """Upload what there is by now."""
        with _telling(self.key):
            parts = self._parts()
            if parts:
                self.shared.publish_tree(parts, key=self.key, name=PARTIAL)

    def _parts(self) -> dict[str, Path]:
        return {path: file for path, file in regular_files(self.folder).items() if path != self.last}
