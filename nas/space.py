"""SearchSpace: which shapes are legal under a budget, and the map from a sampler's raw choices to one of them.

Legal by construction: parameters, memory and FLOPs are closed forms, linear in intermediate_size, so every combination of the other axes
(a *frame*) has an exact interval of MLP widths that fit all ceilings. `resolve` is pure, total and deterministic; nothing over budget is
ever proposed. Optuna's soft constraints lost 1:5 against this in a synthetic test; its GP sampler learns nothing from rejections.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.architecture import Architecture, read_architecture
from nas.budget import UNITS, Budget
from nas.cost import count_parameters, sum_costs
from nas.deployability import heads_divide
from nas.errors import BudgetInfeasible, InvalidSpec, Problem
from nas.families import Axis
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


class SearchSpace:
    """The legal shapes of one architecture under one budget. Immutable once built.

    Raises (when built):
        InvalidSpec: a range lies outside the teacher, holds no value, or the space is too fine to enumerate.
        BudgetInfeasible: no legal shape fits; the message carries the smallest legal shape and its parameters.
    """

    def __init__(self, architecture: Architecture, *, space: SpaceSpec, budget: BudgetSpec, field: str = "budget") -> None:
        """`field`: of the spec in which the budget stands, for the errors."""
        self.architecture = architecture
        self._min_layers = space.num_hidden_layers.min or 1
        self._multiple, self._devices = space.multiples_of or 1, space.tensor_parallel
        self.budget = Budget.of(budget, architecture=architecture, field=field)
        self.min_mlp_fill = space.min_mlp_fill
        teacher = architecture.shape
        self.axes: dict[str, tuple[int, ...]] = {
            "num_hidden_layers": _axis_values("num_hidden_layers", space.num_hidden_layers, teacher=teacher.num_hidden_layers, steps=None),
            "hidden_size": _axis_values("hidden_size", space.hidden_size, teacher=teacher.hidden_size, steps=8, divisor=self._multiple),
            "num_key_value_heads": _axis_values("num_key_value_heads", space.num_key_value_heads, teacher=teacher.num_key_value_heads, steps=None),
            "query_heads_per_kv": _axis_values("query_heads_per_kv", space.query_heads_per_kv, teacher=teacher.query_heads_per_kv, steps=None),
        }
        """The values of each free axis, ascending."""
        if teacher.num_experts is not None:
            self.axes["num_experts"] = _axis_values("num_experts", space.num_experts, teacher=teacher.num_experts, steps=8)
        elif space.num_experts != AxisSpec():
            raise InvalidSpec(Problem(field="space.num_experts", expected=f"nothing ({architecture.model_type} is dense)", got="a range"))
        divisor = math.lcm(self._multiple, self._devices)
        widths = _axis_values("intermediate_size", space.intermediate_size, teacher=teacher.intermediate_size, steps=8, floor=4, divisor=divisor)
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
        self._shapes_of: dict[Choices, Shape] = {}
        self._choices_of: dict[Shape, Choices] = {}

    def _fill_frames(self) -> None:
        grids = np.meshgrid(*(np.asarray(values, dtype=np.int64) for values in self.axes.values()), indexing="ij")
        frames = np.stack([grid.ravel() for grid in grids], axis=1)
        num_experts = frames[:, 4] if "num_experts" in self.axes else None
        frames = frames[self.architecture.allows(hidden_size=frames[:, 1], num_attention_heads=frames[:, 2] * frames[:, 3], num_experts=num_experts)]
        divided = heads_divide(num_attention_heads=frames[:, 2] * frames[:, 3], num_key_value_heads=frames[:, 2], devices=self._devices)
        if len(frames) and not len(frames := frames[divided]):
            raise InvalidSpec(Problem(field="space.tensor_parallel", expected="a number of devices over which some heads divide", got=str(self._devices)))
        if not len(frames):
            raise InvalidSpec(
                Problem(
                    field="space.hidden_size",
                    expected=f"a value that {self.architecture.model_type} takes with some number of attention heads and experts",
                    got=str(self.axes["hidden_size"]),
                )
            )
        self._scale = np.maximum(np.asarray([values[-1] - values[0] for values in self.axes.values()]), 1)
        widths, lines, ceilings = np.asarray(self.intermediate_sizes, dtype=np.int64), self._lines(frames), self.budget.ceilings
        room = self._room_of(frames)
        # Positions in `widths`: the first that uses enough of one ceiling, and one past the last that fits them all.
        enough = [-((base - ceiling.minimum) // slope) for ceiling, (base, slope) in zip(ceilings, lines, strict=True)]
        low = np.searchsorted(widths, np.min(enough, axis=0), side="left")
        high = np.searchsorted(widths, room, side="right")
        fits = high > low
        if not fits.any():
            self._refuse(frames, smallest=[base + slope * widths[0] for base, slope in lines])
        self._frames, self._room, self._high = frames[fits], room[fits], high[fits]
        filled = np.searchsorted(widths, np.ceil(self._room * self.min_mlp_fill).astype(np.int64), side="left")
        self._low = np.minimum(np.maximum(low[fits], filled), self._high - 1)

    def _lines(self, frames: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """By ceiling: the cost of each frame without an MLP, and per unit of its width."""
        return list(self.budget.lines(self.architecture, sizes=self._sizes(frames), num_hidden_layers=frames[:, 0]).values())

    def _sizes(self, frames: NDArray[np.int64]) -> dict[Axis, Any]:
        """Length of every axis but the MLP's."""
        shape = self.architecture.shape
        return {
            Axis.VOCAB: self.architecture.vocab_size,
            Axis.HIDDEN: frames[:, 1],
            Axis.QUERY: frames[:, 2] * frames[:, 3] * shape.head_dim,
            Axis.KEY_VALUE: frames[:, 2] * shape.head_dim,
            Axis.HEAD_DIM: shape.head_dim,
            Axis.EXPERT: frames[:, 4] if shape.num_experts is not None else 0,
        }

    def _room_of(self, frames: NDArray[np.int64]) -> NDArray[np.int64]:
        """The widest MLP that each frame's ceilings and the teacher leave; below 1 where the frame alone is over one."""
        lines = zip(self.budget.ceilings, self._lines(frames), strict=True)
        rooms = np.asarray([(ceiling.maximum - base) // slope for ceiling, (base, slope) in lines], dtype=np.int64)
        return np.asarray(np.minimum(rooms.min(axis=0), self.intermediate_sizes[-1]), dtype=np.int64)

    def _refuse(self, frames: NDArray[np.int64], *, smallest: list[NDArray[np.int64]]) -> None:
        """Why nothing fits: each ceiling that the smallest shape of all is above, else those above which the least bad shape is."""
        ceilings, width = self.budget.ceilings, self.intermediate_sizes[0]
        problems = []
        for ceiling, costs in zip(ceilings, smallest, strict=True):
            best = int(np.argmin(costs))
            if costs[best] > ceiling.maximum:
                problems.append(self.budget.too_small(ceiling, smallest=int(costs[best]), key=self._shape(frames[best], width).key))
        excess = np.max([costs / ceiling.maximum for ceiling, costs in zip(ceilings, smallest, strict=True)], axis=0)
        best = int(np.argmin(excess))
        if not problems and excess[best] > 1:
            key = self._shape(frames[best], width).key
            over = [(ceiling, int(costs[best])) for ceiling, costs in zip(ceilings, smallest, strict=True) if costs[best] > ceiling.maximum]
            problems = [self.budget.too_small(ceiling, smallest=cost, key=key) for ceiling, cost in over]
        if problems:
            raise BudgetInfeasible(*problems)
        expected = "a share that some legal shape reaches (" + "; ".join(f"ceiling {ceiling.maximum} {UNITS[ceiling.cost]}" for ceiling in ceilings) + ")"
        least = " or ".join(f"{ceiling.minimum} {UNITS[ceiling.cost]}" for ceiling in ceilings)
        raise BudgetInfeasible(Problem(field=f"{self.budget.field}.min_use", expected=expected, got=f"{least} or more"))

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
        fewest, most = int(np.argmin(self._counted(widths[self._low]))), int(np.argmax(self._counted(widths[self._high - 1])))
        return self._shape(self._frames[fewest], widths[self._low[fewest]]), self._shape(self._frames[most], widths[self._high[most] - 1])

    def _counted(self, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Parameters of every legal frame with an MLP width each, as the budget counts them."""
        sizes = {**self._sizes(self._frames), Axis.INTERMEDIATE: widths}
        costs = sum_costs(self.architecture, sizes=sizes, num_hidden_layers=self._frames[:, 0], workload=self.budget.workload)
        return np.asarray(costs[self.budget.counted], dtype=np.int64)

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

        Total and deterministic; choices that name a legal shape are kept. Remembered: every proposal asks for those of all trials.
        """
        if choices not in self._shapes_of:
            self._shapes_of[choices] = self._resolve(choices)
        return self._shapes_of[choices]

    def _resolve(self, choices: Choices) -> Shape:
        wanted = np.asarray([getattr(choices, name) for name in self.axes], dtype=np.float64)
        distance = (((self._frames - wanted) / self._scale) ** 2).sum(axis=1)
        index = int(np.argmin(distance))
        wanted_width = math.floor(int(self._room[index]) * choices.mlp_fill + 1e-9)
        position = int(np.searchsorted(np.asarray(self.intermediate_sizes), wanted_width, side="right")) - 1
        position = min(max(position, int(self._low[index])), int(self._high[index]) - 1)
        return self._shape(self._frames[index], self.intermediate_sizes[position])

    def choices_of(self, shape: Shape) -> Choices:
        """The choices that resolve to a shape (to the nearest legal one if it is not itself legal): how the sampler is told of it. Remembered."""
        if shape not in self._choices_of:
            self._choices_of[shape] = self._invert(shape)
        return self._choices_of[shape]

    def _invert(self, shape: Shape) -> Choices:
        room = int(self._room_of(np.asarray([_frame_of(shape)], dtype=np.int64))[0])
        fill = min(1.0, shape.intermediate_size / room) if room > 0 else 1.0
        frame = {name: _clamp(value, self.axes[name]) for name, value in zip(FRAME_AXES, _frame_of(shape), strict=False)}
        return Choices(**frame, mlp_fill=max(fill, self.min_mlp_fill))

    def proposes(self, shape: Shape) -> bool:
        """Whether a shape is one of those that are counted, from which the search proposes; a named one need not be."""
        return self.resolve(self.choices_of(shape)) == shape

    def draw(self, generator: np.random.Generator) -> Shape:
        """A legal shape: a frame uniformly, then one of its MLP widths uniformly."""
        index = int(generator.integers(len(self._frames)))
        position = int(generator.integers(int(self._low[index]), int(self._high[index])))
        return self._shape(self._frames[index], self.intermediate_sizes[position])

    def explain(self, shape: Shape) -> tuple[Problem, ...]:
        """Why a user's shape cannot be evaluated here; empty if it can. A named shape may lie off the grid, not over a ceiling, nor off a hard multiple."""
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
        problems.extend(
            Problem(field=name, expected=f"a multiple of space.multiples_of={self._multiple}", got=str(size))
            for name in ("hidden_size", "intermediate_size")
            if (size := getattr(shape, name)) % self._multiple
        )
        problems.extend(_undivided(shape, devices=self._devices))
        return (*problems, *self.budget.excess(self.budget.costs(self.architecture, shape)))

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
        lines = zip(self.budget.ceilings, self._lines(self._frames), strict=True)
        used = np.max([(base + slope * widths.astype(np.int64)) / ceiling.maximum for ceiling, (base, slope) in lines], axis=0)
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


def build_spaces(spec: SearchSpec, *, architecture: Architecture) -> tuple[SearchSpace, ...]:
    """The legal shapes under each of the spec's budgets, in their order."""
    names = ["budget", *(f"more_budgets.{index}" for index in range(len(spec.more_budgets)))]
    return tuple(SearchSpace(architecture, space=spec.space, budget=budget, field=name) for name, budget in zip(names, spec.budgets, strict=True))


def forced_anchors(spec: SearchSpec, *, anchors: Mapping[str, Shape]) -> dict[str, Shape]:
    """The anchors that reach the last rung whatever their results: the board compares with them at equal tokens."""
    order = ("uniform", "width_only", "depth_only", "experts_only")
    return {name: anchors[name] for name in sorted(anchors, key=order.index)[: spec.controls.num_forced_anchors]}


def build_space(spec: SearchSpec, *, inputs: Mapping[str, Any], budget: int = 0) -> SearchSpace:
    """The search space of a stored search, under one of its budgets; `inputs` is the snapshot that the submission took."""
    return SearchSpace(read_architecture(inputs["teacher"]["config"]), space=spec.space, budget=spec.budgets[budget])


def _undivided(shape: Shape, *, devices: int) -> list[Problem]:
    """What does not divide over the devices, in words."""
    over = f"space.tensor_parallel={devices}"
    sizes = {"num_attention_heads": shape.num_attention_heads, "intermediate_size": shape.intermediate_size}
    problems = [Problem(field=name, expected=f"a multiple of {over}", got=str(size)) for name, size in sizes.items() if size % devices]
    if (groups := shape.num_key_value_heads) % devices and devices % groups:
        problems.append(Problem(field="num_key_value_heads", expected=f"a multiple or a divisor of {over}", got=str(groups)))
    return problems


def _frame_of(shape: Shape) -> tuple[int, ...]:
    """The shape on `FRAME_AXES`."""
    experts = () if shape.num_experts is None else (shape.num_experts,)
    return shape.num_hidden_layers, shape.hidden_size, shape.num_key_value_heads, shape.query_heads_per_kv, *experts


def _clamp(value: int, values: tuple[int, ...]) -> int:
    return min(max(value, values[0]), values[-1])


def _axis_values(name: str, spec: AxisSpec, *, teacher: int, steps: int | None, floor: int = 2, divisor: int = 1) -> tuple[int, ...]:
    """The legal values of one axis, ascending; the teacher's own value closes the range where no maximum is given.

    Args:
        divisor: what every value must divide by, the teacher's own too.
    """
    if spec.max is not None and spec.max > teacher:
        raise InvalidSpec(Problem(field=f"space.{name}.max", expected=f"at most the teacher's {teacher}", got=str(spec.max)))
    low = spec.min if spec.min is not None else max(1, -(-teacher // floor))
    high = spec.max if spec.max is not None else teacher
    wanted = _default_multiple(teacher, steps=steps) if steps else 1
    multiple = math.lcm(spec.multiple, divisor) if spec.multiple is not None else -(-wanted // divisor) * divisor
    first = -(-low // multiple) * multiple
    if (high - first) // multiple > MAX_FRAMES:
        raise InvalidSpec(Problem(field=f"space.{name}.multiple", expected=f"at most {MAX_FRAMES} values", got=str((high - first) // multiple)))
    values = list(range(first, high + 1, multiple))
    if spec.max is None and low <= teacher and teacher % divisor == 0 and (not values or values[-1] != teacher):
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
