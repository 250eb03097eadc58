"""What several routes take from a request: the store, the search of the path, limits of numbers, the raw JSON body."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Path, Query, Request
from starlette.exceptions import HTTPException

from nas.errors import NotFound
from nas.settings import Settings
from nas.store.records import SearchRecord
from nas.store.store import Store

MAX_BODY_BYTES = 2**20

MAX_INTEGER = 2**31 - 1
"""Trial numbers and event sequences are 32-bit in the store."""

SEARCH_ID = re.compile(r"srch_[0-9a-z]{1,64}")


def get_store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def get_settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


StoreDep = Annotated[Store, Depends(get_store)]
SettingsDep = Annotated[Settings, Depends(get_settings)]


def get_search(search_id: Annotated[str, Path(description="The search's id: `srch_...`.")], store: StoreDep) -> SearchRecord:
    """The search of the path. Ids of another form never reach the database, which need not accept every character."""
    if not SEARCH_ID.fullmatch(search_id):
        raise NotFound(f"search: expected an id such as srch_1f2e3d, got {search_id!r}")
    return store.get_search(search_id)


SearchDep = Annotated[SearchRecord, Depends(get_search)]


def get_other(store: StoreDep, other_id: Annotated[str, Query(alias="with", description="The id of the other search: `srch_...`.")]) -> SearchRecord:
    return get_search(other_id, store)


OtherDep = Annotated[SearchRecord, Depends(get_other)]
TrialNumber = Annotated[int, Path(ge=0, le=MAX_INTEGER, description="The trial's number within its search.")]
BudgetIndex = Annotated[int, Query(ge=0, le=15, description="Which budget of a search that has several: 0 the first, 1 the first of `more_budgets`, ...")]


async def read_json_body(request: Request) -> bytes:
    """The raw body: `parse_spec` reads it itself, so that its errors name the field, and NaN is seen.

    Asking for the JSON media type also makes a browser ask before another site's page may send one.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"Content-Type: expected application/json, got {media_type or 'nothing'}")
    # FastAPI's own limit answers in plain text, and from outside every handler of ours.
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body: expected at most {MAX_BODY_BYTES} bytes, got more")
    return bytes(body)


BodyDep = Annotated[bytes, Depends(read_json_body)]
