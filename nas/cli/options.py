"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from nas.errors import InvalidSpec, Problem

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")]
Url = Annotated[str | None, typer.Option(envvar="NAS_URL", help="The service; default: the address of NAS_HOST and NAS_PORT.")]
SearchId = Annotated[str, typer.Argument(help="Id of a search: srch_...")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")]
Labels = Annotated[list[str] | None, typer.Option("--label", help="NAME=VALUE; may be repeated.")]


def read_pairs(texts: Sequence[str], *, option: str) -> dict[str, str]:
    """NAME=VALUE each; of one name that is given twice, the last.

    Raises:
        InvalidSpec: one has no name, or no `=`.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidSpec(Problem(field=option, expected="NAME=VALUE", got=repr(text)))
        pairs[name] = value
    return pairs
