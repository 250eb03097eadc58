"""Who may write: one controller at a time leads, under a lease with a fencing token that only ever grows.

The lease decides who *starts* to lead; the token decides whose writes count. So a controller that was paused beyond its
lease does no harm: its next write is refused (`Fenced`).
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import Connection, func, or_, select, update

from nas.store.database import CONTROLLER, Database
from nas.store.records import utc_now
from nas.store.tables import leadership


class Leadership(Database):
    """Claim, renew and release the leadership."""

    def claim_leadership(self, owner: str, *, seconds: float) -> int | None:
        """Lead from now on: a new token, or None while another owner's lease lives."""
        with self.write(fence=None) as connection:
            now = self._now(connection)
            is_free = or_(leadership.c.expires_at <= now, leadership.c.owner == owner)
            claim = (
                update(leadership)
                .where(leadership.c.name == CONTROLLER, is_free)
                .values(owner=owner, token=leadership.c.token + 1, expires_at=now + timedelta(seconds=seconds))
                .returning(leadership.c.token)
            )
            return connection.execute(claim).scalar_one_or_none()

    def renew_leadership(self, token: int, *, seconds: float) -> bool:
        """Lead for longer. False: the leadership is lost, whoever has it. An expired lease that nobody claimed is renewed."""
        with self.write(fence=None) as connection:
            until = self._now(connection) + timedelta(seconds=seconds)
            renewal = update(leadership).where(leadership.c.name == CONTROLLER, leadership.c.token == token).values(expires_at=until)
            return connection.execute(renewal).rowcount == 1

    def release_leadership(self, token: int) -> None:
        """Let another claim at once; this token's writes are refused from here on. Nothing happens if it was lost already."""
        with self.write(fence=None) as connection:
            release = (
                update(leadership)
                .where(leadership.c.name == CONTROLLER, leadership.c.token == token)
                .values(owner=None, token=token + 1, expires_at=self._now(connection))
            )
            connection.execute(release)

    def _now(self, connection: Connection) -> datetime:
        """The database's clock where it has one: the hosts of two controllers may disagree."""
        if self.is_sqlite:
            return utc_now()
        now = connection.execute(select(func.clock_timestamp())).scalar_one()
        assert isinstance(now, datetime)
        return now
