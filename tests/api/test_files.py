from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from api.files import find_file
from nas.errors import CorruptFile, FilesUnavailable, NotFound
from nas.settings import Settings
from nas.shared_files import SharedFiles


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of an API whose data folder is not that of the machine that made the file."""
    (tmp_path / "bundle.tar").write_bytes(b"the winner")
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path / "data"), "NAS_SHARED": f"file://{tmp_path / 'shared'}"})
    assert settings.shared_url is not None
    SharedFiles(settings.shared_url).publish_file(tmp_path / "bundle.tar", key="searches/s/winner/bundle.tar")
    return settings


DIGEST = hashlib.sha256(b"the winner").hexdigest()


def test_a_file_of_another_machine_is_fetched_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    path = find_file("searches/s/winner/bundle.tar", sha256=DIGEST, settings=settings)
    assert path.read_bytes() == b"the winner"
    monkeypatch.setattr(SharedFiles, "fetch_file", lambda *_, **__: pytest.fail("fetched again"))

    assert find_file("searches/s/winner/bundle.tar", sha256=DIGEST, settings=settings) == path


def test_what_is_gone_damaged_elsewhere_or_out_of_reach_is_not_served(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match="no longer in the data folder"):
        find_file("searches/s/winner/other.tar", sha256=DIGEST, settings=settings)
    with pytest.raises(CorruptFile, match="expected sha256 0000"):
        find_file("searches/s/winner/bundle.tar", sha256="0" * 64, settings=settings)
    assert list((tmp_path / "data").rglob("*.tar")) == []
    with pytest.raises(NotFound):
        find_file("../bundle.tar", sha256=DIGEST, settings=settings)
    monkeypatch.setattr(SharedFiles, "fetch_file", _refuse)
    with pytest.raises(FilesUnavailable, match=r"^the place where the service keeps its files cannot be reached now$"):
        find_file("x/bundle.tar", sha256=DIGEST, settings=settings)


def test_a_link_that_a_worker_left_leads_to_no_other_file(settings: Settings) -> None:
    folder = settings.data_folder
    (folder / "searches" / "s").mkdir(parents=True)
    (folder / "nas.db").write_bytes(b"of all projects")
    (folder / "searches" / "s" / "bundle.tar").symlink_to(folder / "nas.db")
    (folder / "searches" / "t").symlink_to(folder)

    for place in ("searches/s/bundle.tar", "searches/t/nas.db", "searches/s/../../nas.db"):
        with pytest.raises(NotFound, match="no longer in the data folder"):
            find_file(place, sha256=DIGEST, settings=replace(settings, shared_url=None))


def _refuse(*_: Any, **__: Any) -> None:
    raise FilesUnavailable("s3://secret-bucket/x: expected an answer, got EndpointConnectionError")
