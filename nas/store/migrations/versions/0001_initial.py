"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    _registry()
    _searches()
    _trials()
    _results()
    _leadership()


def _registry() -> None:
    op.create_table(
        "teachers",
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("digest", sa.String(128), nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("parameters", sa.BigInteger, nullable=False),
        sa.Column("added_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_teachers"),
    )
    op.create_table(
        "corpora",
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("digest", sa.String(128), nullable=False),
        sa.Column("files", sa.JSON, nullable=False),
        sa.Column("num_documents", sa.BigInteger, nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("added_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_corpora"),
    )
    op.create_table(
        "tasks",
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("digest", sa.String(128), nullable=False),
        sa.Column("folder", sa.Text, nullable=False),
        sa.Column("card", sa.JSON, nullable=False),
        sa.Column("added_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_tasks"),
    )


def _searches() -> None:
    op.create_table(
        "searches",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("label", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("num_events", sa.BigInteger, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("updated_at", _TIME, nullable=False),
        sa.Column("started_at", _TIME),
        sa.Column("finished_at", _TIME),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("body_digest", sa.String(128)),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("inputs", sa.JSON, nullable=False),
        sa.Column("plan", sa.JSON, nullable=False),
        sa.Column("prepared", sa.JSON),
        sa.Column("board", sa.JSON),
        sa.Column("winner", sa.JSON),
        sa.Column("error", sa.JSON),
        sa.PrimaryKeyConstraint("id", name="pk_searches"),
        sa.UniqueConstraint("idempotency_key", name="uq_searches_idempotency_key"),
    )
    op.create_index("ix_searches_state_id", "searches", ["state", "id"])
    op.create_table(
        "events",
        sa.Column("search_id", sa.String(64), nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("type", sa.String(64), nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("search_id", "sequence", name="pk_events"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="fk_events_search_id"),
    )


def _trials() -> None:
    op.create_table(
        "trials",
        sa.Column("search_id", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("origin", sa.String(64), nullable=False),
        sa.Column("shape", sa.JSON, nullable=False),
        sa.Column("shape_key", sa.String(255), nullable=False),
        sa.Column("choices", sa.JSON),
        sa.Column("parameters", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("rung", sa.Integer),
        sa.Column("failure", sa.JSON),
        sa.Column("confirmation", sa.JSON),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("updated_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("search_id", "number", name="pk_trials"),
        sa.UniqueConstraint("search_id", "shape_key", name="uq_trials_search_id_shape_key"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="fk_trials_search_id"),
    )
    op.create_table(
        "attempts",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("search_id", sa.String(64), nullable=False),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("trial", sa.Integer),
        sa.Column("rung", sa.Integer),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("started_at", _TIME, nullable=False),
        sa.Column("finished_at", _TIME),
        sa.PrimaryKeyConstraint("id", name="pk_attempts"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="fk_attempts_search_id"),
        _trial_key("attempts"),
    )
    op.create_index("ix_attempts_search_id_trial", "attempts", ["search_id", "trial"])
    op.create_index("ix_attempts_state", "attempts", ["state"])


def _results() -> None:
    op.create_table(
        "rungs",
        sa.Column("search_id", sa.String(64), nullable=False),
        sa.Column("trial", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("rung", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("sequence", sa.Integer, nullable=False),
        sa.Column("summary", sa.JSON, nullable=False),
        sa.Column("documents", sa.JSON, nullable=False),
        sa.Column("finished_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("search_id", "trial", "rung", name="pk_rungs"),
        sa.UniqueConstraint("search_id", "sequence", name="uq_rungs_search_id_sequence"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="fk_rungs_search_id"),
        _trial_key("rungs"),
    )
    op.create_table(
        "points",
        sa.Column("search_id", sa.String(64), nullable=False),
        sa.Column("trial", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("rung", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("tokens", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("loss", sa.Float(53), nullable=False),
        sa.Column("learning_rate", sa.Float(53), nullable=False),
        sa.Column("tokens_per_second", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("search_id", "trial", "rung", "tokens", name="pk_points"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="fk_points_search_id"),
        _trial_key("points"),
    )


def _leadership() -> None:
    table = op.create_table(
        "leadership",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("expires_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leadership"),
    )
    # Long expired: anyone may claim it.
    op.execute(sa.insert(table).values(name="controller", owner=None, token=0, expires_at=sa.text("'2000-01-01 00:00:00.000000'")))


def _trial_key(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["search_id", "trial"], ["trials.search_id", "trials.number"], name=f"fk_{table}_search_id_trial")
