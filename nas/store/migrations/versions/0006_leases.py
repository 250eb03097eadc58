"""A lease for each search, and who shares them. The table of the one leader stays for the old controller that still leads by it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "leases",
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("expires_at_seconds", sa.Float(53), nullable=False),
        sa.Column("length_seconds", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
    )
    op.create_index("ix_leases_owner", "leases", ["owner"])
    op.create_table(
        "controllers",
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.BigInteger, nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at_seconds", sa.Float(53), nullable=False),
        sa.Column("length_seconds", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("owner", name="pk_controllers"),
    )
