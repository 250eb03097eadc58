"""The deployment's settings: read once from the environment, in a `__main__`, and passed down. Nothing is opened or made here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from nas.errors import InvalidSpec, Problem

T = TypeVar("T")

_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|[0-9a-f]*:[0-9a-f:]+", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What differs from one installation to the next; what differs from search to search is in the spec."""

    data_folder: Path
    """NAS_DATA: all files of the service. Default: nas-data in the working folder."""
    database_url: str
    """NAS_DATABASE_URL: sqlite:///FILE or postgresql://..., or NAS_DATABASE_URL_FILE: a file that holds it (a secret). Default: nas.db in the data folder."""
    host: str
    """NAS_HOST: address the API listens on. Default: 127.0.0.1."""
    port: int
    """NAS_PORT: its port. Default: 8400."""
    executor: Literal["ray", "local"]
    """NAS_EXECUTOR: who runs the trials; local is one process, for tests. Default: ray."""
    ray_address: str | None
    """NAS_RAY_ADDRESS: a running Ray cluster. Default: the controller starts a local one."""
    ray_insecure: bool
    """NAS_RAY_INSECURE: 1 to use a Ray cluster by address that asks nobody for a token: whoever reaches it runs code there. Default: 0."""
    shared_url: str | None
    """NAS_SHARED: where the nodes of a cluster find files: file:///FOLDER or s3://BUCKET/PREFIX. Default: they have the data folder itself, under its path."""
    cache_folder: Path
    """NAS_CACHE: this machine's copies of shared files. Default: nas in the user's cache folder."""
    cache_bytes: int | None
    """NAS_CACHE_BYTES: how large they may be together. Default: they leave a tenth of the disk free."""
    checkpoint_seconds: float
    """NAS_CHECKPOINT_SECONDS: with NAS_SHARED, how often a running step's checkpoint is uploaded at most, for another node to go on from should this
    one be lost; an upload takes at most a twentieth of the time. Default: 60, as often as a step saves one."""
    num_cpus: int | None
    """NAS_NUM_CPUS: CPU cores of the local cluster. Default: those of the machine."""
    num_gpus: int | None
    """NAS_NUM_GPUS: GPUs of the local cluster. Default: those of the machine."""
    migrate: bool
    """NAS_MIGRATE: 1: the API and the controllers bring the database's schema up to date when they start; 0: they refuse another one, and
    `nas migrate` is a step of its own. Default: 1."""
    allowed_hosts: tuple[str, ...]
    """NAS_ALLOWED_HOSTS: host names by which browsers reach the API, separated by commas, beside loopback's and NAS_HOST. Default: none."""
    requests_per_second: float
    """NAS_REQUESTS_PER_SECOND: how often one API key may ask one API process, on average; twice as many at once. Default: 50."""
    lease_seconds: float
    """NAS_LEASE_SECONDS: the searches of a controller that has not renewed its leases for so long are taken over by others. Default: 10."""
    attempt_lease_seconds: float
    """NAS_ATTEMPT_LEASE_SECONDS: a running step that shows no sign of life for so long is given up and run again. Default: 60."""

    log_format: Literal["json", "text"] | None
    """NAS_LOG_FORMAT: json or text. Default: text on a terminal, JSON anywhere else."""
    log_level: str
    """NAS_LOG_LEVEL: debug, info, warning or error. Default: info."""
    metrics_port: int | None
    """NAS_METRICS_PORT: where a controller shows its own metrics (/metrics) and whether it is alive (/healthz). Default: nowhere."""
    log_days: int
    """NAS_LOG_DAYS: logs of attempts are kept for so many days. Default: 30."""
    max_log_bytes: int
    """NAS_MAX_LOG_BYTES: characters of all logs of attempts together; the oldest go first. Default: 2**30."""
    event_days: int
    """NAS_EVENT_DAYS: events of a search are kept for so many days after its end; its last one stays. Default: 365."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Settings from variables; an empty variable counts as absent.

        Raises:
            InvalidSpec: one problem for each variable that cannot be used.
        """
        reader = _Reader(environment)
        data_folder = reader.read("NAS_DATA", _folder, default=Path("nas-data").absolute())
        settings = cls(
            data_folder=data_folder,
            database_url=reader.read("NAS_DATABASE_URL", _database_url, default=f"sqlite:///{data_folder / 'nas.db'}"),
            host=reader.read("NAS_HOST", _host, default="127.0.0.1"),
            port=reader.read("NAS_PORT", _integer(at_least=1, at_most=65535), default=8400),
            executor=reader.read("NAS_EXECUTOR", _executor, default="ray"),
            ray_address=reader.read("NAS_RAY_ADDRESS", str, default=None),
            ray_insecure=reader.read("NAS_RAY_INSECURE", _switch, default=False),
            shared_url=reader.read("NAS_SHARED", _shared_url, default=None),
            cache_folder=reader.read("NAS_CACHE", _folder, default=_user_cache(environment) / "nas"),
            cache_bytes=reader.read("NAS_CACHE_BYTES", _integer(at_least=1, at_most=2**60), default=None),
            checkpoint_seconds=reader.read("NAS_CHECKPOINT_SECONDS", _seconds(at_most=86400), default=60.0),
            num_cpus=reader.read("NAS_NUM_CPUS", _integer(at_least=1, at_most=4096), default=None),
            num_gpus=reader.read("NAS_NUM_GPUS", _integer(at_least=0, at_most=4096), default=None),
            migrate=reader.read("NAS_MIGRATE", _switch, default=True),
            allowed_hosts=reader.read("NAS_ALLOWED_HOSTS", _host_names, default=()),
            requests_per_second=reader.read("NAS_REQUESTS_PER_SECOND", _requests_per_second, default=50.0),
            lease_seconds=reader.read("NAS_LEASE_SECONDS", _seconds(at_most=3600), default=10.0),
            log_format=reader.read("NAS_LOG_FORMAT", _log_format, default=None),
            log_level=reader.read("NAS_LOG_LEVEL", _log_level, default="INFO"),
            metrics_port=reader.read("NAS_METRICS_PORT", _integer(at_least=1, at_most=65535), default=None),
            log_days=reader.read("NAS_LOG_DAYS", _integer(at_least=1, at_most=36500), default=30),
            max_log_bytes=reader.read("NAS_MAX_LOG_BYTES", _integer(at_least=2**20, at_most=2**50), default=2**30),
            event_days=reader.read("NAS_EVENT_DAYS", _integer(at_least=1, at_most=36500), default=365),
            attempt_lease_seconds=reader.read("NAS_ATTEMPT_LEASE_SECONDS", _seconds(at_most=3600), default=60.0),
        )
        if reader.problems:
            raise InvalidSpec(*reader.problems)
        return settings

    @property
    def prepared_folder(self) -> Path:
        """What is computed once per teacher, corpus and recipe, shared by searches."""
        return self.data_folder / "prepared"

    @property
    def searches_folder(self) -> Path:
        """One folder per search: checkpoints of its trials, its winner's bundle."""
        return self.data_folder / "searches"

    @property
    def registry_folder(self) -> Path:
        """Tasks copied in, teachers and corpora fetched."""
        return self.data_folder / "registry"


_URLS = ("NAS_DATABASE_URL", "NAS_SHARED")


class _Expected(Exception):
    """What a variable should have held; the reader adds its name and what it held."""


class _Reader:
    """Reads variables and gathers their problems, so that all are reported at once."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.problems: list[Problem] = []

    def read(self, name: str, parse: Callable[[str], T], *, default: T) -> T:
        try:
            text = self.environment.get(name, "").strip() or self._read_file(name)
        except _Expected as error:
            self.problems.append(Problem(field=f"{name}_FILE", expected=str(error), got=repr(self.environment[f"{name}_FILE"])))
            return default
        if not text:
            return default
        try:
            return parse(text)
        except _Expected as error:
            # A URL may hold a password: what came is then named by its scheme alone.
            got = text.split(":", 1)[0] + ":..." if name in _URLS else repr(text)
            self.problems.append(Problem(field=name, expected=str(error), got=got))
            return default

    def _read_file(self, name: str) -> str:
        """What may hold a password may lie in a file: that is how secrets come into a container."""
        path = self.environment.get(f"{name}_FILE", "").strip() if name in _URLS else ""
        if not path:
            return ""
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise _Expected("a file that can be read") from error


def _folder(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise _Expected("a folder")
    return path


def _database_url(text: str) -> str:
    if text.startswith("sqlite:///") and len(text) > len("sqlite:///") and ":memory:" not in text:
        return text
    if text.startswith(("postgresql://", "postgresql+psycopg://")):
        return text
    raise _Expected("sqlite:///FILE or postgresql://USER@HOST/NAME")


def _shared_url(text: str) -> str:
    scheme, _, rest = text.partition("://")
    # Keys belong into the environment or the node's role, where no log shows them.
    if "@" in rest or not (rest.startswith("/") if scheme == "file" else scheme == "s3" and rest.strip("/")):
        raise _Expected("file:///FOLDER or s3://BUCKET/PREFIX, without keys")
    return text.rstrip("/")


def _user_cache(environment: Mapping[str, str]) -> Path:
    """Where programs keep what they can make again (XDG base directories)."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise _Expected("0 or 1")
    return text == "1"


def _host(text: str) -> str:
    if "/" in text or any(character.isspace() for character in text):
        raise _Expected("a host name or an address to listen on")
    return text


def _host_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip().lower() for name in text.split(",") if name.strip())
    # A port or a wildcard would never match, and would seem to.
    if not all(_HOST_NAME.fullmatch(name) for name in names):
        raise _Expected("host names or addresses without ports, separated by commas")
    return names


def _requests_per_second(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = float("nan")
    if not 0.1 <= rate <= 1e6:
        raise _Expected("a number from 0.1 to 1000000")
    return rate


def _executor(text: str) -> Literal["ray", "local"]:
    match text:
        case "ray":
            return "ray"
        case "local":
            return "local"
    raise _Expected("ray or local")


def _log_format(text: str) -> Literal["json", "text"]:
    match text:
        case "json":
            return "json"
        case "text":
            return "text"
    raise _Expected("json or text")


def _log_level(text: str) -> str:
    if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise _Expected("debug, info, warning or error")
    return text.upper()


def _integer(*, at_least: int, at_most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        # isascii: int() also takes other digits, signs and underscores.
        if not (text.isascii() and text.isdigit() and at_least <= int(text) <= at_most):
            raise _Expected(f"an integer from {at_least} to {at_most}")
        return int(text)

    return parse


def _seconds(*, at_most: float) -> Callable[[str], float]:
    """From 1 on: below that a busy machine loses its leases by being slow."""

    def parse(text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            seconds = float("nan")
        if not 1.0 <= seconds <= at_most:
            raise _Expected(f"seconds from 1 to {at_most:g}")
        return seconds

    return parse
