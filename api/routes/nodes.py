"""The machines of the cluster: which of them get steps, and why the others do not."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from api.cursors import AfterCursor, decode_cursor, encode_cursor, page_of
from api.openapi import problems
from api.routes.dependencies import StoreDep
from api.schemas.common import Page
from api.schemas.nodes import NodeAnswer

router = APIRouter(tags=["service"])

_ORDER = "nodes"


@router.get("/nodes", operation_id="list_nodes", summary="List the machines of the cluster", responses=problems(422))
def list_nodes(store: StoreDep, after: AfterCursor = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Page[NodeAnswer]:
    """Every machine that was seen within a day, by host: whether it gets steps, and if not, what was expected there. Needs the scope admin."""
    last = None if after is None else decode_cursor(after, order=_ORDER, kinds=((str,), (str,)))
    found = store.list_nodes(after=None if last is None else (str(last[0]), str(last[1])), limit=limit + 1)
    return page_of(found, limit=limit, answer=NodeAnswer.model_validate, cursor=lambda record: encode_cursor(_ORDER, record.host, record.id))
