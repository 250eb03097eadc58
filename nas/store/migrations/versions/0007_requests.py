"""What users ask of a search that is there (pause, resume, retry, extend), its labels, and times by the database's clock."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("searches", sa.Column("labels", sa.JSON))
    op.add_column("searches", sa.Column("active_seconds", sa.Float(53), nullable=False, server_default="0"))
    op.add_column("searches", sa.Column("active_since", sa.DateTime(timezone=True)))
    op.add_column("searches", sa.Column("state_since", sa.DateTime(timezone=True)))
    op.add_column("searches", sa.Column("num_requests", sa.Integer, nullable=False, server_default="0"))
    op.add_column("attempts", sa.Column("counts", sa.Boolean, nullable=False, server_default=sa.true()))
    op.add_column("attempts", sa.Column("device_seconds", sa.Float(53)))
    op.execute("UPDATE searches SET state_since = updated_at")
    op.execute("UPDATE searches SET active_since = started_at WHERE finished_at IS NULL")
