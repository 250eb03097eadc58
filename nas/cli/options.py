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


def read_labels(texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE each.

    Raises:
        InvalidSpec: one has no `=`.
    """
    labels: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidSpec(Problem(field="--label", expected="NAME=VALUE", got=repr(text)))
        labels[name] = value
    return labels
