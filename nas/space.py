"""SearchSpace: which shapes are legal under a budget, and the map from a sampler's raw choices to one of them.

Legal by construction: parameters are a closed form, linear in intermediate_size, so every combination of the other axes (a
*frame*) has an exact interval of MLP widths that fit. `resolve` is pure, total and deterministic; nothing over budget is
ever proposed. Optuna's soft constraints lost 1:5 against this in a synthetic test; its GP sampler learns nothing from rejections.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.cost import count_parameters, sum_parameters
from nas.errors import BudgetInfeasible, InvalidSpec, Problem
from nas.families import Architecture, Axis, read_architecture
from nas.shape import Shape
from nas.spec import AxisSpec, BudgetSpec, SearchSpec, SpaceSpec

MAX_FRAMES = 2_000_000
"""More combinations of depth, hidden size, heads and experts than this are refused at submit; coarser multiples help."""

FRAME_AXES = ("num_hidden_layers", "hidden_size", "num_key_value_heads", "query_heads_per_kv", "num_experts")
"""The axes beside the MLP's width; the last one only in a space of models with experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a sampler chooses freely; `SearchSpace.resolve` makes a legal shape of it."""

    num_hidden_layers: int
    hidden_size: int
    num_key_value_heads: int
    query_heads_per_kv: int
    mlp_fill: float
    """In (0, 1]: the share of what the other axes leave of the budget that the MLP takes."""
    num_experts: int | None = None
    """None: a dense model."""

    def as_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A budget with the teacher known: parameters between two bounds, both inclusive."""

    max_parameters: int
    min_parameters: int
    counting: str
    fraction: float | None
    """Of the teacher, where the spec says it so."""
    teacher: int
    """Counted parameters of the teacher."""

    @classmethod
    def of(cls, spec: BudgetSpec, *, architecture: Architecture) -> Budget:
        """Raises InvalidSpec when the budget is not below the teacher."""
        count = count_parameters(architecture, architecture.shape)
        teacher = count.total if spec.counting == "total" else count.non_embedding
        ceiling = spec.max_parameters if spec.max_parameters is not None else math.floor((spec.max_fraction or 0.0) * teacher)
        if ceiling >= teacher:
            raise InvalidSpec(Problem(field="budget.max_parameters", expected=f"below the teacher's {teacher} {spec.counting} parameters", got=str(ceiling)))
        return cls(
            max_parameters=ceiling, min_parameters=math.ceil(spec.min_use * ceiling), counting=spec.counting, fraction=spec.max_fraction, teacher=teacher
        )

    def too_small(self, smallest: int, *, expected: str) -> Problem:
        """That the smallest legal shape does not fit, in the field that the user wrote."""
        if self.fraction is None:
            return Problem(field="budget.max_parameters", expected=expected, got=str(self.max_parameters))
        share = math.ceil(1e4 * smallest / self.teacher) / 1e4
        return Problem(field="budget.max_fraction", expected=f"at least {share:.4f}: {expected.removeprefix('at least ')}", got=str(self.fraction))


class SearchSpace:
    """The legal shapes of one architecture under one budget. Immutable once built.

    Raises (when built):
        InvalidSpec: a range lies outside the teacher, holds no value, or the space is too fine to enumerate.
        BudgetInfeasible: no legal shape fits; the message carries the smallest legal shape and its parameters.
    """

    def __init__(self, architecture: Architecture, *, space: SpaceSpec, budget: BudgetSpec) -> None:
        self.architecture = architecture
        self._min_layers = space.num_hidden_layers.min or 1
        self.budget = Budget.of(budget, architecture=architecture)
        self.min_mlp_fill = space.min_mlp_fill
        teacher = architecture.shape
        self.axes: dict[str, tuple[int, ...]] = {
            "num_hidden_layers": _axis_values("num_hidden_layers", space.num_hidden_layers, teacher=teacher.num_hidden_layers, steps=None),
            "hidden_size": _axis_values("hidden_size", space.hidden_size, teacher=teacher.hidden_size, steps=8),
            "num_key_value_heads": _axis_values("num_key_value_heads", space.num_key_value_heads, teacher=teacher.num_key_value_heads, steps=None),
            "query_heads_per_kv": _axis_values("query_heads_per_kv", space.query_heads_per_kv, teacher=teacher.query_heads_per_kv, steps=None),
        }
        """The values of each free axis, ascending."""
        if teacher.num_experts is not None:
            self.axes["num_experts"] = _axis_values("num_experts", space.num_experts, teacher=teacher.num_experts, steps=8)
        elif space.num_experts != AxisSpec():
            raise InvalidSpec(Problem(field="space.num_experts", expected=f"nothing ({architecture.model_type} is dense)", got="a range"))
        widths = _axis_values("intermediate_size", space.intermediate_size, teacher=teacher.intermediate_size, steps=8, floor=4)
        self.intermediate_sizes = tuple(width for width in widths if architecture.allows_intermediate(width))
        if not self.intermediate_sizes:
            expected = f"a value that {architecture.model_type} takes (multiples of {architecture.family.width_multiple})"
            raise InvalidSpec(Problem(field="space.intermediate_size", expected=expected, got=str(widths)))
        num_frames = math.prod(len(values) for values in self.axes.values())
        if num_frames > MAX_FRAMES:
            raise InvalidSpec(
                Problem(field="space", expected=f"at most {MAX_FRAMES} combinations of {', '.join(self.axes)} (coarser multiples)", got=str(num_frames))
            )
        self._fill_frames()

    def _fill_frames(self) -> None:
        grids = np.meshgrid(*(np.asarray(values, dtype=np.int64) for values in self.axes.values()), indexing="ij")
        frames = np.stack([grid.ravel() for grid in grids], axis=1)
        num_experts = frames[:, 4] if "num_experts" in self.axes else None
        frames = frames[self.architecture.allows(hidden_size=frames[:, 1], num_attention_heads=frames[:, 2] * frames[:, 3], num_experts=num_experts)]
        if not len(frames):
            raise InvalidSpec(
                Problem(
                    field="space.hidden_size",
                    expected=f"a value that {self.architecture.model_type} takes with some number of attention heads and experts",
                    got=str(self.axes["hidden_size"]),
                )
            )
        widths = np.asarray(self.intermediate_sizes, dtype=np.int64)
        base, slope = self._cost_line(frames)
        # Positions in `widths`: the first wide enough for the budget's floor, and one past the last that fits its ceiling.
        low = np.searchsorted(widths, -((base - self.budget.min_parameters) // slope), side="left")
        high = np.searchsorted(widths, (self.budget.max_parameters - base) // slope, side="right")
        fits = high > low
        if not fits.any():
            self._refuse(frames, base + slope * widths[0])
        self._frames = frames[fits]
        self._base, self._slope = base[fits], slope[fits]
        floor = np.minimum((self.budget.max_parameters - self._base) // self._slope, widths[-1])
        filled = np.searchsorted(widths, np.ceil(floor * self.min_mlp_fill).astype(np.int64), side="left")
        self._high = high[fits]
        self._low = np.minimum(np.maximum(low[fits], filled), self._high - 1)
        self._scale = np.maximum(np.asarray([values[-1] - values[0] for values in self.axes.values()]), 1)

    def _cost_line(self, frames: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Counted parameters of each frame without an MLP width, and per unit of it."""
        shape = self.architecture.shape
        sizes = {
            Axis.VOCAB: self.architecture.vocab_size,
            Axis.HIDDEN: frames[:, 1],
            Axis.QUERY: frames[:, 2] * frames[:, 3] * shape.head_dim,
            Axis.KEY_VALUE: frames[:, 2] * shape.head_dim,
            Axis.HEAD_DIM: shape.head_dim,
            Axis.EXPERT: frames[:, 4] if shape.num_experts is not None else 0,
        }
        lines = []
        for width in (0, 1):
            total, embedding = sum_parameters(self.architecture, sizes={**sizes, Axis.INTERMEDIATE: width}, num_hidden_layers=frames[:, 0])
            lines.append(total - embedding if self.budget.counting == "non_embedding" else total)
        return lines[0], lines[1] - lines[0]

    def _refuse(self, frames: NDArray[np.int64], smallest: NDArray[np.int64]) -> None:
        best = int(np.argmin(smallest))
        shape = self._shape(frames[best], self.intermediate_sizes[0])
        if smallest[best] > self.budget.max_parameters:
            expected = f"at least {int(smallest[best])}, the {self.budget.counting} parameters of the smallest legal shape {shape.key}"
            raise BudgetInfeasible(self.budget.too_small(int(smallest[best]), expected=expected))
        expected = f"a share that some legal shape reaches (ceiling {self.budget.max_parameters} {self.budget.counting} parameters)"
        raise BudgetInfeasible(Problem(field="budget.min_use", expected=expected, got=f"{self.budget.min_parameters} parameters or more"))

    def _shape(self, frame: NDArray[np.int64], intermediate_size: int) -> Shape:
        layers, hidden, groups, queries, *experts = (int(value) for value in frame)
        return Shape(
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=int(intermediate_size),
            num_attention_heads=groups * queries,
            num_key_value_heads=groups,
            head_dim=self.architecture.shape.head_dim,
            num_experts=experts[0] if experts else None,
        )

    def count(self) -> int:
        """Number of legal shapes, exact."""
        return int((self._high - self._low).sum())

    def extremes(self) -> tuple[Shape, Shape]:
        """The legal shapes of the fewest and of the most counted parameters."""
        widths = np.asarray(self.intermediate_sizes, dtype=np.int64)
        fewest = int(np.argmin(self._base + self._slope * widths[self._low]))
        most = int(np.argmax(self._base + self._slope * widths[self._high - 1]))
        return self._shape(self._frames[fewest], widths[self._low[fewest]]), self._shape(self._frames[most], widths[self._high[most] - 1])

    def parameters(self, shape: Shape) -> int:
        """All parameters of a shape, whatever the budget counts."""
        return count_parameters(self.architecture, shape).total

    def shapes(self) -> Iterator[Shape]:
        """Every legal shape once, in a fixed order."""
        for frame, low, high in zip(self._frames, self._low, self._high, strict=True):
            for position in range(low, high):
                yield self._shape(frame, self.intermediate_sizes[position])

    def resolve(self, choices: Choices) -> Shape:
        """The legal shape that the choices stand for: the nearest legal frame (ties to the first), its MLP filled.

        Total and deterministic; choices that name a legal shape are kept.
        """
        wanted = np.asarray([getattr(choices, name) for name in self.axes], dtype=np.float64)
        distance = (((self._frames - wanted) / self._scale) ** 2).sum(axis=1)
        index = int(np.argmin(distance))
        room = (self.budget.max_parameters - int(self._base[index])) // int(self._slope[index])
        room = min(room, self.intermediate_sizes[-1])
        wanted_width = math.floor(room * choices.mlp_fill + 1e-9)
        position = int(np.searchsorted(np.asarray(self.intermediate_sizes), wanted_width, side="right")) - 1
        position = min(max(position, int(self._low[index])), int(self._high[index]) - 1)
        return self._shape(self._frames[index], self.intermediate_sizes[position])

    def choices_of(self, shape: Shape) -> Choices:
        """The choices that resolve to a shape (to the nearest legal one if it is not itself legal): how the sampler is told of it."""
        base, slope = self._cost_line(np.asarray([_frame_of(shape)], dtype=np.int64))
        room = min((self.budget.max_parameters - int(base[0])) // int(slope[0]), self.intermediate_sizes[-1])
        fill = min(1.0, shape.intermediate_size / room) if room > 0 else 1.0
        frame = {name: _clamp(value, self.axes[name]) for name, value in zip(FRAME_AXES, _frame_of(shape), strict=False)}
        return Choices(**frame, mlp_fill=max(fill, self.min_mlp_fill))

    def draw(self, generator: np.random.Generator) -> Shape:
        """A legal shape: a frame uniformly, then one of its MLP widths uniformly."""
        index = int(generator.integers(len(self._frames)))
        position = int(generator.integers(int(self._low[index]), int(self._high[index])))
        return self._shape(self._frames[index], self.intermediate_sizes[position])

    def explain(self, shape: Shape) -> tuple[Problem, ...]:
        """Why a user's shape cannot be evaluated here; empty if it can. A named shape may lie off the grid, not over the budget."""
        teacher = self.architecture.shape
        problems = [
            Problem(field=name, expected=f"at most the teacher's {limit}", got=str(value))
            for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_key_value_heads", "query_heads_per_kv", "num_experts")
            if (value := getattr(shape, name) or 0) > (limit := getattr(teacher, name) or 0)
        ]
        if shape.head_dim != teacher.head_dim:
            problems.append(
                Problem(field="head_dim", expected=f"the teacher's {teacher.head_dim}, which is never pruned (rotary embedding)", got=str(shape.head_dim))
            )
        problems.extend(self.architecture.refusals(shape))
        count = count_parameters(self.architecture, shape)
        counted = count.total if self.budget.counting == "total" else count.non_embedding
        if counted > self.budget.max_parameters:
            problems.append(Problem(field="parameters", expected=f"at most {self.budget.max_parameters} {self.budget.counting} parameters", got=str(counted)))
        return tuple(problems)

    def anchors(self) -> dict[str, Shape]:
        """The shapes one would take without a search, as large as the budget allows: width only, depth only, uniform; of experts also experts only.

        Width only keeps heads and experts. Depth only
        may go below the default range of layers, never below a minimum that the spec names, nor above the budget.
        An anchor with no room is absent; two may coincide.
        """
        teacher = np.asarray(_frame_of(self.architecture.shape), dtype=np.float64)
        widths = np.asarray(self.intermediate_sizes, dtype=np.float64)[self._high - 1]
        ratios = self._frames / teacher
        mlp = widths / self.architecture.shape.intermediate_size
        used = (self._base + self._slope * widths.astype(np.int64)) / self.budget.max_parameters
        whole = np.isclose(ratios, 1.0)
        heads = ratios[:, 2] * ratios[:, 3]
        spread = np.log(np.column_stack([ratios[:, :2], heads, mlp, ratios[:, 4:]])).std(axis=1)
        width_spread = np.abs(np.log(ratios[:, 1] / mlp))
        # Minitron's width pruning keeps the heads (arXiv 2408.11796, table 3); hidden and MLP shrink by one ratio.
        picks = {"width_only": (whole[:, 0] & whole[:, 2:].all(axis=1), width_spread), "uniform": (np.ones(len(used), dtype=bool), spread)}
        anchors = {}
        for name, (allowed, distance) in picks.items():
            if allowed.any():
                # A shape that leaves budget unused pays for it, so that an anchor is not small as well as simple.
                index = int(np.argmin(np.where(allowed, distance + 2.0 * (1.0 - used), np.inf)))
                anchors[name] = self._shape(self._frames[index], int(widths[index]))
        for num_hidden_layers in range(self.architecture.shape.num_hidden_layers - 1, self._min_layers - 1, -1):
            depth_only = replace(self.architecture.shape, num_hidden_layers=num_hidden_layers)
            if not self.explain(depth_only):
                anchors["depth_only"] = depth_only
                break
        for num_experts in reversed(self.axes.get("num_experts", ())):
            experts_only = replace(self.architecture.shape, num_experts=num_experts)
            if not self.explain(experts_only):
                anchors["experts_only"] = experts_only
                break
        return anchors


def build_space(spec: SearchSpec, *, inputs: Mapping[str, Any]) -> SearchSpace:
    """The search space of a stored search; `inputs` is the snapshot that the submission took."""
    return SearchSpace(read_architecture(inputs["teacher"]["config"]), space=spec.space, budget=spec.budget)


def _frame_of(shape: Shape) -> tuple[int, ...]:
    """The shape on `FRAME_AXES`."""
    experts = () if shape.num_experts is None else (shape.num_experts,)
    return shape.num_hidden_layers, shape.hidden_size, shape.num_key_value_heads, shape.query_heads_per_kv, *experts


def _clamp(value: int, values: tuple[int, ...]) -> int:
    return min(max(value, values[0]), values[-1])


def _axis_values(name: str, spec: AxisSpec, *, teacher: int, steps: int | None, floor: int = 2) -> tuple[int, ...]:
    """The legal values of one axis, ascending; the teacher's own value closes the range where no maximum is given."""
    if spec.max is not None and spec.max > teacher:
        raise InvalidSpec(Problem(field=f"space.{name}.max", expected=f"at most the teacher's {teacher}", got=str(spec.max)))
    low = spec.min if spec.min is not None else max(1, -(-teacher // floor))
    high = spec.max if spec.max is not None else teacher
    multiple = spec.multiple if spec.multiple is not None else (_default_multiple(teacher, steps=steps) if steps else 1)
    first = -(-low // multiple) * multiple
    if (high - first) // multiple > MAX_FRAMES:
        raise InvalidSpec(Problem(field=f"space.{name}.multiple", expected=f"at most {MAX_FRAMES} values", got=str((high - first) // multiple)))
    values = list(range(first, high + 1, multiple))
    if spec.max is None and low <= teacher and (not values or values[-1] != teacher):
        values.append(teacher)
    if not values:
        raise InvalidSpec(Problem(field=f"space.{name}", expected=f"a multiple of {multiple} between {low} and {high}", got="none"))
    return tuple(values)


def _default_multiple(teacher: int, *, steps: int) -> int:
    """The largest power of two, up to 256, that divides the axis into at least `steps` steps (hardware likes them)."""
    multiple = 1
    while multiple < 256 and teacher // (multiple * 2) >= steps:
        multiple *= 2
    return multiple
