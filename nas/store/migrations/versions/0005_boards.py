"""Leaderboards apart from their searches: SQLite copies a whole row at every change, and a search's changes with every event."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "boards",
        sa.Column("search_id", sa.String(64), nullable=False),
        sa.Column("board", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("search_id", name="pk_boards"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="fk_boards_search_id"),
    )
    op.execute("INSERT INTO boards (search_id, board) SELECT id, board FROM searches WHERE board IS NOT NULL")
    op.drop_column("searches", "board")
