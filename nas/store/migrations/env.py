"""Alembic's entry point. It runs only inside `Database.migrate`, on that connection and in its transaction: no alembic.ini.

Upgrades only: going back to an older version means restoring the backup that was taken before the upgrade.
"""

from __future__ import annotations

from alembic import context

from nas.store.database import VERSION_TABLE
from nas.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, version_table=VERSION_TABLE, render_as_batch=True)
context.run_migrations()
