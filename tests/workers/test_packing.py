"""Bundles that were asked for, packed under the real controller long after their search has ended."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nas.errors import Conflict
from nas.search.layout import STUDENT, trial_folder
from nas.store.records import BundleRecord, BundleState, SearchRecord
from nas.trial_bundles import find_bundle, plan_bundle
from tests.workers.inline_service import Service, hang
from workers import packing
from workers.controller import Controller
from workers.liveness import BEAT, is_superseded
from workers.outcome import Outcome
from workers.step import Step

Found = tuple[Service, SearchRecord]


@pytest.fixture(autouse=True)
def forgotten(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test asks anew of the one search."""
    service, search = found
    monkeypatch.setattr(packing, "LOOK_SECONDS", 0.0)
    forget(service)
    shutil.rmtree(service.folder(search.id) / packing.BUNDLES, ignore_errors=True)


def forget(service: Service) -> None:
    with service.store.write(fence=None) as connection:
        connection.exec_driver_sql("DELETE FROM bundles")


def other_finalist(service: Service, search: SearchRecord) -> int:
    verified = [trial.number for trial in service.store.list_trials(search.id) if (trial.confirmation or {}).get("verified")]
    [number] = [number for number in verified if number != (search.winner or {})["trial"]]
    return number


def run(service: Service, search: SearchRecord, number: int, *, until: Callable[[], bool] | None = None, seconds: float = 60.0) -> BundleRecord:
    """A controller of its own, until the bundle is packed or given up: as if it was killed there."""
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)
    deadline = time.monotonic() + seconds
    while True:
        bundle = service.store.find_bundle(search.id, number)
        assert bundle is not None
        if bundle.state is not BundleState.WAITING if until is None else until():
            service.executor.steps.clear()
            service.expire_lease()
            return bundle
        assert time.monotonic() < deadline, bundle
        controller.tick(timeout_seconds=0.0)


def test_a_finalist_that_did_not_win_is_packed_like_the_winner(found: Found) -> None:
    service, search = found
    number, store = other_finalist(service, search), service.store
    assert find_bundle(search, number, store=store) is None
    assert plan_bundle(search, number, store=store, settings=service.settings)().state is BundleState.WAITING

    packed = run(service, search, number)

    assert packed.state is BundleState.PACKED, packed.error
    assert packed.path is not None
    tar = service.settings.data_folder / packed.path
    assert (hashlib.sha256(tar.read_bytes()).hexdigest(), tar.stat().st_size) == (packed.sha256, packed.num_bytes)
    with tarfile.open(tar) as archive:
        shape, provenance = (json.load(archive.extractfile(f"bundle/{name}.json")) for name in ("shape", "provenance"))  # type: ignore[arg-type]
    assert (shape, provenance["trial"]) == ({**store.get_trial(search.id, number).shape, **shape}, number)
    assert [path.name for path in (service.folder(search.id) / packing.BUNDLES).rglob("*") if path.is_file()] == ["bundle.tar"]
    num_steps = len(service.executor.history)
    assert plan_bundle(search, number, store=store, settings=service.settings)() == packed
    run(service, search, number)
    assert len(service.executor.history) == num_steps, "packed twice"
    assert store.get_search(search.id) == search, "the search that has ended has changed"


def test_the_winner_packed_again_is_the_same_file(found: Found) -> None:
    service, search = found
    assert search.winner is not None
    number = search.winner["trial"]
    winner = plan_bundle(search, number, store=service.store, settings=service.settings)()
    assert (winner.state, winner.sha256, winner.path) == (BundleState.PACKED, search.winner["bundle_sha256"], search.winner["bundle"])
    assert service.store.find_bundle(search.id, number) is None, "nobody has to ask for it"
    service.store.request_bundle(search.id, number)

    assert run(service, search, number).sha256 == winner.sha256


@pytest.mark.parametrize(("retryable", "num_tries"), [(True, 3), (False, 1)])
def test_what_cannot_be_packed_is_tried_as_often_as_a_step_may_be_and_again_when_asked_again(found: Found, retryable: bool, num_tries: int) -> None:
    service, search = found
    number = other_finalist(service, search)
    service.executor.before = lambda step: Outcome(succeeded=False, reason="error", message="so it is", retryable=retryable)
    plan_bundle(search, number, store=service.store, settings=service.settings)()

    failed = run(service, search, number)

    assert (failed.state, failed.num_failures, failed.path) == (BundleState.FAILED, num_tries, None)
    assert failed.error == {"reason": "error", "message": "so it is", "log": ""}
    assert not any(path.is_file() for path in (service.folder(search.id) / packing.BUNDLES).rglob("*"))
    service.executor.before = lambda step: None
    plan_bundle(search, number, store=service.store, settings=service.settings)()
    assert run(service, search, number).state is BundleState.PACKED


def test_a_full_disk_is_told_at_once(found: Found) -> None:
    service, search = found
    number = other_finalist(service, search)
    service.executor.before = lambda step: Outcome(succeeded=False, reason="disk_full", message="no room")
    plan_bundle(search, number, store=service.store, settings=service.settings)()

    failed = run(service, search, number)

    assert (failed.state, failed.num_failures, (failed.error or {})["reason"]) == (BundleState.FAILED, 1, "disk_full")


@pytest.mark.parametrize("lie", [{"bundle": "/etc/passwd"}, {"trial": 99}, {"bundle_sha256": "none"}, {"bundle_bytes": None}, {"bundle_bytes": 10**30}])
def test_a_result_that_cannot_be_is_not_kept(found: Found, lie: dict[str, object]) -> None:
    service, search = found
    number = other_finalist(service, search)

    def answer(step: Step) -> Outcome:
        sound = {"trial": number, "bundle": f"{step.request['bundle_folder']}/bundle.tar", "bundle_sha256": "a" * 64, "bundle_bytes": 1}
        return Outcome(succeeded=True, result={**sound, **lie})

    service.executor.before = answer
    plan_bundle(search, number, store=service.store, settings=service.settings)()

    failed = run(service, search, number)

    assert (failed.state, (failed.error or {})["reason"]) == (BundleState.FAILED, "invalid_result")


def test_another_controller_packs_what_the_first_one_left_and_its_step_leaves_nothing(found: Found) -> None:
    service, search = found
    number = other_finalist(service, search)
    plan_bundle(search, number, store=service.store, settings=service.settings)()
    run(service, search, number, until=lambda: bool(service.executor.steps))
    [orphan] = service.executor.history

    packed = run(service, search, number)

    assert (packed.state, packed.num_failures) == (BundleState.PACKED, 0)
    assert is_superseded(Path(orphan.folder))
    assert orphan.request["bundle_folder"] not in str(packed.path)


def test_a_step_that_falls_silent_is_given_up_and_run_again(found: Found) -> None:
    service, search = found
    service.settings = dataclasses.replace(service.settings, attempt_lease_seconds=0.3)
    number = other_finalist(service, search)
    hung = hang(service, hangs=lambda step: not hung)
    plan_bundle(search, number, store=service.store, settings=service.settings)()

    packed = run(service, search, number)

    assert (packed.state, packed.num_failures, (packed.error or {})["reason"]) == (BundleState.PACKED, 1, "preempted")
    assert not (Path(hung[0].folder) / BEAT).exists()


def test_one_whose_search_is_deleted_while_it_is_packed_troubles_nobody(found: Found) -> None:
    service, search = found
    number = other_finalist(service, search)
    plan_bundle(search, number, store=service.store, settings=service.settings)()
    controller = Controller(store=service.store, executor=service.executor, settings=service.settings)
    while not service.executor.steps:
        controller.tick(timeout_seconds=0.0)
    forget(service)
    shutil.rmtree(service.folder(search.id) / packing.BUNDLES)
    for _ in range(3):
        controller.tick(timeout_seconds=0.0)
    service.expire_lease()

    assert len(service.executor.history) == 1
    assert service.store.find_bundle(search.id, number) is None
    assert not any(path.is_file() for path in (service.folder(search.id) / packing.BUNDLES).rglob("*"))


def test_only_a_verified_trial_whose_student_was_kept_can_be_had(found: Found) -> None:
    service, search = found
    store, settings, number = service.store, service.settings, other_finalist(service, search)
    others = [trial.number for trial in store.list_trials(search.id) if not (trial.confirmation or {}).get("verified")]
    for other in others:
        with pytest.raises(Conflict, match=f"trial {other} of search {search.id}: expected one that the confirm step verified, got"):
            plan_bundle(search, other, store=store, settings=settings)()
    student = trial_folder(service.folder(search.id), number=number) / STUDENT
    hidden = student.rename(student.with_name("hidden"))
    try:
        with pytest.raises(Conflict, match=r"expected its student on the disk, got one that was not kept \(`retention.students`\)"):
            plan_bundle(search, number, store=store, settings=settings)()
        store.request_bundle(search.id, number)  # it went between the request and the step
        failed = run(service, search, number)
        assert failed.state is BundleState.FAILED
    finally:
        hidden.rename(student)
