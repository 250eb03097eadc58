"""Full distillations: rows of `searches` that name the search whose student they distil."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("searches", sa.Column("distils", sa.String(64)))
    op.create_index("ix_searches_distils", "searches", ["distils"])
