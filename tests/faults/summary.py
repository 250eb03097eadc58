"""What the tests of faults counted, added up over all of them and told at the end of the run.

A test says it with pytest's `record_property`, which also comes from the processes of pytest-xdist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from tests.faults.history import History, count

RecordProperty = Callable[[str, object], None]

SCHEDULES, SECONDS, HAPPENED, KILLS, COUNTS = "faults.schedules", "faults.seconds", "faults.happened", "faults.kills", "faults.counts"

_totals: dict[str, Counter[str]] = {name: Counter() for name in (SCHEDULES, SECONDS, HAPPENED, KILLS, COUNTS)}


def record(record_property: RecordProperty, histories: list[History], *, kills: Mapping[str, int]) -> None:
    """Say what a test did to real processes (`controller on sqlite`: how often), and what the histories show. Fails where something was lost or doubled."""
    counted = count(histories)
    record_property(KILLS, dict(kills))  # plain: pytest-xdist carries nothing else
    record_property(COUNTS, asdict(counted))
    assert [history.losses() for history in histories if history.losses()] == []
    assert [history.repeats for history in histories if history.repeats] == []


def collect(properties: list[tuple[str, Any]]) -> None:
    """Take in what one test recorded."""
    for name, value in properties:
        if name in _totals:
            _totals[name].update(value)


def lines() -> list[str]:
    """The totals, where there are any."""
    schedules, seconds, counts = _totals[SCHEDULES], _totals[SECONDS], _totals[COUNTS]
    told = []
    if schedules:
        each = ", ".join(f"{number} {name}" for name, number in sorted(schedules.items()))
        told.append(
            f"schedules tried: {sum(schedules.values())} ({each}), {sum(schedules.values()) / max(sum(seconds.values()), 1e-9):.1f} a second and process"
        )
        told.append(f"in them: {_said(_totals[HAPPENED])}")
    if _totals[KILLS]:
        told.append(f"real processes: {_said(_totals[KILLS])}")
    if counts:
        told.append(f"histories: {_said(counts - Counter(lost=counts['lost'], doubled=counts['doubled']))}; lost {counts['lost']}, doubled {counts['doubled']}")
    return told


def _said(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counter.items()))
