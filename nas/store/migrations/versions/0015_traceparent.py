"""The trace of the request that submitted a search, so that its steps belong to it; searches that are there have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("searches", sa.Column("traceparent", sa.String(64)))
