"""What is deleted where the nodes share files by URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nas.errors import FilesUnavailable
from nas.settings import Settings
from nas.shared_files import SharedFiles
from nas.spec import LimitSpec
from nas.store.records import SearchTimes
from workers import folders
from workers.folders import SearchFolder, sweep_by_url
from workers.limits import Excess, Limits


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_environment({"NAS_DATA": str(tmp_path / "data"), "NAS_SHARED": f"file://{tmp_path / 'shared'}"})


@pytest.fixture
def shared(settings: Settings) -> SharedFiles:
    """Two searches with two trials of two attempts each."""
    assert settings.shared_url is not None
    shared = SharedFiles(settings.shared_url)
    for search in ("srch_1", "srch_2"):
        for trial in (0, 1):
            for attempt in ("att_1", "att_2"):
                shared.write_json({"files": {}}, key=f"searches/{search}/trials/{trial}/{attempt}/manifest.json")
        shared.write_json({}, key=f"searches/{search}/attempts/att_1/result.json")
    return shared


def publish(shared: SharedFiles, *names: str) -> None:
    for name in names:
        shared.write_json({"files": {}}, key=f"searches/srch_1/{name}/manifest.json")


def wait() -> None:
    folders._remover().submit(lambda: None).result()


class Store:
    def search_ids(self) -> set[str]:
        return {"srch_2"}


def test_of_a_trial_the_tree_that_counts_stays(settings: Settings, shared: SharedFiles) -> None:
    publish(shared, "trials/0/att_1-unfinished", "trials/0/att_2-unfinished", "trials/0/att_3-unfinished", "trials/0/att_3")

    SearchFolder.of("srch_1", settings=settings).drop_superseded(0, attempts=["att_0", "att_1", "att_2"], tree="att_2")
    wait()

    assert shared.children("searches/srch_1/trials/0") == ["att_2", "att_3", "att_3-unfinished"], "not that of an attempt that began since"
    assert shared.children("searches/srch_1/trials/1") == ["att_1", "att_2"]


def test_of_a_trial_that_is_dropped_what_comes_later_stays(settings: Settings, shared: SharedFiles) -> None:
    publish(shared, "trials/0/att_2-unfinished", "trials/0/att_3-unfinished")

    SearchFolder.of("srch_1", settings=settings).drop_trial(0, attempts=["att_1", "att_2"])
    wait()

    assert shared.children("searches/srch_1/trials/0") == ["att_3-unfinished"]


def test_of_a_search_that_ended_the_verified_students_stay(settings: Settings, shared: SharedFiles) -> None:
    SearchFolder.of("srch_1", settings=settings).clear(keep_attempts=["att_1"], keep_trials=[1])
    wait()

    assert shared.children("searches/srch_1/trials") == ["1"]
    assert shared.children("searches/srch_1/attempts") == []
    assert shared.children("searches/srch_2/trials") == ["0", "1"]


def test_of_a_search_that_was_deleted_nothing_stays(settings: Settings, shared: SharedFiles) -> None:
    store: Any = Store()

    sweep_by_url(store, settings=settings)
    wait()

    assert shared.children("searches") == ["srch_2"]


def test_the_bytes_of_a_search_are_counted_behind_the_url(settings: Settings, shared: SharedFiles) -> None:
    use = SearchFolder.of("srch_1", settings=settings).measure().result()

    assert use.num_bytes == 4 * len('{"files": {}}') + len("{}")
    assert use.of_trial(1) == 2 * len('{"files": {}}')
    assert use.of_trial(7) == 0


def test_a_disk_budget_counts_them_and_a_url_that_is_away_is_no_reason_to_pause(
    settings: Settings, shared: SharedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, now = SearchFolder.of("srch_1", settings=settings), [0.0]
    limits = Limits(LimitSpec(max_disk_bytes=50), attempts=(), times=SearchTimes(at_work_seconds=0.0, in_state_seconds=0.0), clock=lambda: now[0])

    def look() -> Excess | None:
        limits.disk_excess(folder)  # begins to count, which nobody waits for
        wait()
        return limits.disk_excess(folder)

    excess = look()
    assert excess is not None
    assert (excess.num_bytes, excess.use.of_trial(0)) == (4, 26)
    assert look() is None, "counted again at once"
    now[0] += 1e6
    monkeypatch.setattr(SharedFiles, "sizes", _refuse)
    assert look() is None


def _refuse(*_: Any, **__: Any) -> None:
    raise FilesUnavailable("away")
