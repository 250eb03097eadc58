from __future__ import annotations

from pathlib import Path

import pytest

from nas.errors import InvalidSpec
from nas.settings import Settings


def test_an_empty_environment_gives_a_local_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_environment({"NAS_PORT": " "})

    assert settings == Settings(
        data_folder=tmp_path / "nas-data",
        database_url=f"sqlite:///{tmp_path / 'nas-data' / 'nas.db'}",
        host="127.0.0.1",
        port=8400,
        executor="ray",
        ray_address=None,
        ray_insecure=False,
        shared_url=None,
        cache_folder=Path.home() / ".cache" / "nas",
        cache_bytes=None,
        checkpoint_seconds=60.0,
        num_cpus=None,
        num_gpus=None,
        migrate=True,
        allowed_hosts=(),
        requests_per_second=50.0,
        lease_seconds=10.0,
        log_format=None,
        log_level="INFO",
        metrics_port=None,
        log_days=30,
        max_log_bytes=2**30,
        event_days=365,
        attempt_lease_seconds=60.0,
    )
    assert list(tmp_path.iterdir()) == []


def test_every_variable_is_read(tmp_path: Path) -> None:
    settings = Settings.from_environment(
        {
            "NAS_DATA": str(tmp_path),
            "NAS_DATABASE_URL": "postgresql://nas@db/nas",
            "NAS_HOST": "0.0.0.0",
            "NAS_PORT": "80",
            "NAS_EXECUTOR": "local",
            "NAS_RAY_ADDRESS": "ray-head:6379",
            "NAS_RAY_INSECURE": "1",
            "NAS_SHARED": "s3://models/nas/",
            "NAS_CACHE": str(tmp_path / "cache"),
            "NAS_CACHE_BYTES": "1000",
            "NAS_CHECKPOINT_SECONDS": "300",
            "NAS_NUM_CPUS": "2",
            "NAS_NUM_GPUS": "0",
            "NAS_MIGRATE": "0",
            "NAS_ALLOWED_HOSTS": "nas.example.org, 10.0.0.7,::1",
            "NAS_REQUESTS_PER_SECOND": "2.5",
            "NAS_LEASE_SECONDS": "2.5",
            "NAS_LOG_FORMAT": "json",
            "NAS_LOG_LEVEL": "warning",
            "NAS_METRICS_PORT": "9100",
            "NAS_LOG_DAYS": "7",
            "NAS_MAX_LOG_BYTES": "1048576",
            "NAS_EVENT_DAYS": "14",
            "NAS_ATTEMPT_LEASE_SECONDS": "30",
        }
    )

    assert settings == Settings(
        data_folder=tmp_path,
        database_url="postgresql://nas@db/nas",
        host="0.0.0.0",
        port=80,
        executor="local",
        ray_address="ray-head:6379",
        ray_insecure=True,
        shared_url="s3://models/nas",
        cache_folder=tmp_path / "cache",
        cache_bytes=1000,
        checkpoint_seconds=300.0,
        num_cpus=2,
        num_gpus=0,
        migrate=False,
        allowed_hosts=("nas.example.org", "10.0.0.7", "::1"),
        requests_per_second=2.5,
        lease_seconds=2.5,
        log_format="json",
        log_level="WARNING",
        metrics_port=9100,
        log_days=7,
        max_log_bytes=2**20,
        event_days=14,
        attempt_lease_seconds=30.0,
    )
    assert {settings.prepared_folder, settings.searches_folder, settings.registry_folder} == {tmp_path / name for name in ("prepared", "searches", "registry")}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("NAS_SHARED", "/mnt/nas", "NAS_SHARED: expected file:///FOLDER or s3://BUCKET/PREFIX, without keys, got /mnt/nas:..."),
        ("NAS_SHARED", "s3://key:secret@host/x", "NAS_SHARED: expected file:///FOLDER or s3://BUCKET/PREFIX, without keys, got s3:..."),
        ("NAS_RAY_INSECURE", "yes", "NAS_RAY_INSECURE: expected 0 or 1, got 'yes'"),
        ("NAS_PORT", "0", "NAS_PORT: expected an integer from 1 to 65535, got '0'"),
        ("NAS_PORT", "٨٤", "NAS_PORT: expected an integer from 1 to 65535, got '٨٤'"),
        ("NAS_NUM_CPUS", "2.5", "NAS_NUM_CPUS: expected an integer from 1 to 4096, got '2.5'"),
        ("NAS_NUM_GPUS", "-1", "NAS_NUM_GPUS: expected an integer from 0 to 4096, got '-1'"),
        ("NAS_EXECUTOR", "slurm", "NAS_EXECUTOR: expected ray or local, got 'slurm'"),
        ("NAS_LEASE_SECONDS", "nan", "NAS_LEASE_SECONDS: expected seconds from 1 to 3600, got 'nan'"),
        ("NAS_HOST", "http://x", "NAS_HOST: expected a host name or an address to listen on, got 'http://x'"),
        ("NAS_DATABASE_URL", "mysql://me:secret@db", "NAS_DATABASE_URL: expected sqlite:///FILE or postgresql://USER@HOST/NAME, got mysql:..."),
        ("NAS_DATABASE_URL", "sqlite:///:memory:", "NAS_DATABASE_URL: expected sqlite:///FILE or postgresql://USER@HOST/NAME, got sqlite:..."),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(name: str, value: str, message: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        Settings.from_environment({name: value})

    assert str(caught.value) == message


def test_a_file_is_no_data_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(InvalidSpec, match="NAS_DATA: expected a folder, got"):
        Settings.from_environment({"NAS_DATA": str(tmp_path / "file")})


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(InvalidSpec) as caught:
        Settings.from_environment({"NAS_PORT": "x", "NAS_EXECUTOR": "y"})

    assert [problem.field for problem in caught.value.problems] == ["NAS_PORT", "NAS_EXECUTOR"]


def test_a_database_s_url_may_lie_in_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("postgresql://nas:pw@db/nas\n")
    assert Settings.from_environment({"NAS_DATABASE_URL_FILE": str(secret)}).database_url == "postgresql://nas:pw@db/nas"
    assert Settings.from_environment({"NAS_DATABASE_URL_FILE": str(secret), "NAS_DATABASE_URL": "sqlite:////x.db"}).database_url == "sqlite:////x.db"
    with pytest.raises(InvalidSpec, match="NAS_DATABASE_URL_FILE: expected a file that can be read, got '/nowhere'"):
        Settings.from_environment({"NAS_DATABASE_URL_FILE": "/nowhere"})
