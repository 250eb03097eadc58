"""`nas gc`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from nas.cli.options import Json
from nas.settings import Settings
from nas.terminal import print_json, say

commands = typer.Typer()


@commands.command()
def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is shown.")] = False,
    as_json: Json = False,
) -> None:
    """Show the files that no search needs, in the data folder and where machines share files by URL; delete them with --yes. Safe while the service runs."""
    from nas.housekeeping import find_unused, remove
    from nas.store.store import Store

    settings = Settings.from_environment(os.environ)
    store = Store.open(settings.database_url)
    try:
        store.check_schema()
        found = find_unused(store, settings=settings)
        removed = {unused.place: remove(unused, store=store, settings=settings) for unused in found} if yes else {}
    finally:
        store.close()
    if as_json:
        print_json(
            [{"kind": unused.kind, "path": unused.place, "num_bytes": unused.num_bytes, "deleted": removed.get(unused.place, False)} for unused in found]
        )
        return
    for unused in found:
        note = "" if not yes else " deleted" if removed[unused.place] else " kept: it is needed by now"
        say(f"{unused.kind}  {unused.num_bytes / 2**20:10.1f} MiB  {unused.place}{note}")
    total = sum(unused.num_bytes for unused in found) / 2**20
    say(f"{len(found)} folders, {total:.1f} MiB" + ("" if yes or not found else "; delete them with `nas gc --yes`"))
