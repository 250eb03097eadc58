"""What is known of the trials of one budget, as they are compared: their shapes and results, the KL that each is on its way to, what each costs."""

from __future__ import annotations

import math

from nas.cost import COSTS
from nas.search.results import CONTROL, Metric, RungResult, is_repeat
from nas.search.rungs import Standing, project, projected_spread
from nas.search.seeds import SeedSpread, pooled_spread
from nas.shape import Shape
from nas.space import SearchSpace, forced_anchors
from nas.spec import SearchSpec
from nas.store.records import TrialRecord

FORCED_ORIGINS = ("user", CONTROL)
"""They reach the last rung whatever their results, as the spec's forced anchors do: the board compares with them at equal tokens."""


class Evidence:
    """Shapes and results, by trial. It grows with the search (`add_trial`, `add_result`) and decides nothing."""

    def __init__(self, spec: SearchSpec, *, space: SearchSpace) -> None:
        self.spec, self.space = spec, space
        anchors = space.anchors() if spec.controls.anchors else {}
        forced = list(forced_anchors(spec, anchors=anchors).values())
        self._forced_anchors = {shape.key for shape in forced}
        self._repeated = forced[0] if forced and spec.controls.num_repeats else None
        self.runs: list[int] = []
        """Trainings of the shape that is repeated, if one is: the anchor, then its repeats."""
        self._spreads: dict[int, SeedSpread] = {}
        """By rung, while nothing has come that can change it."""
        self.shapes: dict[int, Shape] = {}
        self.results: dict[int, dict[int, RungResult]] = {}
        """By trial and rung."""
        self._forced: set[int] = set()
        self._known_costs: dict[int, tuple[float, ...]] = {}

    def add_trial(self, trial: TrialRecord) -> None:
        """A trial that was not known."""
        shape = self.shapes[trial.number] = Shape.from_dict(trial.shape)
        origin = trial.origin.split(":")[0]
        if origin in FORCED_ORIGINS or is_repeat(trial.origin) or (origin == "anchor" and shape.key in self._forced_anchors):
            self._forced.add(trial.number)
        if is_repeat(trial.origin) or (origin == "anchor" and shape == self._repeated):
            self.runs.append(trial.number)

    def add_result(self, trial: int, result: RungResult) -> None:
        """In place of what the trial had at that rung, if anything."""
        self.results.setdefault(trial, {})[result.rung] = result
        self._known_costs.pop(trial, None)
        if trial in self.runs:
            self._spreads.clear()

    def is_forced(self, number: int) -> bool:
        """Whether it goes on whatever its results."""
        return number in self._forced

    def seed_spread(self, rung: int) -> SeedSpread:
        """The spread between seeds of what is compared at a rung: where KLs are going, at the last rung the KLs. Before training there is none to measure."""
        if rung not in self._spreads:
            spec, is_last = self.spec.rungs, rung == self.spec.rungs.num_trained
            runs = [number for number in sorted(self.runs) if rung in self.results.get(number, {})] if rung else []
            prior = spec.seed_spread if is_last else projected_spread(spec.seed_spread, rung=rung, spec=spec)
            kls = [self.results[number][rung].kl if is_last else self.projected(number, rung=rung) for number in runs]
            self._spreads[rung] = pooled_spread(prior, runs=kls)
        return self._spreads[rung]

    def standing(self, number: int, *, rung: int) -> Standing:
        """A trial at a rung that it has finished, as it is compared with others there."""
        kl, costs = self.projected(number, rung=rung), self.costs(number)
        return Standing(trial=number, depth=self.shapes[number].num_hidden_layers, kl=kl, forced=self.is_forced(number), costs=costs)

    def projected(self, number: int, *, rung: int) -> Metric:
        """What a rung is compared by: where the trial's KL is going."""
        results = self.results[number]
        return self.project(results[rung], below=results.get(rung - 1), rung=rung)

    def project(self, result: RungResult, *, below: RungResult | None, rung: int) -> Metric:
        """The same of results from elsewhere."""
        return result.kl if below is None else project(result.kl, below=below.kl, rung=rung, spec=self.spec.rungs)

    def costs(self, number: int) -> tuple[float, ...]:
        """The spec's further objectives; infinite where none of its rungs measured one. A latency is measured once, at rung 0."""
        if not self.spec.objectives:
            return ()
        if number not in self._known_costs:
            known = self.closed_costs(self.shapes[number])
            for result in self.results[number].values():
                known |= result.costs
            self._known_costs[number] = tuple(known.get(name, math.inf) for name in self.spec.objectives)
        return self._known_costs[number]

    def closed_costs(self, shape: Shape) -> dict[str, float]:
        """Those that need no measurement, under this budget's workload."""
        costs = self.space.budget.costs(self.space.architecture, shape)
        return {name: float(costs[name]) for name in COSTS}
