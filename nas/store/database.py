"""Connections and transactions: engine, SQLite's settings, the fence check, migrations. It knows no tables but leases and boots.

SQLite: WAL, so that readers never wait; BEGIN IMMEDIATE for writes, so that a transaction cannot fail half-way for want of
the lock; synchronous=FULL, so that an acknowledged write survives a power cut and not only a killed process.
PostgreSQL: READ COMMITTED; whoever changes a search locks its row first.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Insert, Table, bindparam, create_engine, event, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, DontWrapMixin, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from nas.errors import Conflict, Fenced, InvalidSpec, Problem, StoreUnavailable
from nas.store.host_clock import read_boot_id, seconds_since_boot
from nas.store.machines import Fence
from nas.store.records import utc_now
from nas.store.tables import boots, leases

VERSION_TABLE = "nas_alembic_version"
"""Own name: Optuna keeps its `alembic_version` in whatever database it is given."""

_BUSY_SECONDS = 60.0
_LOOK_SECONDS = 0.001
"""Between two looks whether another process still writes to the SQLite file."""
_IDLE_SECONDS = 5.0
"""PostgreSQL ends a transaction in which nothing was asked for so long: its process hangs, or went with its machine, and others wait for its locks."""
_CONNECT_SECONDS = 5
"""A PostgreSQL that is not there is told after this long; the system's own patience is minutes."""
_MIGRATION_LOCK = 0x6E6173
"""Key of PostgreSQL's advisory lock under which one process at a time migrates."""


_BOOT = select(boots.c.began_at).where(boots.c.id == bindparam("boot"))


class NotJson(DontWrapMixin, ValueError):
    """A value that JSON cannot hold: not a number, infinite, or not a plain value."""


class Database:
    """An engine and its two kinds of transaction. Opening it touches nothing.

    Both raise StoreUnavailable where the database does not answer; then nothing was written, unless the commit itself broke.
    """

    def __init__(self, url: str) -> None:
        self.url = _parse_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._engine = _make_engine(self.url)
        # Both share the pool. READ COMMITTED gives every statement its own view, so a reader on PostgreSQL needs no BEGIN and no COMMIT, each a message there
        # and back; on SQLite a transaction is one view. A writer tells the begin hook what to begin with.
        self._read_engine = self._engine if self.is_sqlite else self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._write_engine = self._engine.execution_options(nas_begin="BEGIN IMMEDIATE")
        self._writers = threading.Lock()
        self._local = threading.local()
        """Of each thread that is inside of `together`: its connection."""

    @contextmanager
    def together(self) -> Iterator[Connection]:
        """One transaction around all that this thread reads and writes meanwhile: it is kept as a whole, or nothing of it."""
        with self.write(fence=None) as connection:
            self._local.connection = connection
            try:
                yield connection
            finally:
                del self._local.connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that reads; on PostgreSQL every statement sees what was committed before it."""
        if (outer := getattr(self._local, "connection", None)) is not None:
            yield outer
            return
        with _known_errors(), self._read_engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self, *, fence: Fence | None) -> Iterator[Connection]:
        """A transaction that writes, refused when the lease of `fence` has another token by now.

        The lease's row stays share-locked until the commit: nobody can take over between the check and the write.

        Raises:
            Fenced: another controller has claimed the lease, or this one has released it.
        """
        if (outer := getattr(self._local, "connection", None)) is not None:
            _check_fence(outer, fence)
            yield outer
            return
        with self._turn(), _known_errors(), self._write_engine.begin() as connection:
            _check_fence(connection, fence)
            yield connection

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread of this process after the other, where the database has one writer: SQLite itself looks again only after ever longer sleeps, up to a
        tenth of a second, while nobody writes.

        Raises:
            StoreUnavailable: the others took too long.
        """
        if not self.is_sqlite:
            yield
            return
        if not self._writers.acquire(timeout=_BUSY_SECONDS):
            raise StoreUnavailable("the database does not answer")
        try:
            yield
        finally:
            self._writers.release()

    def wall_time(self, connection: Connection) -> datetime:
        """The time by the database's clock, where it has one: the hosts that read and write it may disagree."""
        if self.is_sqlite:
            return utc_now()
        now = connection.execute(select(func.clock_timestamp())).scalar_one()
        assert isinstance(now, datetime)
        return now

    def steady_time(self, connection: Connection, *, is_kept: bool = False) -> datetime:
        """The time from which durations are told: by the database's clock; on SQLite by the seconds since boot, which no setting of the host's calendar moves.

        There it is the calendar's time when this boot was first asked about, and goes on from there; only between two boots nothing but the calendar tells.

        Args:
            is_kept: it is about to be stored, in a transaction that writes.
        """
        if not self.is_sqlite or (boot := read_boot_id()) is None:
            return self.wall_time(connection)
        now, since_boot = self.wall_time(connection), timedelta(seconds=seconds_since_boot())
        began_at = connection.execute(_BOOT, {"boot": boot}).scalar()
        if began_at is None and is_kept:
            connection.execute(self.insert_if_new(boots).values(id=boot, began_at=now - since_boot))
            began_at = connection.execute(_BOOT, {"boot": boot}).scalar()
        return now if began_at is None else began_at + since_boot

    def insert_if_new(self, table: Table) -> Insert:
        """An INSERT that does nothing where a unique key is taken; what it returns tells, its rowcount does not."""
        if self.is_sqlite:
            return sqlite.insert(table).on_conflict_do_nothing()
        return postgresql.insert(table).on_conflict_do_nothing()

    def migrate(self) -> None:
        """Bring the schema up to date. Safe when several processes do it at once; the others wait.

        Raises:
            Conflict: the database was written by a newer version.
        """
        # alembic costs a fifth of a second, and only the process that migrates needs it.
        from alembic import command
        from alembic.util import CommandError

        if self.is_sqlite:
            assert self.url.database is not None
            file = Path(self.url.database)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)  # SQLite would make it readable for every account of the machine; its other files get the same mode
            self._switch_to_wal()
        config = _alembic_config()
        with self._write_engine.begin() as connection:
            if not self.is_sqlite:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise Conflict(f"database schema: expected one that this version of nas knows, got another ({error}); use the newer nas") from error

    def schema_revisions(self) -> tuple[str | None, str]:
        """The schema's revision in the database, None where there is no schema yet, and the one that this version of nas works with."""
        from alembic.migration import MigrationContext
        from alembic.script import ScriptDirectory

        expected = ScriptDirectory.from_config(_alembic_config()).get_current_head()
        assert expected is not None
        if self.is_sqlite and not Path(self.url.database or "").exists():
            return None, expected  # looking would make the file
        with self.read() as connection:
            return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision(), expected

    def check_schema(self) -> None:
        """Refuse a schema of another version.

        Raises:
            Conflict: with both revisions, and what to do.
        """
        found, expected = self.schema_revisions()
        if found != expected:
            raise Conflict(
                f"database schema: expected revision {expected}, got {found or 'none'}; back up the database, stop the service, and run `nas migrate`"
            )

    def close(self) -> None:
        self._engine.dispose()

    def _switch_to_wal(self) -> None:
        """WAL is a property of the file, set once. SQLite's busy timeout does not cover the switch, hence the loop."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            connection = self._engine.raw_connection()
            try:
                connection.cursor().execute("PRAGMA journal_mode=WAL")
                return
            except self._engine.dialect.loaded_dbapi.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            finally:
                connection.close()
            time.sleep(0.02)


@contextmanager
def _known_errors() -> Iterator[None]:
    """A connection that is refused, lost or not to be had, as an error of ours. The driver's message may name the server: it is the cause, not the text."""
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        raise StoreUnavailable("the database does not answer") from error
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
        raise StoreUnavailable("the database ended the connection") from error


def _alembic_config() -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def _check_fence(connection: Connection, fence: Fence | None) -> None:
    if fence is not None:
        current = connection.execute(select(leases.c.token).where(leases.c.name == fence.name).with_for_update(read=True)).scalar_one_or_none()
        if current != fence.token:
            raise Fenced(f"lease {fence.name}: expected token {current}, got {fence.token}; another controller has it")


def _parse_url(text: str) -> URL:
    """The URL with its driver. Messages never repeat the URL: it may hold a password."""
    expected = "sqlite:///FILE or postgresql://USER@HOST/NAME"
    try:
        url = make_url(text)
    except ArgumentError:
        raise InvalidSpec(Problem(field="database_url", expected=expected, got="something that is no URL")) from None
    backend = url.get_backend_name()
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    # A database in memory would be another one for each connection.
    if backend == "sqlite" and url.database and ":memory:" not in url.database:
        return url.set(drivername="sqlite")
    raise InvalidSpec(Problem(field="database_url", expected=expected, got=f"{backend}: without a file" if backend == "sqlite" else f"{backend}:..."))


_KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 25_000}
"""A database whose machine is gone is noticed in half a minute, and not after hours of silence."""


def _make_engine(url: URL) -> Engine:
    # One for every thread of the API's pool (api/threads.py) and some for its feed; those beyond the size are closed after use, and opening one takes longer
    # than what is asked of it.
    make = partial(create_engine, url, pool_size=16, max_overflow=24, json_serializer=dump_json)
    if url.get_backend_name() != "sqlite":
        # pre_ping: a restart of the server costs a reconnect, not an error.
        options = f"-c idle_in_transaction_session_timeout={round(1000 * _IDLE_SECONDS)}"
        return make(pool_pre_ping=True, connect_args={"connect_timeout": _CONNECT_SECONDS, "options": options, **_KEEPALIVES})
    engine = make(connect_args={"timeout": _BUSY_SECONDS})
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(dbapi_connection: Any, _: Any) -> None:
    # The driver's own transactions begin late and DEFERRED; `_begin_sqlite` begins them instead.
    dbapi_connection.isolation_level = None
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    begin = connection.get_execution_options().get("nas_begin", "BEGIN")
    if begin == "BEGIN":
        connection.exec_driver_sql(begin)
        return
    driver: Any = connection.connection.driver_connection
    driver.execute("PRAGMA busy_timeout=0")
    try:
        if not _take_lock(driver, begin):
            connection.exec_driver_sql(begin)  # raises why not
    finally:
        driver.execute(f"PRAGMA busy_timeout={round(1000 * _BUSY_SECONDS)}")


def _take_lock(driver: Any, begin: str) -> bool:
    """Begin to write as soon as no other process does.

    Between two looks SQLite itself sleeps ever longer, up to a tenth of a second: beside a process that writes one transaction after the other it finds
    no gap for seconds. Of this process one thread looks, the others wait for their turn, and so it may look often.
    """
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            driver.execute(begin)
            return True
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                return False
        time.sleep(_LOOK_SECONDS)


def dump_json(value: Any) -> str:
    """The value as JSON text.

    Raises:
        NotJson: with the path of what JSON cannot hold.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        where = _find_not_json(value, "")
        raise NotJson(where or f"expected plain JSON values, got {error}") from error


def _find_not_json(value: Any, path: str) -> str | None:
    """The first number that is not finite, as `path: expected, got`."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path.removeprefix('.') or '(value)'}: expected a finite number, got {value}"
    if isinstance(value, dict):
        found = (_find_not_json(item, f"{path}.{key}") for key, item in value.items())
    elif isinstance(value, list | tuple):
        found = (_find_not_json(item, f"{path}.{index}") for index, item in enumerate(value))
    else:
        return None
    return next((problem for problem in found if problem), None)
