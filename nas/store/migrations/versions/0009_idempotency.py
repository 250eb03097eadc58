"""Idempotency keys of every request that acts, in a table of their own; the keys of submitted searches move there.

The columns of `searches` that held them stay, for a service of the version before.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("operation", sa.String(255), nullable=False),
        sa.Column("body_digest", sa.String(64), nullable=False),
        sa.Column("search_id", sa.String(64)),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("project", "key", name="pk_idempotency_keys"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="fk_idempotency_keys_search_id"),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])
    op.execute(
        "INSERT INTO idempotency_keys (project, key, operation, body_digest, search_id, created_at) "
        "SELECT project, idempotency_key, 'POST /v1/searches', body_digest, id, created_at FROM searches "
        "WHERE idempotency_key IS NOT NULL AND body_digest IS NOT NULL"
    )
