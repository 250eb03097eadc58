"""Following what the service works on, a search or a full distillation, to its end."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import typer
from rich.console import Console

from nas.cli.errors import FAILED
from nas.client import TERMINAL_STATES
from nas.connection import ApiError
from nas.terminal import event_line, out, say

STATUS_SECONDS = 1.0
"""Between two looks at where it stands."""


def follow(events: Iterable[dict[str, Any]], *, status_line: Callable[[], str], shown: Console = out) -> None:
    """Print events to the last; on a terminal the last line says where things stand."""
    looked = 0.0
    with shown.status("", spinner="dots") as status:
        for event in events:
            if line := event_line(event):
                shown.print(line, markup=False, highlight=False, soft_wrap=True)
            if shown.is_terminal and time.monotonic() - looked > STATUS_SECONDS:
                # Between two events the service may be away: the stream waits for it, and so does this line.
                with contextlib.suppress(ApiError):
                    status.update(status_line())
                looked = time.monotonic()


def print_events(events: Iterable[dict[str, Any]], *, as_json: bool) -> None:
    """Events to the last: one JSON document per line, or lines for people."""
    for event in events:
        if as_json:
            sys.stdout.write(json.dumps(event) + "\n")
            sys.stdout.flush()
        elif line := event_line(event):
            out.print(line, markup=False, highlight=False, soft_wrap=True)


def tell_break(error: ApiError) -> None:
    """The service is away."""
    say(f"{error}; it is asked again until it answers")


def exit_unless_well(state: str) -> None:
    """Exit code 1 after the end of what did not succeed."""
    if state in TERMINAL_STATES and state != "succeeded":
        raise typer.Exit(FAILED)
