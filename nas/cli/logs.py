"""`nas logs`: what the steps of a search said."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from nas.cli.options import Json, SearchId, Url
from nas.cli.searches import make_client
from nas.client import Client
from nas.connection import ApiError
from nas.errors import NotFound
from nas.terminal import print_json, say, write

commands = typer.Typer()

FOLLOW_SECONDS = 2.0


@commands.command()
def logs(
    search_id: SearchId,
    trial: Annotated[int | None, typer.Argument(help="Number of a trial; default: the search's latest step.")] = None,
    attempt: Annotated[str | None, typer.Option(help="Id of an attempt; default: the latest one. --json lists them.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the attempt ends.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """What a step of a search said: the latest attempt's log, of a trial or of the whole search. With --json: the attempts, the latest first."""
    with make_client(url) as client:
        attempts = client.attempts(search_id, trial=trial)
        if as_json:
            print_json(list(attempts))
            return
        chosen = next((one for one in attempts if attempt in (None, one["id"])), None)
        if chosen is None:
            of = f"search {search_id}" if trial is None else f"trial {trial} of search {search_id}"
            raise NotFound(f"attempt: expected one of {of}, got {attempt or 'none: nothing of it has begun'}")
        say(_describe(chosen))
        _print_log(client, search_id, chosen, follow=follow)


def _describe(attempt: Mapping[str, Any]) -> str:
    what = attempt["stage"] if attempt["rung"] is None else f"rung {attempt['rung']}"
    of = "" if attempt["trial"] is None else f" of trial {attempt['trial']}"
    return f"{attempt['id']}: {what}{of}, {attempt['state']}"


def _print_log(client: Client, search_id: str, attempt: Mapping[str, Any], *, follow: bool) -> None:
    shown = ""
    while True:
        # Asked before the log is read: what was said until its end is then in it.
        runs = follow and _runs(client, search_id, attempt)
        text = _read(client, search_id, attempt["id"], may_be_missing=follow)
        write(added(text, shown=shown))
        shown = text or shown
        if not runs:
            return
        time.sleep(FOLLOW_SECONDS)


def _runs(client: Client, search_id: str, attempt: Mapping[str, Any]) -> bool:
    return any(one["id"] == attempt["id"] and one["state"] == "running" for one in client.attempts(search_id, trial=attempt["trial"]))


def _read(client: Client, search_id: str, attempt_id: str, *, may_be_missing: bool) -> str:
    try:
        return client.log(search_id, attempt_id)
    except ApiError as error:
        if error.status == 404 and may_be_missing:  # it has not said anything yet
            return ""
        raise


def added(text: str, *, shown: str) -> str:
    """What is new in a log since it was shown. Only its end is kept: a longer one begins with a line that says so, and somewhere in what was shown."""
    if text.startswith(shown):
        return text[len(shown) :]
    kept, lines = text.partition("\n")[2], shown.splitlines(keepends=True)
    for index in range(len(lines)):
        known = "".join(lines[index:])
        if kept.startswith(known):
            return kept[len(known) :]
    return text
