"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")]
Url = Annotated[str | None, typer.Option(envvar="NAS_URL", help="The service; default: the address of NAS_HOST and NAS_PORT.")]
SearchId = Annotated[str, typer.Argument(help="Id of a search: srch_...")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")]
