"""What the API and the pages say of a full distillation, worked out from its records. Pure; reads no store, knows no HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from api.schemas.distillations import DistillationAnswer, DistillationDetail, DistillationSummary, DistilledAnswer
from api.schemas.trials import AttemptAnswer, PointAnswer
from api.summary import describe_inputs, thin
from nas.store.records import AttemptRecord, PointRecord, SearchRecord, SearchState

MAX_POINTS = 500


def summarise_distillation(distillation: SearchRecord) -> DistillationSummary:
    return DistillationSummary.model_validate(
        {
            "id": distillation.id,
            "search": distillation.distils,
            "trial": distillation.spec["trial"],
            "label": distillation.label,
            "state": distillation.state.value,
            "tokens": distillation.spec["recipe"]["tokens"],
            "created_at": distillation.created_at,
            "updated_at": distillation.updated_at,
            "started_at": distillation.started_at,
            "finished_at": distillation.finished_at,
        }
    )


def describe_distillation(distillation: SearchRecord) -> DistillationAnswer:
    result = distillation.winner if distillation.state is SearchState.SUCCEEDED else None
    file_url = f"/v1/distillations/{distillation.id}/file"
    return DistillationAnswer(
        **dict(summarise_distillation(distillation)),
        recipe=distillation.spec["recipe"],
        resources=distillation.spec["resources"],
        limits=distillation.spec["limits"],
        inputs=describe_inputs(distillation.inputs),
        result=None if result is None else DistilledAnswer.model_validate({**result, "file_url": file_url}),
        error=distillation.error,
        version=distillation.version,
    )


def detail_distillation(distillation: SearchRecord, *, attempts: Sequence[AttemptRecord], points: Sequence[PointRecord]) -> DistillationDetail:
    last = points[-1] if points else None
    left = distillation.spec["recipe"]["tokens"] - (last.tokens if last else 0)
    speed = last.tokens_per_second if last and distillation.state is SearchState.RUNNING else 0.0
    return DistillationDetail(
        **dict(describe_distillation(distillation)),
        tokens_done=last.tokens if last else 0,
        seconds_left=max(0, left) / speed if speed > 0 else None,
        attempts=[AttemptAnswer.model_validate(attempt) for attempt in attempts],
        num_points=len(points),
        points=[PointAnswer.model_validate(point) for point in thin(points, max_points=MAX_POINTS)],
    )
