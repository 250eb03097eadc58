"""What the operator has registered: teachers, corpora, lm-eval tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query

from api.cursors import AfterCursor, decode_cursor, encode_cursor, page_of
from api.openapi import problems
from api.routes.dependencies import StoreDep
from api.schemas.common import Page
from api.schemas.registry import CorpusAnswer, TaskAnswer, TeacherAnswer
from nas.store.records import CorpusRecord, TaskRecord, TeacherRecord

router = APIRouter(tags=["registry"])

Limit = Annotated[int, Query(ge=1, le=1000)]


@router.get("/teachers", operation_id="list_teachers", summary="List teachers", responses=problems(422))
def list_teachers(store: StoreDep, after: AfterCursor = None, limit: Limit = 100) -> Page[TeacherAnswer]:
    """Teachers that the operator has registered (`nas teachers add`), by name."""
    found = store.list_teachers(after=_name(after, order="teachers"), limit=limit + 1)
    return page_of(found, limit=limit, answer=TeacherAnswer.model_validate, cursor=_cursor("teachers"))


@router.get("/corpora", operation_id="list_corpora", summary="List corpora", responses=problems(422))
def list_corpora(store: StoreDep, after: AfterCursor = None, limit: Limit = 100) -> Page[CorpusAnswer]:
    """Corpora that the operator has registered (`nas corpora add`), by name."""
    found = store.list_corpora(after=_name(after, order="corpora"), limit=limit + 1)
    return page_of(found, limit=limit, answer=CorpusAnswer.model_validate, cursor=_cursor("corpora"))


@router.get("/tasks", operation_id="list_tasks", summary="List tasks", responses=problems(422))
def list_tasks(store: StoreDep, after: AfterCursor = None, limit: Limit = 100) -> Page[TaskAnswer]:
    """lm-eval tasks that the operator has registered (`nas tasks add`), by name."""
    found = store.list_tasks(after=_name(after, order="tasks"), limit=limit + 1)
    return page_of(found, limit=limit, answer=TaskAnswer.model_validate, cursor=_cursor("tasks"))


def _name(after: str | None, *, order: str) -> str | None:
    return None if after is None else str(decode_cursor(after, order=order, kinds=((str,),))[0])


def _cursor(order: str) -> Callable[[TeacherRecord | CorpusRecord | TaskRecord], str]:
    return lambda record: encode_cursor(order, record.name)
