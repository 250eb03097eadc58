"""The finalists' scores on the single held-out documents, by which they are compared; those that are there have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("trials", sa.Column("confirmation_documents", sa.JSON(none_as_null=True)))
