"""`nas nodes`: the machines of the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from nas.cli.options import Json, Url
from nas.cli.searches import make_client
from nas.terminal import print_rows

commands = typer.Typer()


@commands.command()
def nodes(url: Url = None, as_json: Json = False) -> None:
    """Machines of the cluster: which of them get steps, and why the others do not."""
    with make_client(url) as client:
        found = client.nodes()
    print_rows(found if as_json else [_row(node) for node in found], as_json=as_json)


def _row(node: Mapping[str, Any]) -> dict[str, Any]:
    facts = node["facts"]
    return {
        "host": node["host"],
        "node": node["id"][:12],
        "state": node["state"],
        "cpus": facts.get("cpus"),
        "gpus": facts.get("gpus"),
        "devices": ", ".join(facts.get("devices", ())),
        "problems and warnings": "; ".join([*node["problems"], *node["warnings"]]),
    }
