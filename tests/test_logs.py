from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.logs import MASK, about, find_secrets, make_formatter, redact, set_up_logging
from tests.waiting import BUSY_SECONDS

PASSWORD = "hunter2hunter2"
ENVIRONMENT = {
    "NAS_DATABASE_URL": f"postgresql://nas:{PASSWORD}@db/nas",
    "RAY_AUTH_TOKEN": "0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "HOME": "/home/operator",
}
SECRETS = (PASSWORD, "0123456789abcdef", "wJalrXUtnFEMI/K7MDENG")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where the process's log goes; the test runner's own handlers come back afterwards."""
    root, show, hooks = logging.getLogger(), warnings.showwarning, (sys.excepthook, threading.excepthook)
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    yield stream
    logging.captureWarnings(False)
    warnings.showwarning = show
    sys.excepthook, threading.excepthook = hooks
    root.handlers[:] = handlers
    root.setLevel(level)


def render(record: dict[str, Any]) -> dict[str, Any]:
    line = make_formatter("json", environment={}).format(logging.makeLogRecord({"levelname": "INFO", "name": "nas", **record}))
    assert "\n" not in line
    values: dict[str, Any] = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    return values


def test_every_line_of_any_logger_is_one_json_object_that_says_when_who_and_about_what(stream: io.StringIO) -> None:
    set_up_logging(environment={}, format="json", stream=stream)
    with about(search_id="srch_1", trial=3, attempt_id=None):
        logging.getLogger("nas.x").warning("left %d of %s", 2, "three\nlines", extra={"action": "test", "share": float("nan"), "shape": {"depth": (1, 2)}})
    logging.getLogger("some.library").error("bad", exc_info=ValueError("no"))

    first, second = (json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in stream.getvalue().splitlines())

    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "warning",
        "logger": "nas.x",
        "event": "left 2 of three\nlines",
        "search_id": "srch_1",
        "trial": 3,
        "action": "test",
        "share": "nan",
        "shape": {"depth": [1, 2]},
    }
    assert "ValueError: no" in second["exception"]
    assert "search_id" not in second


def test_lines_for_people_have_one_form_and_keep_a_value_on_its_line(stream: io.StringIO) -> None:
    set_up_logging(environment={}, format="text", stream=stream)
    with about(search_id="srch_1", attempt_id="att_1"):
        logging.getLogger("nas.x").info("began", extra={"label": "two\nlines"})

    time, rest = stream.getvalue().split(" ", 1)

    assert len(time) == len("2026-11-22T09:00:00.000Z")
    assert rest == 'INFO    nas.x: began search_id=srch_1 attempt_id=att_1 label="two\\nlines"\n'


def test_a_stream_that_is_no_terminal_gets_json_and_warnings_are_lines_too(stream: io.StringIO) -> None:
    set_up_logging(environment={}, stream=stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)

    line = json.loads(stream.getvalue())

    assert line["logger"] == "py.warnings"
    assert "old" in line["event"]


@pytest.mark.parametrize("format", ["json", "text"])
@pytest.mark.parametrize(
    "text",
    [
        "cannot connect to postgresql+psycopg://nas:hunter2hunter2@db:5432/nas?sslmode=require",
        'connection failed: host=db user=nas password=hunter2hunter2 dbname="nas"',
        "Authorization: Bearer hunter2hunter2",
        "{'authorization': 'Basic hunter2hunter2='}",
        "GET /v1/searches?key=hunter2hunter2&limit=3",
        'retry with {"api_key": "hunter2hunter2"}',
        "secret_access_key: hunter2hunter2, region: x",
    ],
)
def test_no_line_holds_a_password_wherever_it_was_written(stream: io.StringIO, format: Any, text: str) -> None:
    set_up_logging(environment={}, format=format, stream=stream)
    logger = logging.getLogger("nas.x")
    logger.info(text)
    logger.info("with %s", text, extra={"detail": {"inner": [text]}, "password": PASSWORD})
    try:
        raise RuntimeError(text)
    except RuntimeError:
        logger.exception("it raised")

    assert PASSWORD not in stream.getvalue()
    assert MASK in stream.getvalue()
    assert len(stream.getvalue().splitlines()) >= 3


@pytest.mark.parametrize("format", ["json", "text"])
def test_the_secrets_of_the_environment_are_masked_in_any_words(stream: io.StringIO, format: Any) -> None:
    set_up_logging(environment=ENVIRONMENT, format=format, stream=stream)
    for secret in SECRETS:
        logging.getLogger("some.library").error("%s was refused: %r", secret, {"x": secret})

    assert not any(secret in stream.getvalue() for secret in SECRETS)
    assert find_secrets({"HOME": "/home/operator", "NAS_PORT": "8400"}) == ()


def test_a_key_is_named_by_its_prefix_alone() -> None:
    key = "nas_1f2e3d4c5b6a_" + "Zz09_-" * 7

    assert redact(f"key {key} is revoked") == f"key nas_1f2e3d4c5b6a_{MASK} is revoked"


@pytest.mark.parametrize("text", ["tokens=2048 token 17 of 40", "nas_http_request_duration_seconds", "https://host:8400/v1/x@y", "srch_18a3 secretary: Jo"])
def test_innocent_words_stay(text: str) -> None:
    assert redact(text) == text


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists)))
def test_any_value_makes_a_line_that_parses(value: dict[str, Any]) -> None:
    assert render({"msg": "said", "args": (), "value": value})["event"] == "said"


def test_masking_twice_is_masking_once() -> None:
    once = redact("postgresql://nas:hunter2hunter2@db password=x12345678", secrets=SECRETS)

    assert redact(once, secrets=SECRETS) == once


def test_what_ends_a_thread_is_a_line_without_secrets(stream: io.StringIO) -> None:
    set_up_logging(environment={}, format="json", stream=stream)

    def fail() -> None:
        raise RuntimeError("postgresql://nas:hunter2hunter2@db/nas")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()

    line = json.loads(stream.getvalue())
    assert (line["level"], line["event"]) == ("critical", "uncaught RuntimeError")
    assert "RuntimeError: postgresql://nas:***@db/nas" in line["exception"]


def test_every_line_of_a_server_parses_and_none_holds_what_a_client_showed(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "NAS_DATA": str(tmp_path), "NAS_PORT": str(port), "NAS_LOG_LEVEL": "debug", "AWS_SECRET_ACCESS_KEY": PASSWORD}
    environment.pop("NAS_PARENT_PID", None)
    key = f"nas_1f2e3d4c5b6a_{'Zz09_-' * 7}x"
    process = subprocess.Popen([sys.executable, "-m", "api"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/healthz")
        for path in (f"/v1/searches?key={PASSWORD}", f"/v1/searches/{PASSWORD}", f"/nowhere/{PASSWORD}"):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {key}"})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=10)
            refused.value.close()
    finally:
        process.send_signal(signal.SIGTERM)
        _, written = process.communicate(timeout=30)

    lines = [json.loads(line) for line in written.splitlines()]
    assert sum(line["logger"] == "api.access" for line in lines) >= 3
    assert any(line["logger"].startswith("uvicorn") for line in lines)
    assert not any("color_message" in line for line in lines)
    assert all({"time", "level", "logger", "event"} <= line.keys() for line in lines)
    assert PASSWORD not in written
    assert key.rpartition("_")[2] not in written


def test_a_server_without_its_database_says_so_in_lines_that_parse_and_without_its_password(tmp_path: Path) -> None:
    environment = {**os.environ, "NAS_DATA": str(tmp_path), "NAS_DATABASE_URL": f"postgresql://nas:{PASSWORD}@127.0.0.1:1/nas"}
    environment.pop("NAS_PARENT_PID", None)

    done = subprocess.run([sys.executable, "-m", "api"], env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode != 0
    assert done.stderr
    assert all(json.loads(line)["level"] for line in done.stderr.splitlines() if not line.startswith("nas api: "))
    assert PASSWORD not in done.stdout + done.stderr


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)
