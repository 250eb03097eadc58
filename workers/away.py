"""A step on a machine that shares no folder with the controller: its files are fetched by URL before it, and published after it.

The step itself (`step.py`) sees plain folders of this machine. What a rung has left is published under the attempt that made
it, and the next step is told which attempt's to take: one that was superseded may publish, and nobody reads it. What a step has
trained before it ended is published too (`checkpoints.py`), and the next attempt takes the furthest. The outcome is published
last, so that another controller finds it, and with it all that it speaks of.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from nas.bundle import TAR, read_tar
from nas.errors import CorpusUnavailable, CorruptFile, NasError, NotFound, NotPrepared, TaskUnavailable, TeacherUnavailable
from nas.files import empty_folder, publishing_unless
from nas.node_cache import NodeCache
from nas.run_folder import CHECKPOINT, RUN, WORK
from nas.search.layout import BUNDLE, PREPARED, RECONSTRUCTION, clear_below, rung_folder
from nas.settings import Settings
from nas.shared_files import SharedFiles, registry_key
from nas.spec import parse_spec
from workers.checkpoints import Checkpoint, PartialTree, Publisher, beside
from workers.courier import carrying, sender
from workers.folders import MODEL, MODEL_TAR, OWN_BUNDLE
from workers.liveness import beating, is_superseded
from workers.outcome import RESULT, Outcome
from workers.step import Step, execute, failure

logger = logging.getLogger(__name__)

_ABSENT = {"teachers": TeacherUnavailable, "corpora": CorpusUnavailable, "tasks": TaskUnavailable}
SOURCE = ".source"
"""In a trial's folder on a node: the attempt whose checkpoints it began from, or which it published."""


def run(step: Step, *, url: str, data_folder: str, checkpoint_seconds: float, post_office: Any) -> Outcome:
    """Run a step on this node.

    Args:
        url: of the shared files; a path below the controller's `data_folder` is a key below the URL.
        checkpoint_seconds: between two uploads of what a step has trained so far, at least.
        post_office: the handle of the controller's `PostOffice`.
    """
    settings = Settings.from_environment(os.environ)
    cache = NodeCache(folder=settings.cache_folder, max_bytes=settings.cache_bytes)
    with cache.scratch() as mailbox, carrying(mailbox, send=sender(post_office, step.key), beat_seconds=step.beat_seconds):
        return run_here(step, mailbox=mailbox, shared=_open(url), cache=cache, data_folder=Path(data_folder), checkpoint_seconds=checkpoint_seconds)


def run_here(step: Step, *, mailbox: Path, shared: SharedFiles, cache: NodeCache, data_folder: Path, checkpoint_seconds: float) -> Outcome:
    """The same, with this node's side of the step's mailbox."""
    if step.stage == "probe":
        return execute(replace(step, folder=str(mailbox)))
    away = _Away(step=step, mailbox=mailbox, shared=shared, cache=cache, data_folder=data_folder, checkpoint_seconds=checkpoint_seconds)
    with beating(mailbox, seconds=step.beat_seconds), publishing_unless(partial(is_superseded, mailbox)):
        try:
            with ExitStack() as stack:
                outcome = away.run(stack)
            shared.write_json(outcome.as_dict(), key=f"{away.key(step.folder)}/{RESULT}")
        except (NasError, OSError) as error:
            return failure(error)
    return outcome


@lru_cache(maxsize=4)
def _open(url: str) -> SharedFiles:
    return SharedFiles(url)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Away:
    """One step, its files and where they are."""

    step: Step
    mailbox: Path
    shared: SharedFiles
    cache: NodeCache
    data_folder: Path
    """The controller's."""
    checkpoint_seconds: float

    def key(self, path: str) -> str:
        return Path(path).relative_to(self.data_folder).as_posix()

    def run(self, stack: ExitStack) -> Outcome:
        request = {**self.step.request, "inputs": self._fetch_inputs(stack)}
        match self.step.stage:
            case "prepare":
                return self._prepare(request, stack)
            case "distil":
                return self._distil(request, stack)
            case "rung":
                return self._rung({**request, "prepared": str(self._read_prepared(stack))}, stack)
            case _:
                local = {"prepared": str(self._read_prepared(stack)), "trial_folder": str(self._read(self._trial(), stack))}
                return self._bundle({**request, **local}, stack) if self.step.stage == "bundle" else self._execute({**request, **local})

    def _execute(self, request: Mapping[str, Any]) -> Outcome:
        return execute(replace(self.step, folder=str(self.mailbox), request=dict(request)))

    def _read(self, key: str, stack: ExitStack) -> Path:
        return stack.enter_context(self.cache.reading(key, source=self.shared))

    def _read_prepared(self, stack: ExitStack) -> Path:
        key = self.key(self.step.request["prepared"])
        try:
            return self._read(key, stack)
        except NotFound as absent:
            raise NotPrepared(f"{self.shared.url}/{key}: expected what the prepare step made, got nothing") from absent

    def _work(self, key: str) -> AbstractContextManager[Path]:
        return self.cache.writing(f"work on {self.shared.url}/{key}")

    def _trial(self) -> str:
        """The tree of the trial as the last attempt that counts left it."""
        source = self.step.request["trial_source"]
        if source is None:
            raise NotFound(f"{self.step.request['trial_folder']}: expected a published student, got none")
        return f"{self.key(self.step.request['trial_folder'])}/{source}"

    def _fetch_inputs(self, stack: ExitStack) -> dict[str, Any]:
        """The registered things under their paths on this machine; a corpus only where it is read."""
        inputs = self.step.request["inputs"]
        teacher = {**inputs["teacher"], "path": str(self._read_teacher(inputs["teacher"], stack))}
        fetched = {**inputs, "teacher": teacher}
        if "tasks" in inputs:
            fetched["tasks"] = [{**task, "folder": str(self._read_registered("tasks", task, stack))} for task in inputs["tasks"]]
        if self.step.stage in ("prepare", "distil"):
            fetched["corpora"] = [{**corpus, "files": _in_order(self._read_registered("corpora", corpus, stack))} for corpus in inputs["corpora"]]
        return fetched

    def _read_teacher(self, teacher: Mapping[str, Any], stack: ExitStack) -> Path:
        """A registered one, or the winner of a search, which lies in its bundle."""
        if "search" not in teacher:
            return self._read_registered("teachers", teacher, stack)
        key = self.key(teacher["path"])
        try:
            return self._read(key, stack)
        except NotFound as absent:
            raise TeacherUnavailable(f"{teacher['name']}: expected its winner's files at {self.shared.url}/{key}, got nothing") from absent

    def _read_registered(self, kind: str, thing: Mapping[str, Any], stack: ExitStack) -> Path:
        key = registry_key(kind, digest=thing["digest"])
        try:
            return self._read(key, stack)
        except NotFound as absent:
            error = _ABSENT[kind]
            raise error(
                f"{thing['name']}: expected at {self.shared.url}/{key}, got nothing; register it again (`nas {kind} add`) with NAS_SHARED set"
            ) from absent

    def _prepare(self, request: Mapping[str, Any], stack: ExitStack) -> Outcome:
        """What another search has prepared is read; what this one prepares can be gone on with, here and elsewhere, before it is whole."""
        key = self.key(request["prepared"])
        if (whole := self._find_prepared(key, stack)) is not None:
            return self._execute({**request, "prepared": str(whole)})
        folder = stack.enter_context(self._work(key))
        parts = PartialTree(folder=folder, key=key, last=PREPARED, shared=self.shared, cache=self.cache)
        outcome = self._go_on({**request, "prepared": str(folder)}, uploads=parts)
        if outcome.succeeded:
            self.shared.publish_tree(folder, key=key)
            self.cache.keep(folder, key=key, source=self.shared)
        return outcome

    def _find_prepared(self, key: str, stack: ExitStack) -> Path | None:
        """None where there is none; one of which a part is gone is none, and is out of the way of the next."""
        if self.shared.find_tree(key) is None:
            return None
        try:
            return self._read(key, stack)
        except (NotFound, CorruptFile) as broken:
            logger.warning("prepared files are not whole: %s", broken, extra={"action": "prepared_broken", "key": key})
            self.shared.delete(key)
            return None

    def _rung(self, request: Mapping[str, Any], stack: ExitStack) -> Outcome:
        key = self.key(request["trial_folder"])
        folder = stack.enter_context(self._work(key))
        self._begin_from(request["trial_source"], key=key, folder=folder)
        checkpoint = Checkpoint(folder=folder, states=rung_folder(Path(), rung=request["rung"]).as_posix(), beside=RECONSTRUCTION)
        outcome = self._train({**request, "trial_folder": str(folder)}, checkpoint=checkpoint, parent=key)
        if outcome.succeeded:
            is_last = request["rung"] == parse_spec(json.dumps(request["spec"])).rungs.num_trained
            clear_below(folder, rung=request["rung"] + is_last)
            self.shared.publish_tree(folder, key=f"{key}/{self.step.key}")
            (folder / SOURCE).write_text(self.step.key, encoding="utf-8")
        return outcome

    def _train(self, request: Mapping[str, Any], *, checkpoint: Checkpoint, parent: str) -> Outcome:
        """Run a step that goes on from its checkpoint."""
        return self._go_on(request, uploads=Publisher(checkpoint=checkpoint, parent=parent, attempt=self.step.key, shared=self.shared, cache=self.cache))

    def _go_on(self, request: Mapping[str, Any], *, uploads: Publisher | PartialTree) -> Outcome:
        """Run a step that goes on with what was uploaded of it, wherever that was made, and uploads its own as it goes and when it has to stop."""
        uploads.fetch()
        with beside(uploads.publish, seconds=self.checkpoint_seconds):
            outcome = self._execute(request)
        if not outcome.succeeded and outcome.retryable:
            uploads.publish()
        return outcome

    def _begin_from(self, source: str | None, *, key: str, folder: Path) -> None:
        """Make a trial's folder what the attempt `source` left, unless it is that, with what a later attempt on this machine has trained since."""
        marker, wanted = folder / SOURCE, source or "nothing"
        if marker.exists() and marker.read_text(encoding="utf-8") == wanted:
            return
        empty_folder(folder)
        if source is not None:
            manifest = self.shared.find_tree(f"{key}/{source}")
            if manifest is None:
                # A rung that is known from an earlier search left no trunk: the next one trains from the start.
                logger.info("trial has no checkpoint, training from the start", extra={"action": "trunk_lost", "key": key})
            else:
                self.cache.make_room(manifest.bytes)
                self.shared.fetch_tree(f"{key}/{source}", folder=folder, manifest=manifest)
                logger.info("trial fetched", extra={"action": "trial_fetched", "key": key, "bytes": manifest.bytes})
        marker.write_text(wanted, encoding="utf-8")

    def _bundle(self, request: Mapping[str, Any], stack: ExitStack) -> Outcome:
        folder = stack.enter_context(self.cache.scratch())
        outcome = self._execute({**request, "bundle_folder": str(folder)})
        if not outcome.succeeded or outcome.result is None:
            return outcome
        parent = self.key(self.step.request["bundle_folder"])
        key = f"{parent}/{TAR}"
        if request.get("is_teacher", True):
            # The model by itself, for searches whose teacher it will be.
            self.shared.publish_tree({name: folder / BUNDLE / name for name in outcome.result["as_teacher"]["files"]}, key=f"{parent}/{BUNDLE}")
        self.shared.publish_file(folder / TAR, key=key)
        return replace(outcome, result={**outcome.result, "bundle": str(self.data_folder / key)})

    def _distil(self, request: Mapping[str, Any], stack: ExitStack) -> Outcome:
        key = self.key(request["folder"])
        folder = stack.enter_context(self._work(key))
        local = {"folder": str(folder), **self._student(request, folder=folder, stack=stack)}
        checkpoint = Checkpoint(folder=folder, states=f"{MODEL}/{WORK}/{CHECKPOINT}", beside=f"{MODEL}/{WORK}/{RUN}")
        outcome = self._train({**request, **local}, checkpoint=checkpoint, parent=f"{key}/{MODEL}")
        if not outcome.succeeded or outcome.result is None:
            return outcome
        tar = f"{key}/{MODEL_TAR}"
        self.shared.publish_file(folder / MODEL_TAR, key=tar)
        empty_folder(folder)
        return replace(outcome, result={**outcome.result, "file": str(self.data_folder / tar)})

    def _student(self, request: Mapping[str, Any], *, folder: Path, stack: ExitStack) -> dict[str, Any]:
        """Where a distillation begins, in its folder on this node: a winner out of its tar, another trial as the files from which it is bundled."""
        own = folder / OWN_BUNDLE
        if not (own / BUNDLE).is_dir():
            if (bundle := request["bundle"]) is not None:
                trial = f"{self.key(bundle['trial_folder'])}/{bundle['trial_source']}"
                local = {"prepared": str(self._read(self.key(bundle["prepared"]), stack)), "trial_folder": str(self._read(trial, stack))}
                return {"student": None, "bundle": {**bundle, **local}}
            self._unpack(Path(request["student"]).with_name(TAR), sha256=request["student_sha256"], folder=own)
        return {"student": str(own / BUNDLE), "bundle": None}

    def _unpack(self, tar: Path, *, sha256: str, folder: Path) -> None:
        """The files of a winner's bundle, all of them or none."""
        key = self.key(str(tar))
        self.cache.make_room(2 * (self.shared.size(key) or 0))
        with self.cache.scratch() as scratch:
            self.shared.fetch_file(key, target=scratch / TAR, sha256=sha256)
            read_tar(scratch / TAR, folder=scratch / OWN_BUNDLE)
            (scratch / OWN_BUNDLE).rename(folder)


def _in_order(folder: Path) -> list[str]:
    """A corpus's files as they were registered: each in a folder that is its number."""
    return [str(file) for number in sorted(folder.iterdir()) for file in number.iterdir()]
