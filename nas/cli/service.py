"""The service itself: run it, its versions, its schema."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import Json, Url
from nas.cli.searches import make_client
from nas.logs import set_up_logging
from nas.settings import Settings
from nas.terminal import print_facts, say

commands = typer.Typer()


@commands.command()
def serve(
    data: Annotated[Path | None, typer.Option(help="Folder of all files (NAS_DATA).")] = None,
    host: Annotated[str | None, typer.Option(help="Address (NAS_HOST).")] = None,
    port: Annotated[int | None, typer.Option(help="Port (NAS_PORT).")] = None,
    database: Annotated[str | None, typer.Option(help="sqlite:///FILE or postgresql://... (NAS_DATABASE_URL).")] = None,
    ray_address: Annotated[str | None, typer.Option(help="A running Ray cluster; default: a local one (NAS_RAY_ADDRESS).")] = None,
    num_cpus: Annotated[int | None, typer.Option(help="CPU cores of the local cluster (NAS_NUM_CPUS).")] = None,
    num_gpus: Annotated[int | None, typer.Option(help="GPUs of the local cluster (NAS_NUM_GPUS).")] = None,
) -> None:
    """Run the API, the controller and a local Ray cluster until Ctrl-C."""
    from nas.serve import check_port
    from nas.serve import serve as run

    options = {
        "NAS_DATA": data and data.absolute(),
        "NAS_HOST": host,
        "NAS_PORT": port,
        "NAS_DATABASE_URL": database,
        "NAS_RAY_ADDRESS": ray_address,
        "NAS_NUM_CPUS": num_cpus,
        "NAS_NUM_GPUS": num_gpus,
    }
    os.environ.update({name: str(value) for name, value in options.items() if value is not None})
    settings = Settings.from_environment(os.environ)
    set_up_logging(environment=os.environ, format=settings.log_format, level=settings.log_level)
    check_port(settings)
    say(f"starting http://{settings.host}:{settings.port}, data in {settings.data_folder}")
    sys.exit(run())


@commands.command()
def version(url: Url = None, as_json: Json = False) -> None:
    """Versions of the service that answers, of its libraries and of its database's schema."""
    with make_client(url) as client:
        print_facts(client.version(), as_json=as_json)


@commands.command()
def migrate(check: Annotated[bool, typer.Option("--check", help="Only say whether the schema is current; exit code 4 when it is not.")] = False) -> None:
    """Bring the database's schema up to date. Back it up first: there is no way back."""
    from nas.store.store import Store

    settings = Settings.from_environment(os.environ)
    store = Store.open(settings.database_url)
    try:
        before, expected = store.schema_revisions()
        if check:
            store.check_schema()
        else:
            store.migrate()
        say(f"schema {expected}" if before == expected else f"schema {before or 'none'} -> {expected}")
    finally:
        store.close()
