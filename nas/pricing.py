"""What a spec comes to with its teacher known: legal shapes, tokens, memory and disk, the plan that is stored with a search. Pure, no torch.

A plan is a function of texts alone, the spec's and the config's, and the latest few hundred are remembered: of many searches that are submitted at
once, most differ in what no plan depends on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, cast

from nas.architecture import Architecture, read_architecture
from nas.budget import limits
from nas.compress.train_plan import trunk_rate
from nas.cost import count_parameters
from nas.errors import InvalidSpec, Problem
from nas.estimate import describe_space, planned_work, with_first_tokens
from nas.memory import TeacherMemory, Training, inference_memory, least_training_memory, preparation_disk, rung_disk, training_memory
from nas.shape import Shape
from nas.space import SearchSpace, build_spaces, forced_anchors
from nas.spec import SearchSpec, dump_spec, parse_spec

NUM_REMEMBERED = 256
"""Plans in the memory of a process, some 20 kB each; the one that was asked for longest ago is forgotten first."""

_NOT_PRICED = frozenset({"label", "labels", "seed"})
"""Fields that no plan may depend on: what makes it sees their defaults."""


def price(spec: SearchSpec, *, config: Mapping[str, Any]) -> tuple[SearchSpec, dict[str, Any]]:
    """The spec with `rungs.first_tokens` filled in where `rungs.total_tokens` says it, and its plan: legal shapes, ceilings and anchors of each budget,
    teacher parameters, learning rate, tokens per rung and at most in all.

    Args:
        config: the teacher's.
    Raises:
        InvalidSpec: an impossible range or budget, a named shape that cannot be evaluated, too few tokens.
        BudgetInfeasible: nothing fits the budget; the message says the smallest legal shape.
    """
    values = {name: value for name, value in dump_spec(spec).items() if name not in _NOT_PRICED}
    found = _price(json.dumps(values), config=json.dumps(config))
    if found.first_tokens != spec.rungs.first_tokens:
        whole, rungs = cast(Any, spec), cast(Any, spec.rungs)  # pydantic's dataclasses are none to the type checker
        spec = replace(whole, rungs=replace(rungs, first_tokens=found.first_tokens))
    return spec, json.loads(found.plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Price:
    first_tokens: int
    plan: str
    """As JSON, so that no two searches share what one of them could change."""


@lru_cache(maxsize=NUM_REMEMBERED)
def _price(text: str, *, config: str) -> _Price:
    """Of a spec and a config as JSON. What it raises is not remembered."""
    spec = parse_spec(text)
    spaces = build_spaces(spec, architecture=read_architecture(json.loads(config)))
    problems = [
        Problem(field=f"shapes.{index}.{problem.field}", expected=problem.expected, got=problem.got)
        for index, shape in enumerate(spec.shapes)
        for problem in min((space.explain(shape) for space in spaces), key=len)  # one budget that it fits is enough
    ]
    if problems:
        raise InvalidSpec(*problems)
    budgets = _describe_budgets(spec, spaces=spaces)
    spec = with_first_tokens(spec, plans=budgets)
    return _Price(first_tokens=spec.rungs.first_tokens, plan=json.dumps(_plan(spec, spaces=spaces, budgets=budgets)))


def _describe_budgets(spec: SearchSpec, *, spaces: tuple[SearchSpace, ...]) -> list[dict[str, Any]]:
    """Each budget with the teacher known, and what it searches. A shape of the user's belongs to the first budget that it fits."""
    named = [next(index for index, space in enumerate(spaces) if not space.explain(shape)) for shape in spec.shapes]
    return [
        _describe_budget(spec, space=space, named=[shape for shape, of in zip(spec.shapes, named, strict=True) if of == index])
        for index, space in enumerate(spaces)
    ]


def _plan(spec: SearchSpec, *, spaces: tuple[SearchSpace, ...], budgets: list[dict[str, Any]]) -> dict[str, Any]:
    architecture: Architecture = spaces[0].architecture
    teacher = count_parameters(architecture, architecture.shape)
    rungs = [spec.rungs.tokens(rung) for rung in range(spec.rungs.num_trained + 1)]
    work = planned_work(spec, budgets=budgets)
    learning_rate, rate_follows_loss = trunk_rate(spec.distillation.learning_rate, teacher_hidden_size=architecture.shape.hidden_size)
    return {
        "teacher_parameters": teacher.total,
        "teacher_non_embedding_parameters": teacher.non_embedding,
        "teacher_shape": architecture.shape.as_dict(),
        **budgets[0],
        "budgets": budgets,
        "rung_tokens": rungs,
        "learning_rate": learning_rate,
        "rate_follows_loss": rate_follows_loss,
        **work,
        **_needs(spec, spaces=spaces, trials=work["max_trials"]),
    }


def _describe_budget(spec: SearchSpec, *, space: SearchSpace, named: list[Shape]) -> dict[str, Any]:
    """One budget with the teacher known, and what it searches; the plan's own fields are those of the first. `named`: the user's shapes of this budget."""
    budget = space.budget
    anchors = space.anchors() if spec.controls.anchors else {}
    at_least = len(anchors) + len(named)
    return {
        "max_parameters": budget.max_parameters,
        "min_parameters": budget.min_parameters,
        "counting": budget.counting,
        "ceilings": {ceiling.cost: ceiling.maximum for ceiling in budget.ceilings},
        "teacher_costs": dict(budget.teacher),
        "workload": asdict(budget.workload),
        "latency_ceilings": {name: maximum for workload in budget.latency for name, maximum in limits(workload).items()},
        "legal_shapes": space.count(),
        "anchors": {name: _described(space.architecture, shape) for name, shape in anchors.items()},
        "space": describe_space(space),
        "searched": max(min(spec.sampler.max_trials, space.count() + at_least), at_least),
        "forced": len({*forced_anchors(spec, anchors=anchors).values(), *named}),
    }


def _needs(spec: SearchSpec, *, spaces: tuple[SearchSpace, ...], trials: int) -> dict[str, Any]:
    """Memory of one trial of the largest student in view, as asked for and at the least, and the disk that the search fills, in bytes.

    A worker compares with its own device before each step, and fits micro-batch, checkpointing and moments to it (compress/fitting.py).
    """
    architecture, settings = spaces[0].architecture, spec.distillation
    anchors = [shape for space in spaces for shape in space.anchors().values()]
    shape = max((*anchors, *spec.shapes), key=lambda shape: count_parameters(architecture, shape).total)
    dtype = settings.dtype if spec.resources.gpus else "float32"
    wanted = Training(
        sequence_length=spec.corpus.sequence_length,
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size or settings.batch_size,
        dtype=dtype,
        moments="float32" if settings.moments == "auto" else settings.moments,
        optimizer=settings.optimizer,
        device="cuda" if spec.resources.gpus else "cpu",
    )
    teacher = TeacherMemory(architecture=architecture, dtype=dtype, stored=settings.signals != "off")
    preparing = inference_memory(replace(teacher, stored=False), tokens=wanted.micro_tokens, device=wanted.device)
    disk = preparation_disk(architecture, corrected=spec.compression.teacher_correction_tokens > 0, moments=spec.compression.reconstruction)
    return {
        "memory": {
            "shape": shape.as_dict(),
            "training": training_memory(architecture, shape, training=wanted, teacher=teacher).as_dict(),
            "training_at_least": least_training_memory(architecture, shape, wanted=wanted, teacher=teacher).as_dict(),
            "preparing": preparing.as_dict(),
        },
        "disk": {
            "prepared_bytes": sum(disk.values()),
            "max_signal_bytes": 0 if settings.signals == "off" else settings.max_signal_bytes,
            "trial_bytes": sum(rung_disk(architecture, shape).values()),
            "trials": trials,
        },
    }


def _described(architecture: Architecture, shape: Shape) -> dict[str, Any]:
    return {"shape": shape.as_dict(), "parameters": count_parameters(architecture, shape).total}
