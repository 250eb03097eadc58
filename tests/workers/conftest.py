"""Services whose workers are this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nas.search import confirm
from nas.settings import Settings
from nas.store.records import SearchRecord
from nas.store.store import Store
from tests.workers.inline_service import ONE_RUNG, InlineExecutor, Service, verify_here


@pytest.fixture
def fresh_process() -> None:
    """For a test in which each finalist is loaded in a fresh process, which takes three times as long as all the rest of a search."""


@pytest.fixture
def service(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    register_tiny: Callable[..., None],
    tiny_spec: Callable[..., dict[str, Any]],
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Service]:
    if "fresh_process" not in request.fixturenames:
        monkeypatch.setattr(confirm, "verify", partial(verify_here, confirm.verify))
    settings = dataclasses.replace(Settings.from_environment({"NAS_DATA": str(tmp_path / "data")}), lease_seconds=0.3)
    settings.data_folder.mkdir()
    settings.prepared_folder.symlink_to(prepared)
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    yield Service(settings=settings, store=store, make_spec=tiny_spec)
    store.close()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared folders, shared by the tests: the digest in their names keeps them apart."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def succeeded(
    tmp_path_factory: pytest.TempPathFactory, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]
) -> Iterator[tuple[Service, SearchRecord]]:
    """A service with a search that has succeeded, with two finalists."""
    settings = dataclasses.replace(Settings.from_environment({"NAS_DATA": str(tmp_path_factory.mktemp("data"))}), lease_seconds=0.3)
    settings.data_folder.mkdir(exist_ok=True)
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    service = Service(settings=settings, store=store, make_spec=tiny_spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confirm, "verify", partial(verify_here, confirm.verify))
        yield service, service.run(service.submit(sampler={"name": "random", "max_trials": 2}, rungs=ONE_RUNG, num_finalists=2))
    store.close()


@pytest.fixture
def found(succeeded: tuple[Service, SearchRecord]) -> tuple[Service, SearchRecord]:
    service, search = succeeded
    return dataclasses.replace(service, executor=InlineExecutor()), search
