"""What our processes say: one set-up of logging for the API, the controller, the supervisor and the steps, and what no line may hold.

The code logs with the standard library and `extra={...}`; structlog only renders. Who a line is about (search_id, trial,
attempt_id, request_id) is bound once with `about` and stands in every line below, those of other libraries included.
Passwords, keys and tokens are masked in every line (`redact`), also in a message or a traceback that somebody else wrote.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, TextIO
from urllib.parse import unquote, urlsplit

import structlog
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.stdlib import ExtraAdder, ProcessorFormatter

LogFormat = Literal["json", "text"]

MASK = "***"
_SECRET_WORDS = "password|passwd|secret|secret[_-]?(?:access[_-]?)?key|api[_-]?key|(?:auth|access|session|csrf)[_-]?token"
_PATTERNS = (
    # Words of which one must be there (the text in lower case), for a pattern is slow on a long log; what is found; what stands in its place.
    (("://",), re.compile(r"(://[^/\s:@\"']*:)[^/\s@\"']+(?=@)"), rf"\g<1>{MASK}"),
    (("bearer", "basic"), re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w.~+/=-]{6,}"), rf"\g<1>{MASK}"),
    (("passw", "secret", "key", "token"), re.compile(rf"(?i)((?:{_SECRET_WORDS})[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&]+"), rf"\g<1>{MASK}"),
    (("?", "&"), re.compile(r"(?i)([?&](?:key|token|sig|signature|credential)=)[^&\s\"']+"), rf"\g<1>{MASK}"),
    # A key of ours: its visible prefix stays, so that an operator finds which one it was.
    (("nas_",), re.compile(r"(nas_[0-9a-f]{12}_)[A-Za-z0-9_-]{20,}"), rf"\g<1>{MASK}"),
)
_SECRET_NAME = re.compile(rf"(?i)(?:{_SECRET_WORDS}|credentials|_headers|^authorization|^cookie)$")
_MIN_SECRET_LENGTH = 8
"""A shorter value of the environment is not masked by itself: it would be found in innocent words."""


def set_up_logging(*, environment: Mapping[str, str], format: LogFormat | None = None, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Every message of this process, warnings and those of libraries included, as one line on a stream (standard error).

    Args:
        environment: of the process; the secrets in it are masked wherever they appear.
        format: None is text on a terminal and JSON anywhere else.
    """
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(make_formatter(format or ("text" if stream.isatty() else "json"), environment=environment))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda raised: _log_uncaught(raised.exc_type, raised.exc_value, raised.exc_traceback)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """What ends a process or a thread is a line too, and its message may hold what no line may."""
    if not issubclass(kind, (KeyboardInterrupt, SystemExit)):
        logging.getLogger("nas").critical("uncaught %s", kind.__name__, exc_info=(kind, error or kind(), trace), extra={"action": "uncaught"})


def make_formatter(format: LogFormat, *, environment: Mapping[str, str]) -> logging.Formatter:
    """Renders a record of any logger as one JSON object, or as a line for people (a traceback follows on lines of its own)."""

    def mask(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        known = find_secrets(environment)  # at every line: a token may be made after the set-up
        # Names with an underscore are a library's own: ray adds one to every record of its process. uvicorn says its messages again in colours.
        return {name: _masked(name, value, known) for name, value in event.items() if not name.startswith("_") and name != "color_message"}

    return ProcessorFormatter(
        foreign_pre_chain=[merge_contextvars, ExtraAdder()],
        processors=[
            _add_origin,
            ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            mask,
            structlog.processors.JSONRenderer(serializer=_dump) if format == "json" else _render_text,
        ],
    )


def about(**names: str | int | None) -> AbstractContextManager[None]:
    """Every line inside carries these names (search_id, trial, attempt_id, request_id); None is left out. Threads started inside do not inherit them."""
    return bound_contextvars(**{name: value for name, value in names.items() if value is not None})


def redact(text: str, *, secrets: Iterable[str] = ()) -> str:
    """Text without passwords in URLs, keys, tokens, and without the given secrets themselves."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    lower = text.lower()
    for words, pattern, replacement in _PATTERNS:
        if any(word in lower for word in words):
            text = pattern.sub(replacement, text)
    return text


def find_secrets(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Values in the environment that are secret by their name, and passwords in URLs; the longest first."""
    found = set()
    for name, value in environment.items():
        if _SECRET_NAME.search(name) or name.endswith("_TOKEN"):
            found.add(value)
        elif "://" in value and "@" in value and (password := _password(value)):
            found |= {password, unquote(password)}
    return tuple(sorted((value for value in found if len(value) >= _MIN_SECRET_LENGTH), key=len, reverse=True))


def _password(url: str) -> str | None:
    try:
        return urlsplit(url).password
    except ValueError:
        return None


def _masked(name: str, value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        return MASK if _SECRET_NAME.search(name) else redact(value, secrets=secrets)
    if isinstance(value, Mapping):
        return {str(key): _masked(str(key), item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_masked(name, item, secrets) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact(str(value), secrets=secrets)


def _add_origin(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """When, how bad and by whom: from the record, first in the line."""
    record: logging.LogRecord = event["_record"]
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"time": time, "level": record.levelname.lower(), "logger": record.name, **event}


def _dump(event: Mapping[str, Any], **_: Any) -> str:
    return json.dumps(_finite(event), allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no number for what is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


_SUBJECTS = ("search_id", "trial", "attempt_id", "request_id")


def _render_text(_: Any, __: str, event: structlog.typing.EventDict) -> str:
    values = dict(event)
    line = f"{values.pop('time')} {values.pop('level').upper():<7} {values.pop('logger')}: {values.pop('event')}"
    exception = values.pop("exception", None)
    names = [*(name for name in _SUBJECTS if name in values), *(name for name in values if name not in _SUBJECTS)]
    line += "".join(f" {name}={_quoted(values[name])}" for name in names)
    return line if exception is None else f"{line}\n{exception}"


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(character.isspace() for character in text) else text
