"""A search whose teacher is the winner of an earlier search: prune, distil, prune again.

While the earlier one goes on, the later one waits in the queue, planned for a stand-in: the largest shape that may still win. Once there is a
winner, the controller has it planned again for that, and only then it starts. No compute, no torch: the winner's record says all that is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.architecture import read_architecture
from nas.errors import InvalidSpec, NotFound, Problem, TeacherUnavailable
from nas.shape import Shape
from nas.spec import SearchSpec
from nas.store.records import Json, SearchRecord, SearchState, all_winners
from nas.store.store import Store

ID_PREFIX = "srch_"
"""By which the name of a teacher is known for the id of a search."""


def find_source(spec: SearchSpec, *, store: Store, project: str) -> Json:
    """The teacher of a spec that names a search of its project: as it is, or the stand-in while that search goes on.

    Returns:
        `inputs["teacher"]`: name, digest (None of a stand-in), path (None until the controller has taken the winner), config, search, budget.
    Raises:
        InvalidSpec: no such search, no such budget, or there will be no winner.
    """
    try:
        source = store.get_search(spec.teacher, project=project)
    except NotFound as unknown:
        raise InvalidSpec(Problem(field="teacher", expected="a registered name or the id of a search", got=spec.teacher)) from unknown
    if source.state is SearchState.SUCCEEDED:
        try:
            return take_winner(source, budget=spec.teacher_budget)
        except TeacherUnavailable as none:
            raise InvalidSpec(Problem(field="teacher", expected="a search whose winner can be a teacher", got=str(none))) from none
    if source.state.is_terminal:
        raise InvalidSpec(Problem(field="teacher", expected="a search that has a winner, or may still have one", got=f"{source.id}, which {source.state}"))
    return _stand_in(source, budget=spec.teacher_budget)


def take_winner(source: SearchRecord, *, budget: int, data_folder: Path | None = None) -> Json:
    """The winner of a search as a teacher.

    Args:
        data_folder: below which the bundle is, where that is known.
    Raises:
        TeacherUnavailable: the budget has no winner, or its bundle is of a version that did not say what is needed.
    """
    winners = {winner["budget"]: winner for winner in all_winners(source)}
    if budget not in winners:
        has = ", ".join(map(str, winners)) or "none"
        raise TeacherUnavailable(f"search {source.id}: expected a winner of budget {budget} (teacher_budget), got winners of {has}")
    winner = winners[budget]
    if (found := winner.get("as_teacher")) is None:
        raise TeacherUnavailable(f"search {source.id}: expected a winner with the digest of its files, got one of an older version; register its bundle")
    path = None if data_folder is None else str(data_folder / Path(winner["bundle"]).with_suffix(""))
    return _teacher(source, budget=budget, digest=found["digest"], config=found["config"], path=path)


def awaited_source(inputs: Mapping[str, Any]) -> str | None:
    """Id of the search whose winner is to be taken as the teacher before anything starts; None where the teacher is known."""
    teacher = inputs.get("teacher", {})
    return teacher["search"] if "search" in teacher and teacher["path"] is None else None


def is_stand_in(inputs: Mapping[str, Any]) -> bool:
    """Whether the plan is that of a stand-in: the search whose winner will be the teacher had not ended."""
    teacher = inputs.get("teacher", {})
    return "search" in teacher and teacher["digest"] is None


def _stand_in(source: SearchRecord, *, budget: int) -> Json:
    budgets = source.plan["budgets"]
    if budget >= len(budgets):
        raise InvalidSpec(Problem(field="teacher_budget", expected=f"at most {len(budgets) - 1}, the last budget of {source.id}", got=str(budget)))
    config = source.inputs["teacher"]["config"]
    architecture, largest = read_architecture(config), Shape.from_dict(budgets[budget]["space"]["largest"]["shape"])
    # Which layers will stay is not known yet; there must be as many as the shape says.
    by_layer = {key: config[key][: largest.num_hidden_layers] for key in architecture.family.layer_lists if key in config}
    return _teacher(source, budget=budget, digest=None, config={**config, **by_layer, **architecture.config_values(largest)}, path=None)


def _teacher(source: SearchRecord, *, budget: int, digest: str | None, config: Json, path: str | None) -> Json:
    return {"name": source.id, "digest": digest, "path": path, "config": config, "search": source.id, "budget": budget}
