"""The end of every attempt's log, kept after its node and its folder are gone; attempts that have ended have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "attempt_logs",
        sa.Column("attempt_id", sa.String(64), nullable=False),
        sa.Column("search_id", sa.String(64), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("attempt_id", name="pk_attempt_logs"),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempts.id"], name="fk_attempt_logs_attempt_id"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="fk_attempt_logs_search_id"),
    )
    op.create_index("ix_attempt_logs_search_id", "attempt_logs", ["search_id"])
    op.create_index("ix_attempt_logs_updated_at", "attempt_logs", ["updated_at"])
