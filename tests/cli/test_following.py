"""What is shown of a search, or a full distillation, that goes on."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from nas.cli import following
from nas.cli.following import exit_unless_well, follow
from nas.connection import ApiError
from nas.terminal import Terminal


def events(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {"sequence": number, "type": "search.searching", "data": {}, "created_at": "2026-11-22T09:00:00Z"}


def test_a_status_that_cannot_be_asked_for_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "STATUS_SECONDS", -1.0)
    asked = []

    def status_line() -> str:
        asked.append(1)
        raise ApiError("away", status=None, problem={})

    file = io.StringIO()
    follow(events(3), status_line=status_line, shown=Terminal(file=file, force_terminal=True))
    assert len(asked) == 3
    assert file.getvalue().count("searching") == 3


def test_nobody_asks_where_things_stand_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "STATUS_SECONDS", -1.0)
    follow(events(3), status_line=lambda: pytest.fail("asked"), shown=Terminal(file=io.StringIO()))


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_what_ended_badly_ends_the_command_badly(state: str) -> None:
    with pytest.raises(typer.Exit) as caught:
        exit_unless_well(state)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("state", ["succeeded", "running", "paused"])
def test_what_succeeded_or_goes_on_does_not(state: str) -> None:
    exit_unless_well(state)
