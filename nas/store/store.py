"""Store: the one place where the service's state is, on SQLite or PostgreSQL. Rows go in and records come out.

It keeps and it guards (states, fences, idempotency, gap-free events); it decides nothing about searching. The methods are
in parts, by what they keep; all of them are short transactions, and all may be called from any thread.
"""

from __future__ import annotations

from nas.store.access import Access
from nas.store.boards import Boards
from nas.store.bundles import Bundles
from nas.store.counts import Counts
from nas.store.distillations import Distillations
from nas.store.figures import Figures
from nas.store.idempotency import Idempotency
from nas.store.leases import Leases
from nas.store.listing import Listing
from nas.store.logs import Logs
from nas.store.nodes import Nodes
from nas.store.registry import Registry
from nas.store.requests import Requests
from nas.store.retention import Retention
from nas.store.searches import Searches
from nas.store.speeds import Speeds
from nas.store.trials import Trials


class Store(
    Registry, Searches, Distillations, Requests, Idempotency, Trials, Bundles, Listing, Counts, Boards, Leases, Speeds, Nodes, Access, Logs, Retention, Figures
):
    """Registry, searches and events, distillations, requests of users, each done once, trials, results, their bundles and numbers, leaderboards, leases,
    speeds, nodes, projects and keys, logs, figures of all; over one engine."""

    @classmethod
    def open(cls, url: str, *, migrate: bool = False) -> Store:
        """The store at a database URL. Nothing is touched before the first call, unless the schema is to be migrated.

        Raises:
            InvalidSpec: not a URL of a SQLite file or of PostgreSQL.
            Conflict: migrate, and a newer version wrote the database.
        """
        store = cls(url)
        if migrate:
            store.migrate()
        return store

    @classmethod
    def open_for_service(cls, url: str, *, migrate: bool) -> Store:
        """The store of a process that serves: its schema brought up to date, or refused where that is a step of its own.

        Raises:
            InvalidSpec, Conflict: as `open` and `check_schema` do.
        """
        store = cls.open(url, migrate=migrate)
        if not migrate:
            store.check_schema()
        return store
