"""What several routes take from a request: the store, the search of the path, limits of numbers."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Path, Query, Request

from api.principal import PrincipalDep
from nas.errors import NotFound
from nas.settings import Settings
from nas.store.records import SearchRecord
from nas.store.store import Store

MAX_INTEGER = 2**31 - 1
"""Trial numbers and event sequences are 32-bit in the store."""

SEARCH_ID = re.compile(r"srch_[0-9a-z]{1,64}")


async def get_store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


async def get_settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


StoreDep = Annotated[Store, Depends(get_store)]
SettingsDep = Annotated[Settings, Depends(get_settings)]


def get_search(search_id: Annotated[str, Path(description="The search's id: `srch_...`.")], store: StoreDep, principal: PrincipalDep) -> SearchRecord:
    """The search of the path; another project's is none. Ids of another form never reach the database, which need not accept every character."""
    if not SEARCH_ID.fullmatch(search_id):
        raise NotFound(f"search: expected an id such as srch_1f2e3d, got {search_id!r}")
    return store.get_search(search_id, project=principal.project)


SearchDep = Annotated[SearchRecord, Depends(get_search)]


def get_other(
    store: StoreDep, principal: PrincipalDep, other_id: Annotated[str, Query(alias="with", description="The id of the other search: `srch_...`.")]
) -> SearchRecord:
    return get_search(other_id, store, principal)


OtherDep = Annotated[SearchRecord, Depends(get_other)]
TrialNumber = Annotated[int, Path(ge=0, le=MAX_INTEGER, description="The trial's number within its search.")]
BudgetIndex = Annotated[int, Query(ge=0, le=15, description="Which budget of a search that has several: 0 the first, 1 the first of `more_budgets`, ...")]
