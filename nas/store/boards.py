"""Leaderboards: the facts of a board and its rows, by version.

A board is stored whole as the controller makes it, and only rows that changed are written. What was replaced stays readable for a while
(`KEPT_SECONDS`), so that whoever pages through a version sees that one to its end, however often the controller writes meanwhile. Nothing is
computed when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Select, bindparam, delete, func, insert, select, tuple_, update

from nas.errors import Outdated
from nas.store.database import Database, NotJson, dump_json
from nas.store.machines import Fence
from nas.store.records import Json, TrialState, utc_now
from nas.store.searches import write_event
from nas.store.tables import CURRENT, board_heads, board_rows, searches, trials

KEPT_SECONDS = 300.0
"""How long a version can still be read after the next one has come."""

_LAST = 1e308
"""Stands for a missing number where rows are sorted: it comes last."""
_RANKED, _LOWEST = 0, 1000
"""Tiers: ranked rows first, then by rung, the deepest first."""

_KEYS: Mapping[str, tuple[ColumnElement[Any], ...]] = {
    "rank": (board_rows.c.tier, board_rows.c.place, board_rows.c.number),
    "score": (board_rows.c.loss_of_score, board_rows.c.number),
    "kl": (board_rows.c.kl, board_rows.c.number),
    "parameters": (board_rows.c.parameters, board_rows.c.number),
}


BoardSort = Literal["rank", "score", "kl", "parameters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardQuery:
    """Which rows of a leaderboard, in which order."""

    budget: int = 0
    """Index among the search's budgets."""
    sort: BoardSort = "rank"
    """`rank` is the board's own order; `score` has the best first, the others the smallest. Rows without a value come last."""
    descending: bool = False
    """The other way round."""
    state: TrialState | None = None
    rung: int | None = None
    """Deepest finished rung."""
    pareto: bool | None = None
    min_parameters: int | None = None
    max_parameters: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardPage:
    """Some rows of one version of a leaderboard."""

    version: int
    rows: list[Json]
    end: tuple[float, ...] | None
    """Where the page ends, for the next one; None on the last page."""


class Boards(Database):
    """Write a leaderboard, read pages of it. What takes a `fence` raises Fenced when it is stale; what takes an id raises NotFound."""

    def save_board(self, search_id: str, board: Json, *, fence: Fence | None, data: Json | None = None) -> None:
        """Replace the leaderboard; event `leaderboard.changed` with the (small) data. The event's sequence is the board's version.

        Args:
            board: `workers.board.make_board`: facts, `rows` in their order, and the same of each further budget in `more_budgets`.
        """
        head, rows = _split(board)
        with self.write(fence=fence) as connection:
            version = write_event(connection, search_id, "leaderboard.changed", data or {}).sequence
            stored = connection.execute(select(board_rows.c.number, board_rows.c.digest).where(*_newest(search_id)))
            there = {row.number: row.digest for row in stored}
            changed = [row for row in rows if there.pop(row["number"], None) != row["digest"]]
            replaced = [*there, *(row["number"] for row in changed)]
            if replaced:
                ends = update(board_rows).where(*_newest(search_id), board_rows.c.number == bindparam("of_number")).values(until=version)
                connection.execute(ends, [{"of_number": number} for number in replaced])
            if changed:
                connection.execute(insert(board_rows), [{**row, "search_id": search_id, "since": version, "until": CURRENT} for row in changed])
            connection.execute(insert(board_heads).values(search_id=search_id, version=version, head=head, created_at=utc_now()))
            connection.execute(update(searches).where(searches.c.id == search_id).values(board_version=version))
            _forget(connection, search_id)

    def get_board_head(self, search_id: str, *, version: int) -> Json:
        """The facts of one version of a board.

        Raises:
            Outdated: it is not kept any more.
        """
        with self.read() as connection:
            return _head(connection, search_id, version)

    def leaderboard_page(self, search_id: str, *, version: int, query: BoardQuery, after: Sequence[float] | None = None, limit: int) -> BoardPage:
        """Rows of one version of a board behind a position; its cost depends on `limit`, not on the rows before it.

        Args:
            after: `BoardPage.end` of the page before; of another version it is the place where that row would be.
        Raises:
            Outdated: the version is not kept any more.
        """
        keys = _KEYS[query.sort]
        wanted = select(*keys, board_rows.c.row).where(*_visible(search_id, version), board_rows.c.budget == query.budget, *_filters(query))
        if after is not None:
            position = tuple_(*after)
            wanted = wanted.where(tuple_(*keys) < position if query.descending else tuple_(*keys) > position)
        wanted = wanted.order_by(*(key.desc() if query.descending else key for key in keys)).limit(limit + 1)
        with self.read() as connection:
            found = connection.execute(wanted).all()
            # Asked last: as long as the version is there now, its rows were there when they were read.
            _head_exists(connection, search_id, version)
        rows = [json.loads(row[-1]) for row in found[:limit]]
        return BoardPage(version=version, rows=rows, end=tuple(found[limit - 1][:-1]) if len(found) > limit else None)

    def board_rows(self, search_id: str, *, version: int, numbers: Sequence[int]) -> dict[int, Json]:
        """Rows of some trials, of any budget, as far as the board has them."""
        with self.read() as connection:
            return _rows_of(connection, _visible(search_id, version), numbers)

    def board_sample(self, search_id: str, *, version: int, budget: int, most: int) -> list[Json]:
        """What a figure draws of a board of any length: the best `most` rows, as many trials spread evenly over their numbers, and the front."""
        place = (board_rows.c.tier, board_rows.c.place, board_rows.c.number)
        visible = (*_visible(search_id, version), board_rows.c.budget == budget)
        wanted = select(*place, board_rows.c.row).where(*visible).order_by(*place)
        with self.read() as connection:
            highest = connection.execute(select(func.max(board_rows.c.number)).where(board_rows.c.search_id == search_id)).scalar() or 0
            spread = range(0, highest + 1, -(-(highest + 1) // most))
            parts = (wanted.limit(most), wanted.where(board_rows.c.is_pareto).limit(most), wanted.where(board_rows.c.number.in_(spread)))
            found = {row.number: row for part in parts for row in connection.execute(part)}
        return [json.loads(row.row) for row in sorted(found.values(), key=lambda row: tuple(row)[:3])]

    def confirmed_rows(self, search_id: str, *, version: int, budget: int, limit: int) -> list[Json]:
        """The first rows that the confirm step has measured, in the board's order."""
        visible = (*_visible(search_id, version), board_rows.c.budget == budget, board_rows.c.is_confirmed)
        wanted = select(board_rows.c.row).where(*visible).order_by(*_KEYS["rank"]).limit(limit)
        with self.read() as connection:
            return [json.loads(row) for row in connection.execute(wanted).scalars()]

    def shared_shapes(self, first: str, second: str, *, limit: int) -> list[tuple[Json, Json]]:
        """Rows of two boards (of their first budgets, as they are now) that have the same shape, in the order of the first one."""
        keys = select(trials.c.shape_key, trials.c.number)
        with self.read() as connection:
            theirs = {row.shape_key: row.number for row in connection.execute(keys.where(trials.c.search_id == second, trials.c.budget == 0))}
            ours = {number: theirs[key] for key, number in connection.execute(keys.where(trials.c.search_id == first)) if key in theirs}
            order = select(board_rows.c.number).where(*_newest(first), board_rows.c.budget == 0).order_by(*_KEYS["rank"])
            pairs = [(number, ours[number]) for number in connection.execute(order).scalars() if number in ours][:limit]
            rows = [_rows_of(connection, _newest(search_id), numbers) for search_id, numbers in zip((first, second), zip(*pairs, strict=True), strict=False)]
        return [(rows[0][one], rows[1][other]) for one, other in pairs if other in rows[1]]

    def whole_board(self, search_id: str) -> Json | None:
        """The newest board as `save_board` got it, with all its rows; None before the first one."""
        with self.read() as connection:
            version = connection.execute(select(searches.c.board_version).where(searches.c.id == search_id)).scalar_one_or_none()
            if version is None:
                return None
            boards = _boards(_head(connection, search_id, version))
            wanted = select(board_rows.c.budget, board_rows.c.row).where(*_visible(search_id, version)).order_by(*_KEYS["rank"])
            rows: dict[int, list[Json]] = {}
            for budget, row in connection.execute(wanted):
                rows.setdefault(budget, []).append(json.loads(row))
        whole = [{**{name: value for name, value in board.items() if name != "of_rows"}, "rows": rows.get(budget, [])} for budget, board in enumerate(boards)]
        return {**whole[0], "more_budgets": whole[1:]} if len(whole) > 1 else whole[0]


def _newest(search_id: str) -> tuple[ColumnElement[bool], ...]:
    return board_rows.c.search_id == search_id, board_rows.c.until == CURRENT


def _visible(search_id: str, version: int) -> tuple[ColumnElement[bool], ...]:
    return board_rows.c.search_id == search_id, board_rows.c.since <= version, board_rows.c.until > version


def _rows_of(connection: Connection, visible: Sequence[ColumnElement[bool]], numbers: Collection[int]) -> dict[int, Json]:
    wanted = select(board_rows.c.number, board_rows.c.row).where(*visible, board_rows.c.number.in_(numbers))
    return {number: json.loads(row) for number, row in connection.execute(wanted)}


def _filters(query: BoardQuery) -> Iterator[ColumnElement[bool]]:
    if query.state is not None:
        yield board_rows.c.state == query.state
    if query.rung is not None:
        yield board_rows.c.rung == query.rung
    if query.pareto is not None:
        yield board_rows.c.is_pareto if query.pareto else board_rows.c.is_pareto.is_(False)
    if query.min_parameters is not None:
        yield board_rows.c.parameters >= query.min_parameters
    if query.max_parameters is not None:
        yield board_rows.c.parameters <= query.max_parameters


def _head_query(search_id: str, version: int, *columns: ColumnElement[Any]) -> Select[Any]:
    return select(*columns).where(board_heads.c.search_id == search_id, board_heads.c.version == version)


def _head(connection: Connection, search_id: str, version: int) -> Json:
    row = connection.execute(_head_query(search_id, version, board_heads.c.head)).one_or_none()
    if row is None:
        raise Outdated(f"leaderboard of {search_id}: expected a version that is still kept, got {version}; begin again with the first page")
    head: Json = row.head
    return head


def _head_exists(connection: Connection, search_id: str, version: int) -> None:
    if connection.execute(_head_query(search_id, version, board_heads.c.version)).first() is None:
        _head(connection, search_id, version)


def _forget(connection: Connection, search_id: str) -> None:
    """Versions that were replaced longer ago than KEPT_SECONDS."""
    ours = board_heads.c.search_id == search_id
    cutoff = utc_now() - timedelta(seconds=KEPT_SECONDS)
    oldest = connection.execute(select(func.max(board_heads.c.version)).where(ours, board_heads.c.created_at <= cutoff)).scalar()
    if oldest is not None:
        gone = connection.execute(delete(board_heads).where(ours, board_heads.c.version < oldest)).rowcount
        if gone:
            connection.execute(delete(board_rows).where(board_rows.c.search_id == search_id, board_rows.c.until <= oldest))


def _boards(board: Json) -> list[Json]:
    """One for each budget, the first with the facts of the search."""
    first = {name: value for name, value in board.items() if name != "more_budgets"}
    return [first, *board.get("more_budgets", ())]


def _split(board: Json) -> tuple[Json, list[Json]]:
    """The facts of a board, and its rows as they are stored. Of the rows as a whole the facts have `of_rows`: how many, their costs, the leader's."""
    try:
        boards = _boards(board)
        heads = [{**{name: value for name, value in one.items() if name != "rows"}, "of_rows": _of_rows(one)} for one in boards]
        head = {**heads[0], "more_budgets": heads[1:]} if len(heads) > 1 else heads[0]
        rows = [row for budget, one in enumerate(boards) for row in _stored_rows(one, budget=budget)]
    except NotJson:
        dump_json(board)  # says where in the whole board
        raise
    return head, rows


def _of_rows(board: Json) -> Json:
    rows = board.get("rows", ())
    leader = board.get("leader", board.get("winner"))
    found = next((row for row in rows if row["number"] == leader), None)
    return {
        "num_rows": len(rows),
        "costs": list(dict.fromkeys(name for row in rows for name in row.get("costs", ()))),
        "leader": None if found is None else {name: value for name, value in found.items() if name != "confirmation"},
    }


def _stored_rows(board: Json, *, budget: int) -> Iterator[Json]:
    pareto = frozenset(board.get("pareto", ()))
    for place, row in enumerate(board.get("rows", ())):
        text, kl = dump_json(row), _or_last(row["kl"])
        is_ranked = row["rank"] is not None
        stored = {
            "number": row["number"],
            "budget": budget,
            "tier": _RANKED if is_ranked else _LOWEST - row["rung"],
            "place": float(place) if is_ranked else kl,
            "loss_of_score": _LAST if row["score"] is None else -row["score"],
            "kl": kl,
            "parameters": row["parameters"],
            "rung": row["rung"],
            "state": row["state"],
            "is_pareto": row["number"] in pareto,
            "is_confirmed": bool((row.get("confirmation") or {}).get("held_out")),
        }
        digest = hashlib.blake2b(json.dumps(stored).encode() + text.encode(), digest_size=16).hexdigest()
        yield {**stored, "digest": digest, "row": text}


def _or_last(value: float | None) -> float:
    return _LAST if value is None else value
