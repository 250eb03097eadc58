"""What a service says is text: it is no command to the terminal of whoever asked, and no markup."""

from __future__ import annotations

import io
import sys

import pytest

from nas.terminal import Terminal, print_facts, print_rows, say, without_commands, write

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\x9b31m\rb[bold]c[/nothing] :smile:"
SHOWN = "a\ufffd]0;owned\ufffd\ufffd[2J\ufffd31m\ufffdb[bold]c[/nothing] :smile:"


def test_no_control_character_reaches_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    for name in ("out", "err"):
        monkeypatch.setattr(f"nas.terminal.{name}", Terminal(file=shown, width=200))

    print_rows([{"label": HOSTILE, "labels": {"team": HOSTILE}}], as_json=False)
    print_facts({"label": HOSTILE}, as_json=False)
    say(HOSTILE)

    assert shown.getvalue().count(SHOWN) == 4
    assert {character for character in shown.getvalue() if not character.isprintable()} == {"\n"}


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_document_is_left_as_it_is_for_a_file_and_made_harmless_for_a_terminal(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stdout", stream)

    write(f"{HOSTILE}\n\tline\n")

    assert stream.getvalue() == (f"{SHOWN}\n\tline\n" if is_terminal else f"{HOSTILE}\n\tline\n")


def test_text_of_any_language_stays() -> None:
    text = "Grüße, 世界 – ± ✓ ✗\n\té"

    assert without_commands(text) == text


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    shown = io.StringIO()
    monkeypatch.setattr("nas.terminal.out", Terminal(file=shown, width=200))
    return shown


def test_a_table_has_a_column_for_what_only_some_of_its_records_have(printed: io.StringIO) -> None:
    print_rows([{"rung": 0, "kl": None}, {"rung": 1, "kl": 0.5, "hellaswag": 0.25}], as_json=False)

    head, first, second = (line.split() for line in printed.getvalue().splitlines())
    assert (head, first, second) == (["rung", "kl", "hellaswag"], ["0"], ["1", "0.5", "0.25"])


def test_what_is_not_known_takes_no_line(printed: io.StringIO) -> None:
    print_facts({"state": "succeeded", "seconds_left": None, "paired": True}, as_json=False)

    assert [line.split() for line in printed.getvalue().splitlines()] == [["state", "succeeded"], ["paired", "yes"]]
