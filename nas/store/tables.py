"""The tables, once for SQLite and PostgreSQL. `migrations/` builds them; a test holds the two equal.

Rows of a search hang from it by foreign keys. `searches.num_events` is the last event's sequence: taking the next one
locks the search's row until the transaction ends, which is what keeps events gap-free and in commit order.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Date,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    true,
)

from nas.store.columns import JSON_VALUE, Identifier, PlainText, UtcDateTime

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _search_id(**options: Any) -> Column[str]:
    return Column("search_id", Identifier(64), ForeignKey("searches.id"), nullable=False, **options)


projects = Table(
    "projects",
    metadata,
    Column("name", Identifier(64), primary_key=True),
    Column("created_at", UtcDateTime, nullable=False),
    # Quotas: NULL is no limit.
    Column("max_active_searches", Integer),
    Column("max_active_trials", BigInteger),
    Column("max_tokens_per_day", BigInteger),
    Column("max_device_seconds_per_day", Float(53)),
)

api_keys = Table(
    "api_keys",
    metadata,
    # The visible part of the key.
    Column("id", Identifier(32), primary_key=True),
    Column("project", Identifier(64), ForeignKey("projects.name"), nullable=False, index=True),
    Column("name", PlainText, nullable=False),
    Column("scopes", JSON_VALUE, nullable=False),
    # SHA-256 of the whole key, which is stored nowhere.
    Column("digest", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
)

sessions = Table(
    "sessions",
    metadata,
    # SHA-256 of what the browser's cookie holds.
    Column("digest", String(64), primary_key=True),
    Column("key_id", Identifier(32), ForeignKey("api_keys.id"), nullable=False),
    Column("expires_at", UtcDateTime, nullable=False, index=True),
)

usage = Table(
    "usage",
    metadata,
    # Apart from the searches, so that deleting one gives nothing back.
    Column("project", Identifier(64), ForeignKey("projects.name"), primary_key=True),
    Column("day", Date, primary_key=True),
    Column("tokens", BigInteger, nullable=False),
    Column("device_seconds", Float(53), nullable=False),
)

teachers = Table(
    "teachers",
    metadata,
    Column("name", Identifier(96), primary_key=True),
    Column("digest", String(128), nullable=False),
    Column("path", Text, nullable=False),
    Column("config", JSON_VALUE, nullable=False),
    Column("parameters", BigInteger, nullable=False),
    Column("added_at", UtcDateTime, nullable=False),
)

corpora = Table(
    "corpora",
    metadata,
    Column("name", Identifier(96), primary_key=True),
    Column("digest", String(128), nullable=False),
    Column("files", JSON_VALUE, nullable=False),
    Column("num_documents", BigInteger, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("added_at", UtcDateTime, nullable=False),
)

tasks = Table(
    "tasks",
    metadata,
    Column("name", Identifier(96), primary_key=True),
    Column("digest", String(128), nullable=False),
    Column("folder", Text, nullable=False),
    Column("card", JSON_VALUE, nullable=False),
    Column("added_at", UtcDateTime, nullable=False),
)

searches = Table(
    "searches",
    metadata,
    Column("id", Identifier(64), primary_key=True),
    Column("label", PlainText, nullable=False),
    Column("state", String(16), nullable=False),
    Column("num_events", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("finished_at", UtcDateTime),
    # These two are of versions before `idempotency_keys`; nothing writes them any more.
    Column("idempotency_key", Identifier(255), unique=True),
    Column("body_digest", String(128)),
    Column("labels", JSON_VALUE),
    # Seconds of work before `active_since`, which is NULL while the search waits in the queue, is paused or has ended.
    Column("active_seconds", Float(53), nullable=False, server_default="0"),
    Column("active_since", UtcDateTime),
    # When it came into its state; NULL in rows of an older version.
    Column("state_since", UtcDateTime),
    Column("num_requests", Integer, nullable=False, server_default="0"),
    Column("end_reason", String(32)),
    Column("project", Identifier(64), nullable=False, server_default="default"),
    # Of the newest leaderboard: the sequence of the event that announced it.
    Column("board_version", BigInteger),
    # Trace of the request that submitted it, as in the W3C header.
    Column("traceparent", String(64)),
    # Of a full distillation: the search whose student it distils, which may be deleted before it. NULL in a search.
    Column("distils", Identifier(64)),
    # The large columns come last: SQLite then reads and rewrites those before without them.
    Column("spec", JSON_VALUE, nullable=False),
    Column("inputs", JSON_VALUE, nullable=False),
    Column("plan", JSON_VALUE, nullable=False),
    Column("prepared", JSON_VALUE),
    Column("winner", JSON_VALUE),
    Column("error", JSON_VALUE),
    Index(None, "state", "id"),
    Index(None, "project", "id"),
    Index(None, "distils"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("project", Identifier(64), primary_key=True),
    Column("key", Identifier(255), primary_key=True),
    Column("operation", Identifier(255), nullable=False),
    Column("body_digest", String(64), nullable=False),
    # What the operation made or changed; NULL only within the transaction that claims the key.
    Column("search_id", Identifier(64), ForeignKey("searches.id")),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "created_at"),
)

boards = Table(
    "boards",
    metadata,
    # Whole leaderboards as an older version writes and reads them; migration 0011 has moved them to the two tables below. Not used any more.
    _search_id(primary_key=True),
    Column("board", JSON_VALUE, nullable=False),
)

CURRENT = 2**62
"""`board_rows.until` of rows that no later version has replaced."""

board_heads = Table(
    "board_heads",
    metadata,
    _search_id(primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("head", JSON_VALUE, nullable=False),
)

_SHOWN = ("state", "rung", "is_pareto", "is_confirmed")
"""What pages are filtered by. In every index, so that rows which are not wanted are passed over without reading them."""

board_rows = Table(
    "board_rows",
    metadata,
    # A row is part of the versions `since` <= version < `until`.
    _search_id(primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("since", BigInteger, primary_key=True, autoincrement=False),
    Column("until", BigInteger, nullable=False),
    Column("budget", Integer, nullable=False),
    # The board's order is (tier, place, number): ranked rows by their place, then the others by rung and held-out KL.
    Column("tier", Integer, nullable=False),
    Column("place", Float(53), nullable=False),
    Column("loss_of_score", Float(53), nullable=False),
    Column("kl", Float(53), nullable=False),
    Column("parameters", BigInteger, nullable=False),
    Column("rung", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("is_pareto", Boolean, nullable=False),
    Column("is_confirmed", Boolean, nullable=False),
    Column("digest", String(32), nullable=False),
    # JSON text: it is compared by its digest, and parsed only for the page that shows it.
    Column("row", Text, nullable=False),
    Index("ix_board_rows_rank", "search_id", "budget", "tier", "place", "number", *_SHOWN, "parameters"),
    Index("ix_board_rows_score", "search_id", "budget", "loss_of_score", "number", *_SHOWN, "parameters"),
    Index("ix_board_rows_kl", "search_id", "budget", "kl", "number", *_SHOWN, "parameters"),
    Index("ix_board_rows_parameters", "search_id", "budget", "parameters", "number", *_SHOWN),
)

trials = Table(
    "trials",
    metadata,
    _search_id(primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("origin", String(64), nullable=False),
    Column("shape", JSON_VALUE, nullable=False),
    Column("shape_key", String(255), nullable=False),
    Column("choices", JSON_VALUE),
    Column("parameters", BigInteger, nullable=False),
    Column("budget", Integer, nullable=False, server_default="0"),
    Column("state", String(16), nullable=False),
    Column("rung", Integer),
    Column("failure", JSON_VALUE),
    Column("confirmation", JSON_VALUE),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("confirmation_documents", JSON_VALUE),
    UniqueConstraint("search_id", "shape_key"),
    Index(None, "search_id", "parameters", "number"),
    Index(None, "search_id", "state", "number"),
    Index(None, "search_id", "rung", "number"),
)

trial_counts = Table(
    "trial_counts",
    metadata,
    # Kept with every change of a trial, so that a list of searches counts nothing.
    _search_id(primary_key=True),
    Column("state", String(16), primary_key=True),
    Column("num_rungs", Integer, primary_key=True, autoincrement=False),
    Column("num_trials", Integer, nullable=False),
)

artifacts = Table(
    "artifacts",
    metadata,
    # Files that are downloaded by their content: a bundle is the same one wherever it came from, but each search has its own copy.
    Column("sha256", Identifier(64), primary_key=True),
    _search_id(primary_key=True),
    Column("path", Text, nullable=False),
)

bundles = Table(
    "bundles",
    metadata,
    # Of trials that are no winners, each packed once it is asked for. A winner's is with its search.
    _search_id(primary_key=True),
    Column("trial", Integer, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    Column("requested_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime),
    Column("num_failures", Integer, nullable=False),
    Column("error", JSON_VALUE),
    Column("path", Text),
    Column("sha256", String(64)),
    Column("num_bytes", BigInteger),
    ForeignKeyConstraint(["search_id", "trial"], ["trials.search_id", "trials.number"]),
    Index(None, "state", "requested_at"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("id", Identifier(64), primary_key=True),
    _search_id(),
    Column("stage", String(16), nullable=False),
    Column("trial", Integer),
    Column("rung", Integer),
    Column("state", String(16), nullable=False),
    Column("reason", PlainText),
    Column("started_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime),
    Column("counts", Boolean, nullable=False, server_default=true()),
    Column("device_seconds", Float(53)),
    ForeignKeyConstraint(["search_id", "trial"], ["trials.search_id", "trials.number"]),
    Index(None, "search_id", "trial"),
    Index(None, "state"),
)

attempt_logs = Table(
    "attempt_logs",
    metadata,
    # Apart from their attempts, which are listed often.
    Column("attempt_id", Identifier(64), ForeignKey("attempts.id"), primary_key=True),
    _search_id(),
    Column("text", PlainText, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("num_bytes", Integer, nullable=False, server_default="0"),
    Index(None, "search_id"),
    # With the sizes, so that they are summed without a look at the texts.
    Index(None, "updated_at", "num_bytes"),
)

rungs = Table(
    "rungs",
    metadata,
    _search_id(primary_key=True),
    Column("trial", Integer, primary_key=True, autoincrement=False),
    Column("rung", Integer, primary_key=True, autoincrement=False),
    Column("sequence", Integer, nullable=False),
    Column("summary", JSON_VALUE, nullable=False),
    # The per-document values are most of the bytes and only ranking reads them.
    Column("documents", JSON_VALUE, nullable=False),
    Column("finished_at", UtcDateTime, nullable=False),
    ForeignKeyConstraint(["search_id", "trial"], ["trials.search_id", "trials.number"]),
    UniqueConstraint("search_id", "sequence"),
)

points = Table(
    "points",
    metadata,
    _search_id(primary_key=True),
    Column("trial", Integer, primary_key=True, autoincrement=False),
    Column("rung", Integer, primary_key=True, autoincrement=False),
    Column("tokens", BigInteger, primary_key=True, autoincrement=False),
    Column("loss", Float(53), nullable=False),
    Column("learning_rate", Float(53), nullable=False),
    Column("tokens_per_second", Float(53), nullable=False),
    ForeignKeyConstraint(["search_id", "trial"], ["trials.search_id", "trials.number"]),
)

events = Table(
    "events",
    metadata,
    _search_id(primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("type", String(64), nullable=False),
    Column("data", JSON_VALUE, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

speeds = Table(
    "speeds",
    metadata,
    Column("key", String(96), primary_key=True),
    Column("cpus", Float(53), nullable=False),
    Column("gpus", Float(53), nullable=False),
    Column("dtype", String(16), nullable=False),
    Column("points", JSON_VALUE),
    Column("host", PlainText),
    Column("error", PlainText),
    Column("measured_at", UtcDateTime),
)

nodes = Table(
    "nodes",
    metadata,
    Column("id", Identifier(64), primary_key=True),
    Column("host", PlainText, nullable=False),
    Column("address", PlainText, nullable=False),
    Column("state", String(16), nullable=False),
    Column("problems", JSON_VALUE, nullable=False),
    Column("warnings", JSON_VALUE, nullable=False),
    Column("facts", JSON_VALUE, nullable=False),
    Column("checked_at", UtcDateTime),
    Column("seen_at", UtcDateTime, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    # A search's id, or the name of what else has one controller at a time.
    Column("name", Identifier(128), primary_key=True),
    Column("owner", PlainText),
    Column("token", BigInteger, nullable=False),
    # On the clock of `Leases`, which is no calendar's.
    Column("expires_at_seconds", Float(53), nullable=False),
    Column("length_seconds", Float(53), nullable=False),
    Index(None, "owner"),
)

boots = Table(
    "boots",
    metadata,
    # Of the machine of an SQLite file, see `Database.steady_time`.
    Column("id", String(64), primary_key=True),
    # By the calendar, when this boot was first asked about.
    Column("began_at", UtcDateTime, nullable=False),
)

controllers = Table(
    "controllers",
    metadata,
    Column("owner", Identifier(255), primary_key=True),
    Column("host", PlainText, nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("version", String(64), nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("expires_at_seconds", Float(53), nullable=False),
    Column("length_seconds", Float(53), nullable=False),
)

leadership = Table(
    "leadership",
    metadata,
    # Of the versions in which one controller led everything: one row, made by the migration. `retire_leadership` ends theirs; a later revision drops it.
    Column("name", String(32), primary_key=True),
    Column("owner", PlainText),
    Column("token", BigInteger, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
)
