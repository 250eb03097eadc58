"""Every error answer of the API in one shape: RFC 9457 `application/problem+json`.

Maps the exceptions of `nas/errors.py`, which know nothing of HTTP, and those of the web framework. A browser that asked for a
page gets the same problem as a page. It decides nothing about requests; `routes/` and `app.py` raise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Match

from api.feed import TooManyStreams
from api.rendering import TEMPLATES
from api.requests import REQUEST_ID_HEADER, request_id
from nas.errors import (
    BudgetInfeasible,
    Conflict,
    CorpusUnavailable,
    FilesUnavailable,
    IdempotencyKeyReused,
    InvalidSpec,
    KeyRefused,
    NasError,
    NotFound,
    Outdated,
    PreconditionFailed,
    Problem,
    QuotaExceeded,
    StoreUnavailable,
    TaskUnavailable,
    TeacherUnavailable,
)

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

RETRY_SECONDS = 2
"""What a 503 asks its caller to wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemType:
    """One kind of error; its page is at `/problems/<code>`."""

    code: str
    status: int
    title: str
    meaning: str


PROBLEM_TYPES: Mapping[str, ProblemType] = {
    kind.code: kind
    for kind in (
        ProblemType(
            code="bad-request",
            status=400,
            title="The request cannot be understood",
            meaning="The server could not parse the request, or it was sent to a host name that this service does not answer to.",
        ),
        ProblemType(
            code="unauthorized",
            status=401,
            title="An API key is needed",
            meaning="Send `Authorization: Bearer KEY` with a key that is neither revoked nor expired; the operator makes keys with `nas keys create`. "
            "In a browser, log in.",
        ),
        ProblemType(
            code="missing-scope",
            status=403,
            title="The key may not do this",
            meaning="The key lacks the scope that this needs: `read` to look, `submit` to start and change searches, `admin` for what concerns all projects.",
        ),
        ProblemType(
            code="cross-site",
            status=403,
            title="Another site may not change anything here",
            meaning="A page of another site tried to send a request that changes something. Use the pages of this service, or the API outside a browser.",
        ),
        ProblemType(
            code="not-found", status=404, title="There is no such thing", meaning="No page, search, trial, teacher, corpus or task has this address or name."
        ),
        ProblemType(
            code="method-not-allowed",
            status=405,
            title="The method is not allowed here",
            meaning="The address exists, but does not answer to this method; the Allow header lists those that it does.",
        ),
        ProblemType(
            code="conflict",
            status=409,
            title="Not in this state",
            meaning="The search exists, but its state does not allow this.",
        ),
        ProblemType(
            code="outdated",
            status=410,
            title="This version is gone",
            meaning="A cursor continues the version of a leaderboard that it came from, and that one is not kept any more. Begin again with the first page.",
        ),
        ProblemType(
            code="precondition-failed",
            status=412,
            title="It has changed since",
            meaning="The If-Match header names another version than the present one. Read it again, and send the request with its new ETag.",
        ),
        ProblemType(code="body-too-large", status=413, title="The body is too large", meaning="A request body may have at most 1 MiB."),
        ProblemType(
            code="unsupported-media-type", status=415, title="The body is not JSON", meaning="Send the spec with the header Content-Type: application/json."
        ),
        ProblemType(
            code="range-not-satisfiable",
            status=416,
            title="The file is shorter",
            meaning="The Range header begins behind the end of the file; the Content-Range header of the answer says how long it is.",
        ),
        ProblemType(
            code="invalid-request",
            status=422,
            title="A parameter is wrong",
            meaning="A path, query or header parameter is of another type or out of range, or there is a body where none is read; `errors` names each.",
        ),
        ProblemType(
            code="invalid-spec",
            status=422,
            title="The search cannot be run",
            meaning="A field of the spec is unknown, missing or impossible; `errors` names each field, what it expects and what came.",
        ),
        ProblemType(
            code="budget-infeasible",
            status=422,
            title="Nothing fits the budget",
            meaning="No legal shape of this teacher fits the budget; `errors` says how many parameters the smallest legal shape has.",
        ),
        ProblemType(
            code="input-unavailable",
            status=422,
            title="A registered input cannot be used",
            meaning="The teacher, corpus or task is registered, but cannot be used by this search; the detail says why. The operator has to register it anew.",
        ),
        ProblemType(
            code="idempotency-key-reused",
            status=422,
            title="The Idempotency-Key was used for something else",
            meaning="The same key came before, with another body or to another address, within the last 24 hours. A new request needs a new key.",
        ),
        ProblemType(
            code="precondition-required",
            status=428,
            title="The If-Match header is missing",
            meaning="A change has to name the version that it was decided on: send the ETag of the resource as If-Match, or * for whichever version is there.",
        ),
        ProblemType(
            code="quota-exceeded",
            status=429,
            title="The quota of the project is used up",
            meaning="Nothing was stored. `quota` names the limit, `limit` and `used` say how far it goes; Retry-After is there where waiting helps.",
        ),
        ProblemType(
            code="too-many-requests",
            status=429,
            title="Too many requests",
            meaning="This key, or this address with keys that do not exist, asks too often. Wait for as long as Retry-After says.",
        ),
        ProblemType(
            code="internal-error",
            status=500,
            title="The service failed",
            meaning="A bug, or the machine is in trouble. The service's log has the details under the request_id.",
        ),
        ProblemType(
            code="too-many-streams",
            status=503,
            title="Too many open event streams",
            meaning="This process keeps no more event streams open. Try again in a moment, or read the events as a list.",
        ),
        ProblemType(code="not-ready", status=503, title="The service is not ready", meaning="The store does not answer. Try again in a moment."),
    )
}

_CODES_BY_STATUS = {
    400: "bad-request",
    401: "unauthorized",
    403: "cross-site",
    404: "not-found",
    405: "method-not-allowed",
    409: "conflict",
    410: "outdated",
    412: "precondition-failed",
    413: "body-too-large",
}
_CODES_BY_STATUS |= {415: "unsupported-media-type", 416: "range-not-satisfiable", 422: "invalid-request", 428: "precondition-required", 503: "not-ready"}

_CODES_BY_ERROR: tuple[tuple[type[NasError], str], ...] = (
    (BudgetInfeasible, "budget-infeasible"),
    (InvalidSpec, "invalid-spec"),
    (NotFound, "not-found"),
    (IdempotencyKeyReused, "idempotency-key-reused"),
    (Outdated, "outdated"),
    (PreconditionFailed, "precondition-failed"),
    (Conflict, "conflict"),
    (KeyRefused, "unauthorized"),
    (QuotaExceeded, "quota-exceeded"),
    (StoreUnavailable, "not-ready"),
    (TooManyStreams, "too-many-streams"),
    (TeacherUnavailable, "input-unavailable"),
    (CorpusUnavailable, "input-unavailable"),
    (TaskUnavailable, "input-unavailable"),
)


def problem_response(
    request: Request,
    code: str,
    *,
    detail: str,
    errors: Sequence[Problem] = (),
    headers: Mapping[str, str] | None = None,
    status: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> Response:
    """One error as problem+json, or as a page for a browser that asked for a page. A 503 says when to try again; `more` is what this kind adds."""
    kind = PROBLEM_TYPES[code]
    headers = {**({"Retry-After": str(RETRY_SECONDS)} if kind.status == 503 else {}), REQUEST_ID_HEADER: request_id(request), **(headers or {})}
    body: dict[str, Any] = {
        "type": f"/problems/{code}",
        "title": kind.title,
        "status": status or kind.status,
        "detail": detail,
        "instance": request.url.path,
        "request_id": request_id(request),
        **(more or {}),
    }
    if errors:
        body["errors"] = [{"field": problem.field, "expected": problem.expected, "got": problem.got} for problem in errors]
    if wants_page(request):
        page = TEMPLATES.get_template("problem.html").render(problem=body, kind=kind)
        return HTMLResponse(page, status_code=body["status"], headers=headers)
    return JSONResponse(body, status_code=body["status"], headers=headers, media_type=MEDIA_TYPE)


def wants_page(request: Request) -> bool:
    """Whether a browser asks for something to show."""
    return not request.url.path.startswith("/v1/") and "text/html" in request.headers.get("accept", "")


def install_problem_handlers(app: FastAPI) -> None:
    """Answer every exception of this app with a problem."""
    app.add_exception_handler(NasError, answer_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(Exception, _on_bug)


def answer_error(request: Request, error: Exception) -> Response:
    """The answer to an error of ours."""
    if isinstance(error, StoreUnavailable):
        logger.warning("the store does not answer", exc_info=error)
    if isinstance(error, FilesUnavailable):
        # Where the service keeps its files is nothing that its users read.
        logger.warning("the shared files cannot be reached: %s", error, extra={"action": "files_unavailable"})
        return problem_response(request, "not-ready", detail="the place where the service keeps its files cannot be reached now")
    for kind, code in _CODES_BY_ERROR:
        if isinstance(error, kind):
            if isinstance(error, QuotaExceeded):
                return _quota_response(request, error)
            return problem_response(request, code, detail=str(error), errors=error.problems if isinstance(error, InvalidSpec) else ())
    logger.error("unexpected error of ours on %s %s", request.method, request.url.path, exc_info=error)
    return _on_bug(request, error)


def _quota_response(request: Request, error: QuotaExceeded) -> Response:
    headers = {} if error.retry_after_seconds is None else {"Retry-After": str(error.retry_after_seconds)}
    more = {"quota": error.quota, "limit": error.limit, "used": error.used}
    return problem_response(request, "quota-exceeded", detail=str(error), headers=headers, more=more)


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES_BY_STATUS.get(error.status_code, "bad-request" if error.status_code < 500 else "internal-error")
    headers = error.headers
    if error.status_code == 405:
        headers = {**(headers or {}), "Allow": ", ".join(_allowed_methods(request))}
    # The router's own two say no more than their status.
    details = {"Not Found": f"nothing is at {request.url.path}", "Method Not Allowed": f"{request.method} is not allowed at {request.url.path}"}
    detail = details.get(error.detail, error.detail)
    return problem_response(request, code, detail=detail, headers=headers, status=error.status_code)


def _allowed_methods(request: Request) -> list[str]:
    """Methods of all routes of the address; the router's own header names those of the first route alone."""
    routes = request.app.router.routes
    methods = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
    return [method for method in methods if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)]


def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [_parameter_problem(dict(detail)) for detail in error.errors()]
    return problem_response(request, "invalid-request", detail="; ".join(str(problem) for problem in problems), errors=problems)


def _parameter_problem(detail: Mapping[str, Any]) -> Problem:
    """pydantic's error about a parameter (`loc` is its place and its name) as field, expected, got."""
    field = ".".join(str(part) for part in detail["loc"][1:]) or str(detail["loc"][0])
    if str(detail["type"]).startswith("missing"):
        return Problem(field=field, expected="a value", got="nothing")
    return Problem(field=field, expected=str(detail["msg"]).removeprefix("Input should be "), got=repr(detail.get("input"))[:80])


def _on_bug(request: Request, error: Exception) -> Response:
    """The server's log has the traceback (starlette re-raises to it); the answer says nothing of the inside."""
    return problem_response(request, "internal-error", detail="an unexpected error; the log of the service says more")
