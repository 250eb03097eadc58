"""What a leaderboard is made of: plain values, and their JSON form. `nas/search/ranking.py` makes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from nas.search.seeds import SeedSpread


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCell:
    """One task of one row."""

    value: float
    standard_error: float
    higher_is_better: bool
    share: float
    """0: random weights, 1: the teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A row's score minus the best score, paired over the same documents. In the first tie group, and only there, the interval holds zero."""

    value: float
    standard_error: float
    low: float
    """Lower end of the 95 % interval."""
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One trial at its deepest rung."""

    rank: int | None
    """Place of the first row of its tie group (1, 1, 1, 4, ...); None below the last rung."""
    tie_group: int | None
    """1, 2, ... from the best; None below the last rung."""
    tied: bool
    """Whether others are in its tie group."""
    number: int
    origin: str
    is_control: bool
    shape: dict[str, int]
    parameters: int
    share_of_teacher: float
    rung: int
    tokens: int
    score: float | None
    """None at a rung that is scored on no task. Scores of different rungs are not comparable."""
    standard_error: float | None
    difference: Difference | None
    """To the row with the best score; None below the last rung."""
    kl: float
    kl_standard_error: float
    kl_by_rung: tuple[float, ...]
    """Held-out KL at each rung that it finished, rung 0 first."""
    loss: float
    tasks: dict[str, TaskCell]
    costs: dict[str, float]
    """Parameters, bytes, FLOPs per token and what else was measured of it (`RungResult.costs`)."""
    state: str
    verified: bool | None
    """Whether a fresh process proved the file to be the model that was scored; None for a trial that was not reloaded."""
    probability_best: float | None
    """Of a verified finalist, once all are confirmed: that it has the best score of them, from the held-out documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How well one order of the trials predicts another, over those that have both. Only promoted trials do, which lowers it."""

    first: str
    second: str
    tau: float | None
    """Kendall's tau-b, 1 for the same order (best to worst); None with fewer than three trials or an order that is all ties."""
    num_trials: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSummary:
    """Medians over the controls that reached the last rung."""

    num_trials: int
    score: float
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """A shape of the board trained again with another seed. It is not ranked: it measures the spread between seeds."""

    number: int
    seed: int
    """Of its data order."""
    state: str
    rung: int
    """The deepest that it finished."""
    kl_by_rung: tuple[float, ...]
    """Held-out KL at each rung that it finished, rung 0 first."""
    score: float | None
    """At the last rung."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """The leaderboard. `board_as_dict` is its JSON form."""

    rows: tuple[Row, ...]
    leader: int | None
    """Number of the first finalist until there is a winner, then the winner's."""
    finalists: tuple[int, ...]
    """Numbers of the trials among which the confirm step decides: of the first tie group with a trial that it has not refused, the first few."""
    winner: int | None
    """Number of the verified finalist with the best score on held-out documents; None until every finalist is confirmed."""
    pareto: tuple[int, ...]
    """Ranked trials that no other beats on score and costs (`pareto_front`); the cheapest first."""
    agreement: tuple[Agreement, ...]
    controls: ControlSummary | None
    seed_spread: float = 0.0
    """Standard deviation of KL between training seeds at the last rung, relative to KL."""
    seed_error: float = 0.0
    """That of the score, which every error of a score contains beside that over documents; 0 where too few trials tell how the score follows the KL."""
    seed_spreads: tuple[SeedSpread, ...] = ()
    """At each trained rung, the first first: the spread between seeds of what is compared there, and where the number comes from."""
    repeats: tuple[Repeat, ...] = ()


def board_as_dict(board: Board) -> dict[str, Any]:
    """Plain JSON values without NaN or infinity (they become null)."""
    values = _plain(board)
    assert isinstance(values, dict)
    return values


def _plain(value: Any) -> Any:
    if is_dataclass(value):  # `asdict` copies deeply, which takes most of the time of a large board
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
