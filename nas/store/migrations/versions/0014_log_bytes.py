"""How long each log is, beside it and in the index of their age: what all take together is known without reading them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempt_logs", sa.Column("num_bytes", sa.Integer, nullable=False, server_default="0"))
    op.drop_index("ix_attempt_logs_updated_at", "attempt_logs")
    op.create_index("ix_attempt_logs_updated_at_num_bytes", "attempt_logs", ["updated_at", "num_bytes"])
