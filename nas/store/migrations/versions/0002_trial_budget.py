"""Trials belong to one of the search's budgets; those that are there to the first."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("trials", sa.Column("budget", sa.Integer, nullable=False, server_default="0"))
