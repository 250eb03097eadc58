"""Who asks: the project and the scopes of a request. `api/auth.py` finds out; routes and pages take a `PrincipalDep`."""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from nas.store.access import SCOPES
from nas.store.records import DEFAULT_PROJECT


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """On whose behalf a request is served."""

    project: str
    """It sees this project's searches; to it there are no others."""
    scopes: frozenset[str]
    key_id: str | None
    """The visible part of its key; None in single-user mode."""


LOCAL_USER = Principal(project=DEFAULT_PROJECT, scopes=frozenset(SCOPES), key_id=None)
"""Whoever reaches a loopback address of a service that never had a key."""

current_principal: ContextVar[Principal | None] = ContextVar("current_principal", default=None)
"""The principal of the request at work, for what every page shows and every log line says."""

_BEARER = re.compile(r"bearer +([!-~]+)", re.IGNORECASE | re.ASCII)


def parse_bearer(header: str) -> str | None:
    """The token of an Authorization header `Bearer TOKEN` (RFC 6750); None if it is anything else."""
    match = _BEARER.fullmatch(header)
    return match[1] if match else None


async def get_principal(request: Request) -> Principal:
    """Set by the middleware for every path that is not public; a route of a public path has none, and must not ask."""
    principal: Principal = request.state.principal
    return principal


PrincipalDep = Annotated[Principal, Depends(get_principal)]
