"""Who may write what: controllers share the searches by leases, one for each, with fencing tokens that only ever grow.

The lease decides who *starts* to write for a search; the token decides whose writes count. So a controller that was paused
beyond its lease does no harm: its next write is refused (`Fenced`).

Time is the database's, because the hosts of two controllers may disagree. SQLite has no clock but its one host's, whose
calendar may be set at any moment; the seconds since boot are the same for all its processes and never jump.
"""

from __future__ import annotations

from dataclasses import asdict

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, extract, func, insert, or_, select, update

from nas.store.database import Database
from nas.store.host_clock import seconds_since_boot
from nas.store.machines import ControllerRecord, Fence, LeaseRecord
from nas.store.records import utc_now
from nas.store.tables import controllers, leadership, leases


class Leases(Database):
    """Claim, renew and release leases; say that a controller lives."""

    def claim(self, name: str, *, owner: str, seconds: float) -> Fence | None:
        """Hold a lease from now on, under a new token; None while another owner's lives, or somebody writes under it at this moment."""
        with self.write(fence=None) as connection:
            connection.execute(self.insert_if_new(leases).values(name=name, owner=None, token=0, expires_at_seconds=0.0, length_seconds=0.0))
            now = self._now(connection)
            is_free = or_(leases.c.owner.is_(None), leases.c.owner == owner, ~_lives(leases, now))
            # Not waiting for whoever has locked the row: it may be a process that hangs.
            free = select(leases.c.name).where(leases.c.name == name, is_free).with_for_update(skip_locked=True)
            if connection.execute(free).first() is None:
                return None
            claim = (
                update(leases)
                .where(leases.c.name == name)
                .values(owner=owner, token=leases.c.token + 1, expires_at_seconds=now + seconds, length_seconds=seconds)
                .returning(leases.c.token)
            )
            return Fence(name=name, token=connection.execute(claim).scalar_one())

    def release(self, fence: Fence) -> None:
        """Let another claim at once; writes under this fence are refused from here on. Nothing happens if it was lost already."""
        with self.write(fence=None) as connection:
            connection.execute(update(leases).where(leases.c.name == fence.name, leases.c.token == fence.token).values(_FREE))

    def renew(self, controller: ControllerRecord, *, seconds: float) -> list[Fence]:
        """Say that this controller lives, and hold all its leases for longer; what it does not return is lost. One that expired and nobody claimed is renewed.

        The controllers whose time is over are forgotten.
        """
        with self.write(fence=None) as connection:
            now = self._now(connection)
            until = {"expires_at_seconds": now + seconds, "length_seconds": seconds}
            over = select(controllers.c.owner).where(~_lives(controllers, now)).with_for_update(skip_locked=True)
            connection.execute(delete(controllers).where(or_(controllers.c.owner.in_(over), controllers.c.owner == controller.owner)))
            connection.execute(insert(controllers).values({**asdict(controller), **until}))
            renewal = update(leases).where(leases.c.owner == controller.owner).values(until).returning(leases.c.name, leases.c.token)
            return [Fence(name=name, token=token) for name, token in connection.execute(renewal)]

    def leave(self, owner: str) -> None:
        """Release all that this controller holds, and forget it."""
        with self.write(fence=None) as connection:
            connection.execute(delete(controllers).where(controllers.c.owner == owner))
            connection.execute(update(leases).where(leases.c.owner == owner).values(_FREE))

    def list_controllers(self) -> list[ControllerRecord]:
        """Those that live, by name."""
        names = [column for column in controllers.c if column.name not in ("expires_at_seconds", "length_seconds")]
        with self.read() as connection:
            query = select(*names).where(_lives(controllers, self._now(connection))).order_by(controllers.c.owner)
            return [ControllerRecord(**row) for row in connection.execute(query).mappings()]

    def list_leases(self) -> list[LeaseRecord]:
        """Those that somebody holds, by name."""
        with self.read() as connection:
            held = and_(leases.c.owner.is_not(None), _lives(leases, self._now(connection)))
            query = select(leases.c.name, leases.c.owner, leases.c.token).where(held).order_by(leases.c.name)
            return [LeaseRecord(**row) for row in connection.execute(query).mappings()]

    def retire_leadership(self) -> bool:
        """End the time in which one controller led everything: False while a controller of such a version leads, for ever True after that.

        So an old controller goes on until it is stopped, or dies, while new ones wait; and no old one leads beside them.
        """
        with self.write(fence=None) as connection:
            retired = leadership.c.owner == _RETIRED
            if connection.execute(select(leadership.c.name).where(retired)).first() is not None:
                return True
            free = or_(leadership.c.owner.is_(None), leadership.c.expires_at <= utc_now())
            never = utc_now().replace(year=9999)
            retire = update(leadership).where(free).values(owner=_RETIRED, token=leadership.c.token + 1, expires_at=never)
            return connection.execute(retire).rowcount == 1

    def _now(self, connection: Connection) -> float:
        if self.is_sqlite:
            return seconds_since_boot()
        return float(connection.execute(select(extract("epoch", func.clock_timestamp()))).scalar_one())


_RETIRED = "one lease for each search"
"""Owner of the old leadership once it is over."""
_FREE = {"owner": None, "token": leases.c.token + 1, "expires_at_seconds": 0.0}


def _lives(table: Table, now: float) -> ColumnElement[bool]:
    """Whether a row's time is not over. One that ends far later than its own length from now is of before a reboot, or before the clock was set back.

    (Not exactly its length: it may have been renewed since `now` was read.)
    """
    return and_(table.c.expires_at_seconds > now, table.c.expires_at_seconds <= now + 2 * table.c.length_seconds)
