"""What the operator has registered: teachers, corpora, lm-eval tasks."""

from __future__ import annotations

from fastapi import APIRouter

from api.routes.dependencies import StoreDep
from api.schemas.common import Page
from api.schemas.registry import CorpusAnswer, TaskAnswer, TeacherAnswer

router = APIRouter(tags=["registry"])


@router.get("/teachers", operation_id="list_teachers", summary="List teachers")
def list_teachers(store: StoreDep) -> Page[TeacherAnswer]:
    """Teachers that the operator has registered (`nas teachers add`), by name."""
    return Page(data=[TeacherAnswer.model_validate(record) for record in store.list_teachers()])


@router.get("/corpora", operation_id="list_corpora", summary="List corpora")
def list_corpora(store: StoreDep) -> Page[CorpusAnswer]:
    """Corpora that the operator has registered (`nas corpora add`), by name."""
    return Page(data=[CorpusAnswer.model_validate(record) for record in store.list_corpora()])


@router.get("/tasks", operation_id="list_tasks", summary="List tasks")
def list_tasks(store: StoreDep) -> Page[TaskAnswer]:
    """lm-eval tasks that the operator has registered (`nas tasks add`), by name."""
    return Page(data=[TaskAnswer.model_validate(record) for record in store.list_tasks()])
