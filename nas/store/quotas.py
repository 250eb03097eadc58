"""What a project may use, and what it has used. A search is checked and charged in the transaction that stores it.

Whoever charges a project locks its row first, so of many submits at once no more pass than the quota allows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime, time, timedelta

from sqlalchemy import Connection, Executable, RowMapping, bindparam, case, func, select
from sqlalchemy.dialects import postgresql, sqlite

from nas.errors import InvalidSpec, NotFound, Problem, QuotaExceeded
from nas.store.records import SearchState, utc_now
from nas.store.tables import projects, searches, usage

# Built once: what a submit asks of the database costs more to put together than to run.
_LOCK_PROJECT = select(projects).where(projects.c.name == bindparam("project")).with_for_update(key_share=True)

MAX_COUNTED = 2**61
"""A day's tokens above this are counted as this: a database's integer ends at four times as many, and no quota is as large."""
ACTIVE = tuple(state for state in SearchState if not state.is_terminal)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """Limits of one project; None is no limit. A day is one of UTC."""

    max_active_searches: int | None = None
    """Searches and full distillations that have not ended, paused ones among them."""
    max_active_trials: int | None = None
    """Trials that all of these may have together."""
    max_tokens_per_day: int | None = None
    """Distillation tokens that the searches and full distillations submitted in a day may take at most."""
    max_device_seconds_per_day: float | None = None
    """Device seconds spent in a day after which no further search is taken; those that run go on."""

    def __post_init__(self) -> None:
        problems = [
            Problem(field=name, expected="0 or more", got=str(value)) for name, value in asdict(self).items() if value is not None and not 0 <= value <= 2**53
        ]
        if problems:
            raise InvalidSpec(*problems)


NO_QUOTAS = Quotas()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a project uses now; each field is what the quota of the same place limits."""

    active_searches: int
    active_trials: int
    tokens_today: int
    device_seconds_today: float


def read_quotas(row: RowMapping) -> Quotas:
    """The quotas in a project's row."""
    return Quotas(**{field.name: row[field.name] for field in fields(Quotas)})


def lock_project(connection: Connection, project: str) -> Quotas:
    """The project's quotas, its row locked until the transaction ends. Foreign keys may still point at it meanwhile.

    Raises:
        NotFound: no such project.
    """
    row = connection.execute(_LOCK_PROJECT, {"project": project}).mappings().one_or_none()
    if row is None:
        raise NotFound(f"project: expected the name of one, got {project!r}")
    return read_quotas(row)


def read_usage(connection: Connection, project: str) -> Usage:
    trials = func.coalesce(func.sum(searches.c.plan["max_trials"].as_integer()), 0)
    active = select(func.count(), trials).where(searches.c.project == project, searches.c.state.in_(ACTIVE))
    num_searches, num_trials = connection.execute(active).one()
    today = select(usage.c.tokens, usage.c.device_seconds).where(usage.c.project == project, usage.c.day == _today())
    tokens, device_seconds = connection.execute(today).one_or_none() or (0, 0.0)
    return Usage(active_searches=num_searches, active_trials=int(num_trials), tokens_today=tokens, device_seconds_today=device_seconds)


def charge(connection: Connection, project: str, *, quotas: Quotas, num_searches: int, num_trials: int, tokens: int) -> None:
    """Take a new search, or what an extended one has more; it is in its table already, and leaves it if this raises.

    Args:
        quotas: of `lock_project`, in the same transaction.
        num_searches, num_trials, tokens: what this request adds at most.

    Raises:
        QuotaExceeded: it is more than the project may have now.
    """
    if quotas != NO_QUOTAS:
        _check(quotas, project, used=read_usage(connection, project), num_searches=num_searches, num_trials=num_trials, tokens=tokens)
    add_usage(connection, project, tokens=tokens)


def _check(quotas: Quotas, project: str, *, used: Usage, num_searches: int, num_trials: int, tokens: int) -> None:
    """Whether a project may have so much more; the searches and trials among it are in use already."""
    asked = (
        ("max_active_searches", quotas.max_active_searches, used.active_searches - num_searches, num_searches),
        ("max_active_trials", quotas.max_active_trials, used.active_trials - num_trials, num_trials),
        ("max_tokens_per_day", quotas.max_tokens_per_day, used.tokens_today, tokens),
    )
    for quota, limit, before, more in asked:
        if limit is not None and more > 0 and before + more > limit:
            raise _exceeded(project, quota, limit=limit, used=before, asked=more)
    # Nobody knows before how many of these a search takes: a project goes over them once, and then waits.
    if quotas.max_device_seconds_per_day is not None and used.device_seconds_today >= quotas.max_device_seconds_per_day:
        raise _exceeded(project, "max_device_seconds_per_day", limit=quotas.max_device_seconds_per_day, used=used.device_seconds_today, asked=0)


def add_usage(connection: Connection, project: str, *, tokens: int = 0, device_seconds: float = 0.0) -> None:
    """Count what a project uses today; tokens up to MAX_COUNTED."""
    row = {"project": project, "day": _today(), "tokens": min(tokens, MAX_COUNTED), "device_seconds": device_seconds}
    connection.execute(_ADD_USAGE[connection.dialect.name], row)


def _add_usage(row: sqlite.Insert | postgresql.Insert) -> Executable:
    counted = usage.c.tokens + row.excluded.tokens
    sums = {"tokens": case((counted > MAX_COUNTED, MAX_COUNTED), else_=counted), "device_seconds": usage.c.device_seconds + row.excluded.device_seconds}
    return row.on_conflict_do_update(index_elements=[usage.c.project, usage.c.day], set_=sums)


_ADD_USAGE = {"sqlite": _add_usage(sqlite.insert(usage)), "postgresql": _add_usage(postgresql.insert(usage))}


def add_device_seconds(connection: Connection, search_id: str, seconds: float | None) -> None:
    """Count what a step of a search took against its project; None: nobody saw it end."""
    if seconds:
        project = connection.execute(select(searches.c.project).where(searches.c.id == search_id)).scalar_one()
        add_usage(connection, project, device_seconds=seconds)


def _exceeded(project: str, quota: str, *, limit: float, used: float, asked: int) -> QuotaExceeded:
    message = f"{quota} of project {project}: expected at most {limit:,.0f}, got {used:,.0f} in use" + (f" and {asked:,} more" if asked else "")
    retry_after_seconds = None
    if asked <= limit and limit > 0:  # else no waiting helps
        is_daily = quota.endswith("_per_day")
        message += "; ask again when " + ("a new day (UTC) begins" if is_daily else "one of its searches has ended")
        retry_after_seconds = _seconds_to_midnight() if is_daily else None
    return QuotaExceeded(message, quota=quota, limit=limit, used=used, retry_after_seconds=retry_after_seconds)


def _today() -> date:
    return utc_now().date()


def _seconds_to_midnight() -> int:
    now = utc_now()
    midnight = datetime.combine(now.date() + timedelta(days=1), time(), tzinfo=UTC)
    return int((midnight - now).total_seconds()) + 1
