"""The machines of the cluster, as the controllers see them. Several controllers on one cluster write the same."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import timedelta

from sqlalchemy import delete, literal, select, tuple_, update

from nas.store.database import Database
from nas.store.machines import NodeRecord
from nas.store.records import utc_now
from nas.store.tables import nodes

SEEN_SECONDS = 120.0
"""A node that no controller has seen for so long is said to be gone."""
KEPT = timedelta(days=1)
"""How long one that is gone can still be asked about."""


class Nodes(Database):
    """Write and list nodes."""

    def save_node(self, record: NodeRecord) -> None:
        """Write a node as it is now; those that went long ago are forgotten."""
        values = asdict(record)
        with self.write(fence=None) as connection:
            connection.execute(delete(nodes).where(nodes.c.seen_at < utc_now() - KEPT))
            connection.execute(self.insert_if_new(nodes).values(values))
            connection.execute(update(nodes).where(nodes.c.id == record.id).values(values))

    def list_nodes(self, *, after: tuple[str, str] | None = None, limit: int | None = None) -> list[NodeRecord]:
        """All that were seen of late, by host and id; one that nobody watches any more is gone.

        Args:
            after: host and id of the last one before these.
        """
        query = select(nodes).order_by(nodes.c.host, nodes.c.id).limit(limit)
        if after is not None:
            query = query.where(tuple_(nodes.c.host, nodes.c.id) > tuple_(*map(literal, after)))
        unseen = utc_now() - timedelta(seconds=SEEN_SECONDS)
        with self.read() as connection:
            found = [NodeRecord(**row) for row in connection.execute(query).mappings()]
        return [replace(record, state="gone") if record.seen_at < unseen else record for record in found]
