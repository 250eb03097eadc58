"""Why a search evaluates no more shapes: a limit that was reached must be known after a restart."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("searches", sa.Column("end_reason", sa.String(32)))
