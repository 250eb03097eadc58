"""Files of searches by their digest, those of earlier winners among them; indexes of the orders in which trials are listed."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    artifacts = op.create_table(
        "artifacts",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("search_id", sa.String(64), nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("sha256", "search_id", name="pk_artifacts"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="fk_artifacts_search_id"),
    )
    op.create_index("ix_trials_search_id_parameters_number", "trials", ["search_id", "parameters", "number"])
    there = op.get_bind().execute(sa.text("SELECT id, winner FROM searches WHERE winner IS NOT NULL")).all()
    rows = {}
    for search_id, winner in there:
        winner = json.loads(winner) if isinstance(winner, str) else winner
        for one in (winner, *winner.get("more", ())):
            if "bundle" in one and "bundle_sha256" in one:
                rows[one["bundle_sha256"], search_id] = {"sha256": one["bundle_sha256"], "search_id": search_id, "path": one["bundle"]}
    if rows:
        op.bulk_insert(artifacts, list(rows.values()))
