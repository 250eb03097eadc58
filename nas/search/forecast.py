"""How long a running search still takes, from its own measured speed. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from nas.estimate import RungWork
from nas.spec import SearchSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RungLeft:
    """What is still to be done at one rung."""

    rung: int
    trials: int
    """Expected to come, where nobody is tied; more will where the share that goes on is not yet known to be full."""
    seconds_per_trial: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeLeft:
    """Of the search stage; the confirmation comes after it."""

    seconds: float
    """Wall seconds with as many trials at once as the spec allows."""
    rungs: tuple[RungLeft, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def time_left(spec: SearchSpec, *, work: Sequence[RungWork], seconds: Mapping[int, Sequence[Mapping[str, float]]]) -> TimeLeft | None:
    """The rungs' expected trials, less those that are through, at the median of what such a rung took.

    Where no trial has been through a rung yet, its training takes as long per token as below, and the rest of it as long as at the deepest rung so far:
    tasks that are scored there for the first time are not foreseen. None before a trained rung has told the speed.

    Args:
        seconds: rung -> `RungResult.seconds` of every trial that finished it; empty for one that was known from an earlier search, which tells no speed.
    """
    measured = {rung: [took for took in found if took] for rung, found in seconds.items()}
    trained = [(step, measured[step.rung]) for step in work if step.tokens and measured.get(step.rung)]
    if not trained:
        return None
    per_token = median(took.get("distil", 0.0) / step.tokens for step, found in trained for took in found)
    left, rest = [], 0.0
    for step in work:
        if found := measured.get(step.rung, ()):
            rest = median(sum(took.values()) - took.get("distil", 0.0) for took in found)
            each = median(sum(took.values()) for took in found)
        else:
            each = per_token * step.tokens + rest
        left.append(RungLeft(rung=step.rung, trials=max(0, step.expected - len(seconds.get(step.rung, ()))), seconds_per_trial=each))
    total = sum(rung.trials * rung.seconds_per_trial for rung in left)
    return TimeLeft(seconds=total / spec.resources.max_parallel_trials, rungs=tuple(left))
