"""Who asks, and what is left of its quotas."""

from __future__ import annotations

from fastapi import APIRouter

from api.principal import PrincipalDep
from api.routes.dependencies import StoreDep
from api.schemas.projects import ProjectAnswer, QuotasAnswer, UsageAnswer
from nas.store.access import SCOPES

router = APIRouter(tags=["service"])


@router.get("/project", operation_id="get_project", summary="Get one's own project")
def read_project(principal: PrincipalDep, store: StoreDep) -> ProjectAnswer:
    """The project that the key opens, its scopes, its quotas and what is used of them. Other projects are not to be seen."""
    project, usage = store.get_project(principal.project)
    return ProjectAnswer(
        name=project.name,
        key_id=principal.key_id,
        scopes=[scope for scope in SCOPES if scope in principal.scopes],
        quotas=QuotasAnswer.model_validate(project.quotas),
        usage=UsageAnswer.model_validate(usage),
    )
