"""How fast workers are, by what a trial may use of one. A row without points is a wish to have it measured."""

from __future__ import annotations

from typing import Any

from sqlalchemy import RowMapping, select, update

from nas.store.database import Database
from nas.store.machines import Fence, SpeedRecord
from nas.store.records import utc_now
from nas.store.tables import speeds


class Speeds(Database):
    """Ask for a speed, answer, read. A worker is known by its resources: cores, GPUs and the dtype of the arithmetic."""

    def wish_speed(self, *, cpus: float, gpus: float, dtype: str) -> SpeedRecord:
        """What is known of such a worker; where nothing is, it is from now on to be measured."""
        key = _key(cpus=cpus, gpus=gpus, dtype=dtype)
        found = self._find_speed(key)
        if found is not None and found.error is None:
            return found
        row = {"key": key, "cpus": cpus, "gpus": gpus, "dtype": dtype, "points": None, "host": None, "error": None, "measured_at": None}
        with self.write(fence=None) as connection:
            if found is None:
                connection.execute(self.insert_if_new(speeds).values(row))
            else:  # what could not be measured then may be by now
                connection.execute(update(speeds).where(speeds.c.key == key).values(error=None))
        wished = self._find_speed(key)
        assert wished is not None
        return found or wished

    def wished_speeds(self) -> list[SpeedRecord]:
        """Those that were neither measured nor tried in vain."""
        with self.read() as connection:
            query = select(speeds).where(speeds.c.points.is_(None), speeds.c.error.is_(None)).order_by(speeds.c.key)
            return [_speed(row) for row in connection.execute(query).mappings()]

    def save_speed(self, key: str, *, points: list[dict[str, Any]] | None, host: str | None, error: str | None, fence: Fence | None) -> None:
        """The answer: its points, or why there are none."""
        with self.write(fence=fence) as connection:
            connection.execute(update(speeds).where(speeds.c.key == key).values(points=points, host=host, error=error, measured_at=utc_now()))

    def _find_speed(self, key: str) -> SpeedRecord | None:
        with self.read() as connection:
            row = connection.execute(select(speeds).where(speeds.c.key == key)).mappings().one_or_none()
        return None if row is None else _speed(row)


def _key(*, cpus: float, gpus: float, dtype: str) -> str:
    return f"cpus={cpus:g},gpus={gpus:g},{dtype}"


def _speed(row: RowMapping) -> SpeedRecord:
    return SpeedRecord(**row)
