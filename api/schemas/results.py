"""The winner, and two searches side by side."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import ConfigDict

from api.schemas.common import Answer
from api.schemas.searches import Cost
from nas.shape import Shape
from nas.store.records import BundleState, SearchState


class GapAnswer(Answer):
    """The second search's figure minus the first one's."""

    value: float
    standard_error: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    paired: bool
    """Whether it was taken document by document; otherwise it has the errors of both sides."""


class BothFigures(Answer):
    """One shape that is on both boards."""

    shape: Shape
    parameters: int
    first: dict[str, Any]
    """Its row on the first board: number, origin, rank, rung, tokens, score, standard_error, kl."""
    second: dict[str, Any]


class ComparisonAnswer(Answer):
    """Two searches side by side; every pair is (first, second)."""

    object: Literal["comparison"] = "comparison"
    searches: tuple[str, str]
    states: tuple[SearchState, SearchState]
    spec: dict[str, tuple[Any, Any]]
    """Fields of the spec that differ, by dotted path."""
    inputs: dict[str, tuple[str | None, str | None]]
    """Digests of teacher, corpora and tasks that differ, by kind and name."""
    documents: Literal["held_out", "search"]
    """held_out where both leaders were confirmed; search: the documents by which they were chosen, which flatters both."""
    other_documents: list[str]
    """Why the two were not scored on the same documents; empty: they were, and differences are paired."""
    best: tuple[dict[str, Any] | None, dict[str, Any] | None]
    """The leading rows."""
    tasks: dict[str, GapAnswer]
    """Leader against leader, by task that both scored with the same metric."""
    kl: GapAnswer | None
    """Of KL to the teacher, where that is the same."""
    shapes: list[BothFigures]
    """Shapes on both boards, in the order of the first; the first 500 of them."""
    cost: tuple[Cost, Cost]


class ImportancesAnswer(Answer):
    """How much each choice explains of what the shapes of a search lost."""

    object: Literal["importances"] = "importances"
    search: str
    budget: int
    importances: dict[str, float]
    """Share of the spread of log KL that each choice explains among the shapes measured at one rung (fANOVA), the largest first; empty before
    the search has its winner, and where too few shapes were measured."""


class WinnerAnswer(Answer):
    """The winning shape: its config, where it comes from, and what it scored."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    object: Literal["winner"] = "winner"
    search: str
    score: float | None
    """Of its row of the board, with its error; null on boards of an earlier version."""
    standard_error: float | None
    probability_best: float | None
    """That it has the best score of the finalists, from the held-out documents; null where it was the only one."""
    bundle_url: str
    """Where the bundle (a tar file) is downloaded."""
    bundle_sha256: str


class BundleAnswer(Answer):
    """The bundle of one trial: the winner's own, or one that was asked for."""

    object: Literal["bundle"] = "bundle"
    search: str
    trial: int
    state: BundleState
    """waiting: for a controller to pack it; packed; failed: asked for again, it is tried again."""
    requested_at: datetime | None
    """Null of a winner's, which nobody has to ask for."""
    finished_at: datetime | None
    sha256: str | None
    """Of the tar file, as the two below null until it is packed; also `/v1/artifacts/{sha256}`."""
    bytes: int | None
    """Null also of a winner of an earlier version."""
    bundle_url: str | None
    """Where the tar file is downloaded."""
    error: dict[str, Any] | None
    """Why the last try failed: reason, message, the last lines of its log; else null."""
