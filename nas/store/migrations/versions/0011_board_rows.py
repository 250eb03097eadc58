"""Leaderboards as rows by version, and numbers of trials that are kept instead of counted. `boards` stays for an older version that still runs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_CURRENT = 2**62
_LAST = 1e308
_SHOWN = ["state", "rung", "is_pareto", "is_confirmed"]


def upgrade() -> None:
    op.add_column("searches", sa.Column("board_version", sa.BigInteger))
    op.create_index("ix_trials_search_id_state_number", "trials", ["search_id", "state", "number"])
    op.create_index("ix_trials_search_id_rung_number", "trials", ["search_id", "rung", "number"])
    op.create_table(
        "trial_counts",
        sa.Column("search_id", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("num_rungs", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("num_trials", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("search_id", "state", "num_rungs", name="pk_trial_counts"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="fk_trial_counts_search_id"),
    )
    op.execute(
        "INSERT INTO trial_counts (search_id, state, num_rungs, num_trials) "
        "SELECT search_id, state, coalesce(rung + 1, 0), count(*) FROM trials GROUP BY search_id, state, coalesce(rung + 1, 0)"
    )
    op.create_table(
        "board_heads",
        sa.Column("search_id", sa.String(64), nullable=False),
        sa.Column("version", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("head", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("search_id", "version", name="pk_board_heads"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="fk_board_heads_search_id"),
    )
    op.create_table(
        "board_rows",
        sa.Column("search_id", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("since", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("until", sa.BigInteger, nullable=False),
        sa.Column("budget", sa.Integer, nullable=False),
        sa.Column("tier", sa.Integer, nullable=False),
        sa.Column("place", sa.Float(53), nullable=False),
        sa.Column("loss_of_score", sa.Float(53), nullable=False),
        sa.Column("kl", sa.Float(53), nullable=False),
        sa.Column("parameters", sa.BigInteger, nullable=False),
        sa.Column("rung", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("is_pareto", sa.Boolean, nullable=False),
        sa.Column("is_confirmed", sa.Boolean, nullable=False),
        sa.Column("digest", sa.String(32), nullable=False),
        sa.Column("row", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("search_id", "number", "since", name="pk_board_rows"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="fk_board_rows_search_id"),
    )
    op.create_index("ix_board_rows_rank", "board_rows", ["search_id", "budget", "tier", "place", "number", *_SHOWN, "parameters"])
    op.create_index("ix_board_rows_score", "board_rows", ["search_id", "budget", "loss_of_score", "number", *_SHOWN, "parameters"])
    op.create_index("ix_board_rows_kl", "board_rows", ["search_id", "budget", "kl", "number", *_SHOWN, "parameters"])
    op.create_index("ix_board_rows_parameters", "board_rows", ["search_id", "budget", "parameters", "number", *_SHOWN])
    _move_boards()


def _move_boards() -> None:
    """One board at a time: each may be megabytes."""
    connection = op.get_bind()
    tables = sa.MetaData()
    boards, searches, heads, rows = (sa.Table(name, tables, autoload_with=connection) for name in ("boards", "searches", "board_heads", "board_rows"))
    naive = connection.dialect.name == "sqlite"
    now = datetime.now(UTC).replace(tzinfo=None) if naive else datetime.now(UTC)
    for search_id in connection.execute(sa.select(boards.c.search_id)).scalars().all():
        text = connection.execute(sa.select(sa.cast(boards.c.board, sa.Text)).where(boards.c.search_id == search_id)).scalar_one()
        whole = json.loads(text)
        version = connection.execute(sa.select(searches.c.num_events).where(searches.c.id == search_id)).scalar_one()
        budgets = [{name: value for name, value in whole.items() if name != "more_budgets"}, *whole.get("more_budgets", ())]
        facts = [_facts(board) for board in budgets]
        head = {**facts[0], "more_budgets": facts[1:]} if len(facts) > 1 else facts[0]
        stored = [row for budget, board in enumerate(budgets) for row in _rows(board, budget)]
        if stored:
            connection.execute(rows.insert(), [{**row, "search_id": search_id, "since": version, "until": _CURRENT} for row in stored])
        connection.execute(heads.insert().values(search_id=search_id, version=version, created_at=now, head=head))
        connection.execute(searches.update().where(searches.c.id == search_id).values(board_version=version))


def _facts(board: dict[str, Any]) -> dict[str, Any]:
    rows, leader = board.get("rows", []), board.get("leader", board.get("winner"))
    first = next((row for row in rows if row["number"] == leader), None)
    of_rows = {
        "num_rows": len(rows),
        "costs": list(dict.fromkeys(name for row in rows for name in row.get("costs", ()))),
        "leader": None if first is None else {name: value for name, value in first.items() if name != "confirmation"},
    }
    return {**{name: value for name, value in board.items() if name != "rows"}, "of_rows": of_rows}


def _rows(board: dict[str, Any], budget: int) -> Iterator[dict[str, Any]]:
    rows, pareto = board.get("rows", []), frozenset(board.get("pareto", ()))
    sizes = Counter(row["tie_group"] for row in rows)
    for place, row in enumerate(rows):
        is_ranked, kl = row["rank"] is not None, _LAST if row["kl"] is None else row["kl"]
        text = json.dumps({**row, "tied": is_ranked and sizes[row["tie_group"]] > 1})
        yield {
            "number": row["number"],
            "budget": budget,
            "tier": 0 if is_ranked else 1000 - row["rung"],
            "place": float(place) if is_ranked else kl,
            "loss_of_score": _LAST if row["score"] is None else -row["score"],
            "kl": kl,
            "parameters": row["parameters"],
            "rung": row["rung"],
            "state": row.get("state", ""),
            "is_pareto": row["number"] in pareto,
            "is_confirmed": bool((row.get("confirmation") or {}).get("held_out")),
            "digest": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
            "row": text,
        }
