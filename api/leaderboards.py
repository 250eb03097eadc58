"""The leaderboard as the API and the pages show it: its facts, a page of its rows, the whole of it as a stream. Everything in it was computed when it was
stored; here it is only laid out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from api.cursors import decode_cursor, encode_cursor
from api.schemas.leaderboard import LeaderboardAnswer
from api.summary import describe_cost
from nas.errors import NotFound
from nas.store.boards import BoardPage, BoardQuery
from nas.store.records import Json, SearchRecord, all_winners
from nas.store.store import Store

BATCH_ROWS = 500
"""Rows that a stream holds in memory at once."""

SHAPE_FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts")

_NUMBER, _WHOLE = (int, float), (int,)
_KINDS: Mapping[str, tuple[tuple[type, ...], ...]] = {
    "rank": (_WHOLE, _NUMBER, _WHOLE),
    "score": (_NUMBER, _WHOLE),
    "kl": (_NUMBER, _WHOLE),
    "parameters": (_WHOLE, _WHOLE),
}
"""By order: what a position in it consists of."""


def of_budget(search: SearchRecord, budget: int) -> SearchRecord:
    """The search as if it had only this budget: its board, plan and winner. Cost, baselines and time are of the whole search.

    Raises:
        NotFound: the search has no such budget.
    """
    if budget > (more := len(search.spec.get("more_budgets", ()))):
        raise NotFound(f"budget: expected one of the search's, 0 to {more}, got {budget}")
    whole = dict(search.board or {})
    boards = [whole, *whole.pop("more_budgets", ())]
    board = {**whole, **boards[budget]} if budget < len(boards) else None
    plans = search.plan.get("budgets") or [{}]
    winner = next((winner for winner in all_winners(search) if winner["budget"] == budget), None)
    return replace(search, board=board or None, plan={**search.plan, **plans[min(budget, len(plans) - 1)]}, winner=winner)


def at_version(search: SearchRecord, version: int | None, *, store: Store) -> SearchRecord:
    """The search with another version of its board; None: the newest.

    Raises:
        Outdated: the version is not kept any more.
    """
    if version is None or version == search.board_version:
        return search
    return replace(search, board=store.get_board_head(search.id, version=version), board_version=version)


def read_page(search: SearchRecord, *, query: BoardQuery, after: Sequence[float] | None, limit: int, store: Store) -> BoardPage:
    """A page of the search's board at its version; without rows before the first result."""
    if search.board_version is None:
        return BoardPage(version=0, rows=[], end=None)
    return store.leaderboard_page(search.id, version=search.board_version, query=query, after=after, limit=limit)


def cursor_behind(page: BoardPage, *, query: BoardQuery) -> str | None:
    """Where the next page of the same version begins; None on the last one."""
    return None if page.end is None else encode_cursor(_order(query), page.version, *page.end)


def read_cursor(cursor: str, *, query: BoardQuery) -> tuple[int, tuple[float, ...]]:
    """The version and the position that a cursor stands for.

    Raises:
        RequestValidationError: it is none of this order.
    """
    version, *position = decode_cursor(cursor, order=_order(query), kinds=(_WHOLE, *_KINDS[query.sort]))
    return version, tuple(position)


def _order(query: BoardQuery) -> str:
    return f"leaderboard.{query.budget}.{'-' if query.descending else ''}{query.sort}"


def describe_board(search: SearchRecord, *, page: BoardPage, query: BoardQuery) -> LeaderboardAnswer:
    """A page of rows with the board's facts; the cost is that of the whole search."""
    board = of_budget(search, query.budget).board or {}
    facts = {name: value for name, value in board.items() if name != "of_rows"}
    return LeaderboardAnswer.model_validate(
        {
            **facts,
            "cost": describe_cost(board) if "cost" in board else None,
            "budget": query.budget,
            "search": search.id,
            "state": search.state,
            "version": search.board_version,
            "num_rows": board.get("of_rows", {}).get("num_rows", 0),
            "rows": page.rows,
            "has_more": page.end is not None,
            "next_cursor": cursor_behind(page, query=query),
        }
    )


def stream_rows(first: BoardPage, *, search: SearchRecord, query: BoardQuery, store: Store) -> Iterator[Json]:
    """All rows of one version, a batch at a time, beginning with a page that is read already."""
    page = first
    yield from page.rows
    while page.end is not None:
        page = store.leaderboard_page(search.id, version=page.version, query=query, after=page.end, limit=BATCH_ROWS)
        yield from page.rows


def json_lines(rows: Iterator[Json]) -> Iterator[str]:
    """A row a line."""
    return _in_blocks(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def csv_lines(rows: Iterator[Json], *, search: SearchRecord, budget: int) -> Iterator[str]:
    """A header, and one line for each row with all that the board says of it. Empty where there is no value."""
    board = of_budget(search, budget).board or {}
    names = [task["name"] for task in search.spec["tasks"]]
    costs = [name for name in board.get("of_rows", {}).get("costs", ()) if name != "parameters"]
    pareto = frozenset(board.get("pareto", ()))

    def lines() -> Iterator[str]:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(_flat({}, task_names=names, costs=costs, winner=None, pareto=pareto))
        for row in rows:
            writer.writerow(_flat(row, task_names=names, costs=costs, winner=board.get("winner"), pareto=pareto).values())
            yield out.getvalue()
            out.seek(0)
            out.truncate()
        yield out.getvalue()

    return _in_blocks(lines())


def _in_blocks(lines: Iterator[str], *, least: int = 2**16) -> Iterator[str]:
    """Text in pieces that are worth sending."""
    block: list[str] = []
    size = 0
    for line in lines:
        block.append(line)
        size += len(line)
        if size >= least:
            yield "".join(block)
            block.clear()
            size = 0
    yield "".join(block)


def _flat(row: Json, *, task_names: Sequence[str], costs: Sequence[str], winner: int | None, pareto: frozenset[int]) -> dict[str, Any]:
    """One row as a line of a table, by column."""
    difference, confirmation, shape = (row.get(name) or {} for name in ("difference", "confirmation", "shape"))
    latency, deployability, held_out = (confirmation.get(name) or {} for name in ("latency", "deployability", "held_out"))
    measured = {"": row.get("tasks", {}), "held_out_": held_out.get("tasks", {})}
    number = row.get("number")
    return {
        **{name: row.get(name) for name in ("rank", "tie_group", "number", "origin")},
        **{name: shape.get(name) for name in SHAPE_FIELDS},
        **{name: row.get(name) for name in ("parameters", "share_of_teacher", "rung", "tokens", "score", "standard_error")},
        **{f"difference{suffix}": difference.get(name) for suffix, name in (("", "value"), ("_low", "low"), ("_high", "high"))},
        **{name: row.get(name) for name in ("kl", "kl_standard_error", "loss", "state", "verified", "probability_best")},
        "is_winner": number == winner,
        "is_pareto": number in pareto,
        **{name: row.get("costs", {}).get(name) for name in costs},
        **{name: latency.get(name) for name in ("prefill_seconds", "decode_seconds_per_token", "peak_memory_bytes")},
        "tensor_parallel_sizes": " ".join(map(str, deployability.get("tensor_parallel_sizes", []))),
        "quantization_block_sizes": " ".join(map(str, deployability.get("quantization_block_sizes", []))),
        **{
            f"{prefix}{task}{suffix}": tasks.get(task, {}).get(key)
            for prefix, tasks in measured.items()
            for task in task_names
            for suffix, key in (("", "value"), ("_standard_error", "standard_error"))
        },
        "held_out_kl": held_out.get("kl", {}).get("value"),
    }
