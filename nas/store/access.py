"""Projects, and the keys and sessions that open them. A secret is told once and kept as its digest.

It says whose a key is; what a scope allows is decided in `api/auth.py`. What the checks of a request read is one row by its primary key.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import RowMapping, delete, insert, or_, select, update

from nas.errors import Conflict, InvalidSpec, KeyRefused, NotFound, Problem, StoreUnavailable
from nas.store.database import Database
from nas.store.quotas import Quotas, Usage, read_quotas, read_usage
from nas.store.records import utc_now
from nas.store.tables import api_keys, projects, sessions

logger = logging.getLogger(__name__)

SCOPES: Final = ("read", "submit", "admin")
"""read: look at the project's searches; submit: start and change them; admin: the metrics of all. Each includes those before it."""

LAST_USED_SECONDS = 60.0
"""How old the stored time of a key's last use may be: not every request writes."""

_PROJECT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_KEY = re.compile(r"(nas_[0-9a-f]{12})_[A-Za-z0-9_-]{43}", re.ASCII)
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectRecord:
    """A tenant: it sees its own searches and nobody else's."""

    name: str
    quotas: Quotas
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """An API key without its secret."""

    id: str
    """The first part of the key, which may be shown: `nas_1f2e3d4c5b6a`."""
    project: str
    name: str
    """What it is for, in the operator's words."""
    scopes: frozenset[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    """To a minute."""


class Access(Database):
    """Make and list projects, set their quotas; make, list, revoke and check keys; begin, check and end sessions."""

    def create_project(self, name: str, *, quotas: Quotas | None = None) -> ProjectRecord:
        """
        Raises:
            InvalidSpec: the name is none. Conflict: it is taken.
        """
        if not _PROJECT.fullmatch(name):
            raise InvalidSpec(Problem(field="project", expected="1 to 63 of a-z, 0-9 and -, not - first", got=repr(name)))
        row = {"name": name, "created_at": utc_now(), **asdict(quotas or Quotas())}
        with self.write(fence=None) as connection:
            if connection.execute(self.insert_if_new(projects).values(row).returning(projects.c.name)).first() is None:
                raise Conflict(f"project {name!r}: expected a new name, got one that is taken")
            return _project(connection.execute(select(projects).where(projects.c.name == name)).mappings().one())

    def list_projects(self) -> list[tuple[ProjectRecord, Usage]]:
        """Every project by name, with what it uses now."""
        with self.read() as connection:
            found = [_project(row) for row in connection.execute(select(projects).order_by(projects.c.name)).mappings()]
            return [(project, read_usage(connection, project.name)) for project in found]

    def get_project(self, name: str) -> tuple[ProjectRecord, Usage]:
        """A project, and what it uses now. Raises NotFound."""
        with self.read() as connection:
            row = connection.execute(select(projects).where(projects.c.name == name)).mappings().one_or_none()
            if row is None:
                raise _no_project(name)
            return _project(row), read_usage(connection, name)

    def set_quotas(self, name: str, quotas: Quotas) -> ProjectRecord:
        """New limits from now on; what runs goes on. Raises NotFound."""
        with self.write(fence=None) as connection:
            change = update(projects).where(projects.c.name == name).values(asdict(quotas)).returning(*projects.c)
            row = connection.execute(change).mappings().one_or_none()
        if row is None:
            raise _no_project(name)
        return _project(row)

    def create_key(self, *, project: str, name: str, scopes: Collection[str], expires_at: datetime | None = None) -> tuple[KeyRecord, str]:
        """A key and its secret, which cannot be had again.

        Raises:
            InvalidSpec: an unknown scope, or none. NotFound: no such project.
        """
        if not scopes or not set(scopes) <= set(SCOPES):
            raise InvalidSpec(Problem(field="scopes", expected=f"one or more of {', '.join(SCOPES)}", got=", ".join(scopes) or "none"))
        key_id = f"nas_{secrets.token_hex(6)}"
        secret = f"{key_id}_{secrets.token_urlsafe(32)}"
        row = {
            "id": key_id,
            "project": project,
            "name": name,
            "scopes": SCOPES[: 1 + max(SCOPES.index(scope) for scope in scopes)],
            "digest": _digest(secret),
            "created_at": utc_now(),
            "expires_at": expires_at,
        }
        with self.write(fence=None) as connection:
            if connection.execute(select(projects.c.name).where(projects.c.name == project)).first() is None:
                raise _no_project(project)
            made = connection.execute(insert(api_keys).values(row).returning(*api_keys.c)).mappings().one()
        return _key(made), secret

    def list_keys(self, *, project: str | None = None) -> list[KeyRecord]:
        """Keys of one project or of all, revoked and expired ones among them, the oldest first."""
        query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        if project is not None:
            query = query.where(api_keys.c.project == project)
        with self.read() as connection:
            return [_key(row) for row in connection.execute(query).mappings()]

    def revoke_key(self, key_id: str) -> KeyRecord:
        """From now on the key and its sessions open nothing; again is no error. Raises NotFound."""
        with self.write(fence=None) as connection:
            connection.execute(update(api_keys).where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None)).values(revoked_at=utc_now()))
            connection.execute(delete(sessions).where(sessions.c.key_id == key_id))
            row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).mappings().one_or_none()
        if row is None:
            raise NotFound(f"key: expected the id of one, such as nas_1f2e3d4c5b6a, got {key_id!r}")
        return _key(row)

    def has_keys(self) -> bool:
        """Whether a key was ever made: revoked and expired ones count, so that a service never opens by itself."""
        with self.read() as connection:
            return connection.execute(select(api_keys.c.id).limit(1)).first() is not None

    def authenticate_key(self, text: str) -> KeyRecord:
        """Whose key this is.

        Raises:
            KeyRefused: not a key of ours, revoked, or expired.
        """
        match = _KEY.fullmatch(text)
        if match is None:
            raise KeyRefused("the API key is not one of this service")
        with self.read() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.id == match[1])).mappings().one_or_none()
        # The same work whether or not there is such a key.
        is_right = hmac.compare_digest(_digest(text), row["digest"] if row else _NO_DIGEST)
        if row is None or not is_right:
            raise KeyRefused("the API key is not one of this service")
        key = _key(row)
        _check_validity(key)
        self._touch(key)
        return key

    def begin_session(self, key: KeyRecord, *, seconds: float) -> str:
        """A session of a key that was authenticated, for a browser's cookie: its secret. It ends with its key at the latest."""
        token, now = secrets.token_urlsafe(32), utc_now()
        with self.write(fence=None) as connection:
            connection.execute(delete(sessions).where(sessions.c.expires_at <= now))
            connection.execute(insert(sessions).values(digest=_digest(token), key_id=key.id, expires_at=now + timedelta(seconds=seconds)))
        return token

    def authenticate_session(self, token: str) -> KeyRecord:
        """Whose session this is.

        Raises:
            KeyRefused: there is none, it is over, or its key is.
        """
        query = select(api_keys, sessions.c.expires_at.label("session_expires_at")).join(sessions, sessions.c.key_id == api_keys.c.id)
        with self.read() as connection:
            row = connection.execute(query.where(sessions.c.digest == _digest(token))).mappings().one_or_none()
        if row is None or row["session_expires_at"] <= utc_now():
            raise KeyRefused("the session is over; log in again")
        key = _key({name: value for name, value in row.items() if name != "session_expires_at"})
        _check_validity(key)
        self._touch(key)
        return key

    def end_session(self, token: str) -> None:
        """Log out; nothing happens if it was over."""
        with self.write(fence=None) as connection:
            connection.execute(delete(sessions).where(sessions.c.digest == _digest(token)))

    def _touch(self, key: KeyRecord) -> None:
        now = utc_now()
        before = now - timedelta(seconds=LAST_USED_SECONDS)
        if key.last_used_at is not None and key.last_used_at > before:
            return
        is_old = or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at <= before)
        try:
            with self.write(fence=None) as connection:
                connection.execute(update(api_keys).where(api_keys.c.id == key.id, is_old).values(last_used_at=now))
        except StoreUnavailable as error:  # a full disk keeps nobody from reading
            logger.warning("the time of a key's last use cannot be written", extra={"action": "touch_key", "key": key.id}, exc_info=error)


def _check_validity(key: KeyRecord) -> None:
    if key.revoked_at is not None:
        raise KeyRefused(f"the API key {key.id} was revoked")
    if key.expires_at is not None and key.expires_at <= utc_now():
        raise KeyRefused(f"the API key {key.id} has expired")


def _digest(secret: str) -> str:
    # The secret is 256 random bits: a slow hash would protect nothing, and every request would pay for it.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _project(row: RowMapping) -> ProjectRecord:
    return ProjectRecord(name=row["name"], created_at=row["created_at"], quotas=read_quotas(row))


def _key(row: Any) -> KeyRecord:
    values = {name: value for name, value in row.items() if name != "digest"}
    return KeyRecord(**values | {"scopes": frozenset(row["scopes"])})


def _no_project(name: str) -> NotFound:
    return NotFound(f"project: expected the name of one (see `nas projects list`), got {name!r}")
