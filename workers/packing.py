"""Packs bundles of trials that are no winners, one after the other, as users ask for them. Their searches have ended, so it belongs to the controller.

Every try has a folder of its own, which the record names once the bundle is in it: one that outlives its controller is in nobody's way.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nas.errors import Fenced, FilesUnavailable, StoreUnavailable
from nas.search.layout import BUNDLE, prepared_key, trial_folder
from nas.settings import Settings
from nas.spec import LimitSpec, parse_spec
from nas.store.machines import Fence
from nas.store.records import AttemptRecord, AttemptState, BundleRecord, new_id, utc_now
from nas.store.store import Store
from nas.trial_files import bundle_request, find_tree
from workers import metrics
from workers.executor import Executor
from workers.folders import SearchFolder
from workers.liveness import supersede
from workers.logs import last_lines, read_tail
from workers.outcome import Outcome
from workers.step import Step
from workers.tries import BEATS_PER_LEASE, begin
from workers.verdicts import Untrue, check_bundle, check_size
from workers.watch import Leader, Watch

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often the store is asked for what is to be packed."""
BUNDLES = "bundles"
"""In a search's folder: what was packed of its trials, by number."""


@dataclass(slots=True, kw_only=True)
class _Try:
    """The try that is in flight."""

    wanted: BundleRecord
    step: Step
    watch: Watch
    limits: LimitSpec
    ended: Outcome | None

    @property
    def folder(self) -> Path:
        """Where the bundle is to be."""
        return Path(self.step.request["bundle_folder"])


class Packing:
    """The bundles of one controller. One that is lost with its controller is asked for still, and packed by the next."""

    def __init__(self, *, store: Store, executor: Executor, settings: Settings, clock: Callable[[], float]) -> None:
        self._store, self._executor, self._settings, self._clock = store, executor, settings, clock
        self._try: _Try | None = None
        self._looked: float | None = None

    def go_on(self, *, fence: Fence) -> None:
        """Record what ended, give up what hangs, and begin the next one, now and then."""
        if self._try is not None:
            self._follow(self._try, fence=fence)
        now = self._clock()
        if self._try is None and (self._looked is None or now - self._looked >= LOOK_SECONDS):
            self._looked = now
            for wanted in self._store.waiting_bundles(limit=1):
                self._begin(wanted, fence=fence)

    def take_in(self, key: str, outcome: Outcome) -> bool:
        """Note how a step ended, to be recorded; False: it was none of these."""
        if self._try is None or key != self._try.step.key:
            return False
        self._try.ended = outcome
        return True

    def drop(self) -> None:
        """Another controller packs from now on."""
        if self._try is not None:
            supersede(Path(self._try.step.folder))
            self._executor.kill(self._try.step.key)
        self._try = None

    def _begin(self, wanted: BundleRecord, *, fence: Fence) -> None:
        try:
            self._try = self._make_try(wanted, fence=fence)
        except (StoreUnavailable, FilesUnavailable, Fenced):
            raise
        # Broad: a search of another version, files that are gone, whatever an executor says; who asked reads why.
        except Exception as error:
            logger.exception("bundle not begun", extra={"action": "bundle_failed", "search_id": wanted.search_id, "trial": wanted.trial})
            told = {"reason": "unavailable", "message": f"{type(error).__name__}: {error}"[:4000]}
            self._store.fail_bundle(wanted.search_id, wanted.trial, error=told, max_failures=1, device_seconds=0.0, fence=fence)

    def _make_try(self, wanted: BundleRecord, *, fence: Fence) -> _Try:
        settings, number, key = self._settings, wanted.trial, new_id("att")
        search = self._store.get_search(wanted.search_id)
        spec = parse_spec(json.dumps(search.spec))
        own = SearchFolder(path=settings.searches_folder / search.id / BUNDLES / str(number))
        shutil.rmtree(own.path, ignore_errors=True)  # of tries that failed, or whose controller died
        SearchFolder.of(search.id, settings=settings).delete_shared(f"{BUNDLES}/{number}", keep=(key, own.attempt(key).parent.name))
        prepared = settings.prepared_folder / prepared_key(spec, inputs=search.inputs)
        student = trial_folder(settings.searches_folder / search.id, number=number)
        asked = bundle_request(search, number, store=self._store, student=student, prepared=prepared, folder=own.path / key)
        source = {} if settings.shared_url is None else {"trial_source": find_tree(search.id, number, store=self._store)}
        step = Step(
            key=key,
            stage="bundle",
            folder=str(own.attempt(key)),
            request={**asked, **source, "observations": [], "is_teacher": False},
            cpus=spec.resources.cpus,
            gpus=0.0,
            beat_seconds=settings.attempt_lease_seconds / BEATS_PER_LEASE,
            context={"search_id": search.id, "trial": number},
            traceparent=search.traceparent,
        )
        leader = Leader(store=self._store, executor=self._executor, settings=settings, fence=fence, clock=self._clock)
        watch = Watch(search.id, leader=leader, folder=own, num_devices=step.cpus)
        # Not one of the store's: what happens to a search that has ended is told no more. Nor is it said that it waits.
        attempt = AttemptRecord(
            id=key,
            search_id=search.id,
            stage="bundle",
            trial=number,
            rung=None,
            state=AttemptState.RUNNING,
            reason=None,
            started_at=utc_now(),
            finished_at=None,
        )
        watch.add(attempt).said_waiting = True
        return _Try(wanted=wanted, step=step, watch=watch, limits=spec.limits, ended=begin(step, executor=self._executor))

    def _follow(self, current: _Try, *, fence: Fence) -> None:
        key, watch = current.step.key, current.watch
        watch.follow()
        for given_up in (watch.enforce(current.limits), watch.listen(ended=() if current.ended is None else (key,))):
            current.ended = current.ended or given_up.get(key)
        if (ended := current.ended) is not None:
            self._record(current, ended if ended.succeeded else watch.running[key].killed or ended, fence=fence)
            self._try = None

    def _record(self, current: _Try, outcome: Outcome, *, fence: Fence) -> None:
        wanted, mailbox = current.wanted, Path(current.step.folder)
        shared, below = SearchFolder.of(wanted.search_id, settings=self._settings), f"{BUNDLES}/{wanted.trial}"
        seconds = current.watch.device_seconds_of(current.watch.running[current.step.key])
        if outcome.succeeded and outcome.result is not None:
            try:
                check_bundle(outcome.result, trial=wanted.trial, folder=current.folder)
                check_size(outcome.result, name="bundle_bytes")
            except Untrue as untrue:
                outcome = Outcome(succeeded=False, reason="invalid_result", message=str(untrue))
        if outcome.succeeded and outcome.result is not None:
            path = Path(outcome.result["bundle"]).relative_to(self._settings.data_folder).as_posix()
            packed = {"path": path, "sha256": outcome.result["bundle_sha256"], "num_bytes": outcome.result["bundle_bytes"]}
            self._store.save_bundle(wanted.search_id, wanted.trial, **packed, device_seconds=seconds, fence=fence)
            shutil.rmtree(current.folder / BUNDLE, ignore_errors=True)  # the tar has it all
            shared.delete_shared(f"{below}/{current.folder.name}/{BUNDLE}")
        else:
            shared.delete_shared(f"{below}/{current.folder.name}")
            supersede(mailbox)
            error = {"reason": outcome.reason or "error", "message": outcome.message[:4000], "log": last_lines(read_tail(mailbox))}
            most = current.limits.max_attempts if outcome.retryable and outcome.reason != "disk_full" else 1
            self._store.fail_bundle(wanted.search_id, wanted.trial, error=error, max_failures=most, device_seconds=seconds, fence=fence)
        shutil.rmtree(mailbox, ignore_errors=True)
        shared.delete_shared(f"{below}/{mailbox.parent.name}/{mailbox.name}")
        state = AttemptState.SUCCEEDED if outcome.succeeded else AttemptState.FAILED
        metrics.ATTEMPTS_ENDED.labels(stage="bundle", state=state, reason=outcome.reason or "").inc()
        metrics.DEVICE_SECONDS.labels(stage="bundle").inc(seconds)
        extra = {"action": "bundle", "search_id": wanted.search_id, "trial": wanted.trial, "reason": outcome.reason}
        logger.info("bundle %s", "packed" if outcome.succeeded else "not packed", extra=extra)
