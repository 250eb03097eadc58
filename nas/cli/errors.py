"""Exit codes of the `nas` command; `nas --help` lists them."""

from __future__ import annotations

from nas.connection import ApiError
from nas.errors import Conflict, NotFound

FAILED, WRONG_INPUT, MISSING, CONFLICT, UNREACHABLE, REFUSED, INTERRUPTED = 1, 2, 3, 4, 5, 6, 130


def exit_code(error: Exception) -> int:
    """The command's exit code for an error; `nas --help` lists them."""
    if isinstance(error, ApiError):
        if error.status is None:
            return UNREACHABLE
        return {401: REFUSED, 403: REFUSED, 404: MISSING, 409: CONFLICT, 429: CONFLICT}.get(error.status, WRONG_INPUT if error.status < 500 else FAILED)
    if isinstance(error, FloatingPointError):
        return FAILED
    return MISSING if isinstance(error, NotFound) else CONFLICT if isinstance(error, Conflict) else WRONG_INPUT
