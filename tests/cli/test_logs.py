from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas import cli
from nas.cli.logs import added
from nas.client import ApiError


class Service:
    """Two attempts at a rung of trial 3; what the second says grows with every look, until it ends."""

    def __init__(self) -> None:
        self.said = iter(["", "one\n", "one\ntwo\n", "... 4 bytes before this are not kept\ntwo\nthree\n"])
        self.num_looks = 0

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None: ...

    def attempts(self, search_id: str, *, trial: int | None = None) -> Iterator[dict[str, Any]]:
        self.num_looks += 1
        if trial in (None, 3):
            yield {"id": "att_2", "stage": "rung", "rung": 1, "trial": 3, "state": "running" if self.num_looks <= 4 else "succeeded"}
            yield {"id": "att_1", "stage": "rung", "rung": 1, "trial": 3, "state": "failed"}

    def log(self, search_id: str, attempt_id: str) -> str:
        if attempt_id == "att_1":
            return "first try\n"
        if text := next(self.said):
            return text
        raise ApiError("nothing was said", status=404, problem={})


@pytest.fixture
def nas(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        service = Service()
        monkeypatch.setattr("nas.cli.logs.make_client", lambda _: service)
        monkeypatch.setattr("nas.cli.logs.FOLLOW_SECONDS", 0.0)
        monkeypatch.setattr(sys, "argv", ["nas", "logs", "srch_1", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_a_followed_log_is_printed_once_and_to_its_end(nas: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = nas("3", "--follow")

    assert (code, out) == (0, "one\ntwo\nthree\n")
    assert "att_2: rung 1 of trial 3, running" in err


def test_an_attempt_is_chosen_by_its_id(nas: Callable[..., tuple[int, str, str]]) -> None:
    assert nas("--attempt", "att_1")[:2] == (0, "first try\n")


def test_the_attempts_are_listed_as_json(nas: Callable[..., tuple[int, str, str]]) -> None:
    assert [attempt["id"] for attempt in json.loads(nas("--json")[1])] == ["att_2", "att_1"]


def test_what_is_not_there_is_told(nas: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = nas("4")

    assert code == 3
    assert "expected one of trial 4 of search srch_1, got none: nothing of it has begun" in err


@given(st.lists(st.integers(0, 10**6).map(lambda number: f"{number} said\n"), unique=True, max_size=30), st.integers(0, 30), st.integers(0, 30))
def test_what_is_added_is_what_was_not_shown(lines: list[str], num_shown: int, num_dropped: int) -> None:
    shown, kept = "".join(lines[:num_shown]), lines[num_dropped:]
    text = "".join(kept) if num_dropped == 0 else "... 9 bytes before this are not kept\n" + "".join(kept)

    new = added(text, shown=shown)

    assert new == ("".join(lines[num_shown:]) if num_dropped < max(1, min(num_shown, len(lines))) else text)
