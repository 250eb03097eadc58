from __future__ import annotations

from pathlib import Path
from typing import Any

from nas.settings import Settings
from workers.cleaning import CLEAN_SECONDS, Cleaning


class Store:
    """Holds so many rows that the clean-up takes several rounds."""

    def __init__(self) -> None:
        self.logs, self.events, self.keys, self.num_calls = [3, 2], [1], [7, 500, 500], 0
        self.asked: dict[str, int] = {}

    def search_ids(self) -> set[str]:
        return set()

    def drop_old_logs(self, **limits: int) -> int:
        self.num_calls += 1
        self.asked |= limits
        return self.logs.pop() if self.logs else 0

    def drop_old_events(self, *, days: int) -> int:
        self.asked["event_days"] = days
        return self.events.pop() if self.events else 0

    def drop_old_keys(self) -> int:
        return self.keys.pop() if self.keys else 0


def test_a_round_removes_a_little_until_nothing_is_left_and_then_rests(tmp_path: Path) -> None:
    store: Any = Store()
    now = [0.0]
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path), "NAS_LOG_DAYS": "7", "NAS_EVENT_DAYS": "8"})
    cleaning = Cleaning(store=store, settings=settings, clock=lambda: now[0])

    for _ in range(10):
        cleaning.go_on()
    assert store.num_calls == 4
    assert store.keys == []
    assert store.asked == {"days": 7, "max_bytes": settings.max_log_bytes, "event_days": 8}

    now[0] += CLEAN_SECONDS
    cleaning.go_on()
    cleaning.go_on()
    assert store.num_calls == 5
