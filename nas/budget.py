"""A budget with the teacher known: its ceilings, what a shape costs under them, and why one is over.

Closed forms (parameters, memory, FLOPs) rule which shapes are legal (space.py); measured ceilings (latency) are checked on the worker's
device at rung 0, since they hold on no other. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nas.architecture import Architecture
from nas.cost import ELEMENT_BYTES, Workload, count_costs, sum_costs
from nas.errors import InvalidSpec, Problem
from nas.families import Axis
from nas.shape import Shape
from nas.spec import BudgetSpec, LatencySpec, WorkloadSpec

DEFAULT_CONTEXT = 4096
MAX_COST = 2**62
"""Costs are computed in 64 bits."""

UNITS = {
    "parameters": "total parameters",
    "non_embedding_parameters": "non_embedding parameters",
    "memory_bytes": "bytes of weights and KV cache",
    "flops_per_token": "FLOPs per token",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The most of one cost that is known in closed form, inclusive."""

    cost: str
    """Name in `nas.cost.sum_costs`."""
    maximum: int
    minimum: int
    """What `min_use` asks of it; a shape must reach that of one ceiling."""
    field: str
    """Of the spec, as the user wrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The ceilings that hold together."""

    ceilings: tuple[Ceiling, ...]
    """At least one, and at least one below the teacher."""
    counting: str
    fraction: float | None
    """Of the teacher's parameters, where the spec says the ceiling so."""
    teacher: Mapping[str, int]
    """The teacher's costs."""
    workload: Workload
    latency: tuple[LatencySpec, ...]
    field: str
    """Of the spec: `budget`, or `more_budgets.N`."""

    @classmethod
    def of(cls, spec: BudgetSpec, *, architecture: Architecture, field: str = "budget") -> Budget:
        """Raises InvalidSpec when the parameters are not limited to fewer than the teacher's, or nothing keeps the teacher itself out."""
        workload = read_workload(spec.workload, architecture=architecture)
        teacher = count_costs(architecture, architecture.shape, workload=workload)
        if max(teacher.values()) > MAX_COST:
            raise InvalidSpec(Problem(field=f"{field}.workload", expected=f"costs of the teacher of at most {MAX_COST}", got=str(max(teacher.values()))))
        found = {name: ceiling for name, ceiling in _maxima(spec, teacher=teacher).items() if ceiling is not None}
        counted = "parameters" if spec.counting == "total" else "non_embedding_parameters"
        if (maximum := found.get(counted)) is not None and maximum >= teacher[counted]:
            expected = f"below the teacher's {teacher[counted]} {UNITS[counted]}"
            raise InvalidSpec(Problem(field=f"{field}.max_parameters", expected=expected, got=str(maximum)))
        if all(maximum >= teacher[cost] for cost, maximum in found.items()):
            if not any(limits(workload) for workload in spec.latency):
                cost, maximum = next(iter(found.items()))
                raise InvalidSpec(Problem(field=f"{field}.max_{cost}", expected=f"below the teacher's {teacher[cost]} {UNITS[cost]}", got=str(maximum)))
            found[counted] = teacher[counted] - 1  # what can only be measured may let the teacher pass, which is no candidate
        written = {counted: "max_parameters" if spec.max_fraction is None else "max_fraction"}
        ceilings = tuple(
            Ceiling(cost=cost, maximum=maximum, minimum=math.ceil(spec.min_use * maximum), field=f"{field}.{written.get(cost, f'max_{cost}')}")
            for cost, maximum in found.items()
        )
        return cls(
            ceilings=ceilings,
            counting=spec.counting,
            fraction=spec.max_fraction,
            teacher=teacher,
            workload=workload,
            latency=spec.latency,
            field=field,
        )

    def costs(self, architecture: Architecture, shape: Shape) -> dict[str, int]:
        """The closed forms of one shape under this budget's workload."""
        return count_costs(architecture, shape, workload=self.workload)

    def excess(self, costs: Mapping[str, int]) -> tuple[Problem, ...]:
        """Each ceiling that the costs of a shape are above."""
        return tuple(
            Problem(
                field="parameters" if ceiling.cost.endswith("parameters") else ceiling.cost,
                expected=f"at most {ceiling.maximum} {UNITS[ceiling.cost]}",
                got=str(costs[ceiling.cost]),
            )
            for ceiling in self.ceilings
            if costs[ceiling.cost] > ceiling.maximum
        )

    def lines(self, architecture: Architecture, *, sizes: Mapping[Axis, Any], num_hidden_layers: Any) -> dict[str, tuple[Any, Any]]:
        """Each ceiling's cost without an MLP width, and per unit of it: costs are linear in the width."""
        at = [
            sum_costs(architecture, sizes={**sizes, Axis.INTERMEDIATE: width}, num_hidden_layers=num_hidden_layers, workload=self.workload) for width in (0, 1)
        ]
        return {ceiling.cost: (at[0][ceiling.cost], at[1][ceiling.cost] - at[0][ceiling.cost]) for ceiling in self.ceilings}

    def maximum(self, cost: str) -> int | None:
        return next((ceiling.maximum for ceiling in self.ceilings if ceiling.cost == cost), None)

    @property
    def counted(self) -> str:
        """The cost that `counting` speaks of."""
        return "parameters" if self.counting == "total" else "non_embedding_parameters"

    @property
    def max_parameters(self) -> int | None:
        """Counted as `counting` says; None where another ceiling rules."""
        return self.maximum(self.counted)

    @property
    def min_parameters(self) -> int | None:
        """The least that may be proposed where the parameters are the only ceiling."""
        return self.ceilings[0].minimum if len(self.ceilings) == 1 and self.ceilings[0].cost == self.counted else None

    def too_small(self, ceiling: Ceiling, *, smallest: int, key: str) -> Problem:
        """That the smallest legal shape does not fit one ceiling, in the field that the user wrote."""
        expected = f"at least {smallest}, the {UNITS[ceiling.cost]} of the smallest legal shape {key}"
        if not ceiling.field.endswith("max_fraction"):
            return Problem(field=ceiling.field, expected=expected, got=str(ceiling.maximum))
        share = math.ceil(1e4 * smallest / self.teacher[ceiling.cost]) / 1e4
        return Problem(field=ceiling.field, expected=f"at least {share:.4f}: {expected.removeprefix('at least ')}", got=str(self.fraction))


def read_workload(spec: WorkloadSpec, *, architecture: Architecture) -> Workload:
    """The load in numbers; its context defaults to the teacher's, at most 4096 tokens."""
    context = spec.context_length or min(DEFAULT_CONTEXT, architecture.context_length or DEFAULT_CONTEXT)
    return Workload(
        batch_size=spec.batch_size,
        context_length=context,
        weight_bytes=ELEMENT_BYTES[spec.dtype],
        cache_bytes=ELEMENT_BYTES[spec.cache_dtype or spec.dtype],
    )


def limits(workload: LatencySpec) -> dict[str, float]:
    """The ceilings of one measured workload, by the name of the cost."""
    maxima = {f"prefill_ms:{workload.name}": workload.max_prefill_ms, f"decode_ms:{workload.name}": workload.max_decode_ms}
    return {name: maximum for name, maximum in maxima.items() if maximum is not None}


def measured_excess(spec: BudgetSpec, costs: Mapping[str, float]) -> tuple[Problem, ...]:
    """Each measured ceiling that a trial's costs are above; one that was not measured is none."""
    return tuple(
        Problem(field=name, expected=f"at most {maximum:g} ms", got=f"{costs[name]:.4g} ms")
        for workload in spec.latency
        for name, maximum in limits(workload).items()
        if name in costs and costs[name] > maximum
    )


def _maxima(spec: BudgetSpec, *, teacher: Mapping[str, int]) -> dict[str, int | None]:
    counted = "parameters" if spec.counting == "total" else "non_embedding_parameters"
    parameters = math.floor(spec.max_fraction * teacher[counted]) if spec.max_fraction is not None else spec.max_parameters
    return {counted: parameters, "memory_bytes": spec.max_memory_bytes, "flops_per_token": spec.max_flops_per_token}
