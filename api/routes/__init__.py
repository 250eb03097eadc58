"""The REST resources under /v1. Routes parse, call the store, present; what is legal and what it costs is decided in `nas/`."""

from __future__ import annotations

from fastapi import APIRouter

from api.routes import distillations, events, leaderboard, logs, nodes, projects, registry, results, searches, trials

router = APIRouter(prefix="/v1")
for resource in (registry, nodes, searches, trials, logs, leaderboard, results, events, distillations, projects):
    router.include_router(resource.router)
