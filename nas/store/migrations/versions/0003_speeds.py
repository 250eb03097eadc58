"""How fast workers are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "speeds",
        sa.Column("key", sa.String(96), nullable=False),
        sa.Column("cpus", sa.Float(53), nullable=False),
        sa.Column("gpus", sa.Float(53), nullable=False),
        sa.Column("dtype", sa.String(16), nullable=False),
        sa.Column("points", sa.JSON),
        sa.Column("host", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("measured_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("key", name="pk_speeds"),
    )
