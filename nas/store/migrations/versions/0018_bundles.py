"""Bundles of trials that are no winners: asked for over HTTP, packed by a controller."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "bundles",
        sa.Column("search_id", sa.String(64), nullable=False),
        sa.Column("trial", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("requested_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.Column("num_failures", sa.Integer, nullable=False),
        sa.Column("error", sa.JSON),
        sa.Column("path", sa.Text),
        sa.Column("sha256", sa.String(64)),
        sa.Column("num_bytes", sa.BigInteger),
        sa.PrimaryKeyConstraint("search_id", "trial", name="pk_bundles"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="fk_bundles_search_id"),
        sa.ForeignKeyConstraint(["search_id", "trial"], ["trials.search_id", "trials.number"], name="fk_bundles_search_id_trial"),
    )
    op.create_index("ix_bundles_state_requested_at", "bundles", ["state", "requested_at"])
