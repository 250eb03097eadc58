"""What a search will take, before anything is spent: work in closed form from the spec and the space, time from the measured speed of its workers. Pure.

Time is an estimate: speeds are interpolated between the sizes that a probe measured (compress/speed.py), tasks are counted in bytes before there is a
tokenizer at hand, and how many trials a tie takes along is only bounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import mean
from typing import Any, cast

import numpy as np

from nas.architecture import Architecture
from nas.cost import flops_per_token
from nas.errors import InvalidSpec, Problem
from nas.shape import Shape
from nas.space import SearchSpace
from nas.spec import RungSpec, SearchSpec

STEP_SECONDS = 2.0
"""What a step costs beside its work: a process that starts and imports, files that are written."""
RELOAD_SECONDS = 10.0
"""A finalist in a fresh process."""
_DEPTH_TOKENS = 16_384
"""Of calibration that the sets of layers are compared on, at most (compress/depth.py)."""
_EXAMPLES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """A worker's speed as a function of the model's size, from its points (`compress.speed.SpeedPoint`)."""

    points: Sequence[Mapping[str, float]]

    def train_seconds(self, tokens: float, *, flops: float) -> float:
        """To train a model of so many forward FLOPs a token."""
        return tokens / self._at(flops, "trained_per_second")

    def score_seconds(self, tokens: float, *, flops: float) -> float:
        return tokens / self._at(flops, "scored_per_second")

    def _at(self, flops: float, name: str) -> float:
        """Tokens per second: FLOPs per second are linear in the log of the size between points, and those of the nearest point beyond."""
        points = sorted((point["flops_per_token"], point["flops_per_token"] * point[name]) for point in self.points)
        for (low, slow), (high, fast) in pairwise(points):
            if low <= flops <= high:
                return (slow + (fast - slow) * math.log(flops / low) / math.log(high / low)) / flops
        return (points[0] if flops < points[0][0] else points[-1])[1] / flops


@dataclass(frozen=True, slots=True, kw_only=True)
class RungWork:
    """One rung of a whole search."""

    rung: int
    expected: int
    """Trials, where nobody is tied and no depth class needs a place of its own."""
    at_most: int
    tokens: int
    """That one trial is trained on here: the decay branch of the rung below is trained again."""


def rung_work(spec: SearchSpec, *, searched: int, forced: int, repeated: int = 0) -> list[RungWork]:
    """How many trials each rung sees.

    Args:
        searched: shapes proposed in all; forced: those among them that always go on (anchors, named shapes). Controls and repeats come on top, forced too.
        repeated: repeats of an anchor.
    """
    free, most = searched - forced, searched - forced
    extra = forced + spec.controls.num_random + repeated
    work = []
    for rung in range(spec.rungs.num_trained + 1):
        work.append(RungWork(rung=rung, expected=free + extra, at_most=most + extra, tokens=spec.trained_tokens(rung)))
        free, most = (
            _promoted(free, rung=rung, spec=spec.rungs),
            min(most, math.ceil(_growth(rung, spec=spec.rungs) * _promoted(most, rung=rung, spec=spec.rungs))),
        )
    return work


def total_work(spec: SearchSpec, *, plans: Sequence[Mapping[str, Any]]) -> list[RungWork]:
    """The rungs of all budgets together, each budget with what it searches (`searched`, `forced`, `anchors`)."""
    works = [rung_work(spec, searched=plan["searched"], forced=plan["forced"], repeated=_num_repeats(spec, plan=plan)) for plan in plans]
    return [
        RungWork(rung=steps[0].rung, expected=sum(step.expected for step in steps), at_most=sum(step.at_most for step in steps), tokens=steps[0].tokens)
        for steps in zip(*works, strict=True)
    ]


def planned_work(spec: SearchSpec, *, budgets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a plan says of the work of all its budgets, which say what each searches (`searched`, `forced`, `anchors`)."""
    work = total_work(spec, plans=budgets)
    trials = sum(budget["searched"] + spec.controls.num_random + _num_repeats(spec, plan=budget) for budget in budgets)
    return {
        "rungs": [asdict(step) for step in work],
        "expected_distillation_tokens": likely_tokens(work),
        "max_trials": trials,
        "max_distillation_tokens": trials * sum(step.tokens for step in work),
    }


def _num_repeats(spec: SearchSpec, *, plan: Mapping[str, Any]) -> int:
    """Of one budget: none where no anchor is legal."""
    return spec.controls.num_repeats if plan["anchors"] else 0


def extended_plan(plan: Mapping[str, Any], *, spec: SearchSpec) -> dict[str, Any]:
    """The plan of a search whose spec has another `sampler.max_trials` by now; memory and disk stay as they were estimated at submit."""
    budgets = []
    for budget in plan["budgets"]:
        at_least = len(budget["anchors"]) + len(spec.shapes)
        searched = max(min(spec.sampler.max_trials, budget["legal_shapes"] + at_least), at_least)
        budgets.append({**budget, "searched": searched})
    return {**plan, **budgets[0], "budgets": budgets, **planned_work(spec, budgets=budgets)}


def _promoted(trials: int, *, rung: int, spec: RungSpec) -> int:
    return min(trials, math.ceil((spec.keep_untrained if rung == 0 else spec.keep) * trials - 1e-9))


def _growth(rung: int, *, spec: RungSpec) -> float:
    return 1.0 if rung == 0 else spec.max_tie_growth


def likely_tokens(work: Sequence[RungWork]) -> int:
    """Tokens that a whole search trains, with half of what ties and depth classes may add (LOG.md, rungs on the ground truth)."""
    return sum((step.expected + step.at_most) * step.tokens for step in work) // 2


def with_first_tokens(spec: SearchSpec, *, plans: Sequence[Mapping[str, Any]]) -> SearchSpec:
    """The spec with the largest `rungs.first_tokens`, in whole steps, whose likely tokens are at most `rungs.total_tokens`; unchanged without one.

    Args:
        plans: each budget with what it searches, as in `total_work`.
    Raises:
        InvalidSpec: it does not pay for two steps in the first rung; the message says what would.
    """
    total = spec.rungs.total_tokens
    if total is None:
        return spec
    step = spec.distillation.batch_size * spec.corpus.sequence_length

    def tokens(num_steps: int) -> int:
        return likely_tokens(total_work(_with_steps(spec, num_steps, step=step), plans=plans))

    # Linear in the steps but for the rounding of the decay's share.
    num_steps = max(2, total * 1000 // max(tokens(1000), 1) + 1)
    while num_steps > 2 and tokens(num_steps) > total:
        num_steps -= 1
    if tokens(num_steps) > total:
        expected = f"at least {tokens(2)}, which trains the first rung for two steps of batch_size x sequence_length = {step}"
        raise InvalidSpec(Problem(field="rungs.total_tokens", expected=expected, got=str(total)))
    return _with_steps(spec, num_steps, step=step)


def _with_steps(spec: SearchSpec, num_steps: int, *, step: int) -> SearchSpec:
    whole, rungs = cast(Any, spec), cast(Any, spec.rungs)  # pydantic's dataclasses are none to the type checker
    return cast(SearchSpec, replace(whole, rungs=replace(rungs, first_tokens=num_steps * step)))


def describe_space(space: SearchSpace) -> dict[str, Any]:
    """The legal shapes: how many, the smallest, the largest, and some between them, by parameters."""
    smallest, largest = space.extremes()
    generator = np.random.default_rng(0)
    drawn = {shape.key: shape for shape in (space.draw(generator) for _ in range(4 * _EXAMPLES))}
    examples = sorted(list(drawn.values())[:_EXAMPLES], key=space.parameters)
    return {
        "count": space.count(),
        "smallest": _described(space, smallest),
        "largest": _described(space, largest),
        "examples": [_described(space, shape) for shape in examples],
    }


def explain_shape(space: SearchSpace, shape: Shape) -> dict[str, Any]:
    """Whether a shape that somebody asks about may be searched, and why not; and whether the search may come to it without being told of it."""
    problems = space.explain(shape)
    return {
        **_described(space, shape),
        "legal": not problems,
        "proposed": space.proposes(shape),
        "problems": [{"field": p.field, "expected": p.expected, "got": p.got} for p in problems],
    }


def _described(space: SearchSpace, shape: Shape) -> dict[str, Any]:
    return {"key": shape.key, "shape": shape.as_dict(), "parameters": space.parameters(shape)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskWork:
    """What scoring one model on the tasks takes, in tokens."""

    rungs: float
    """On the documents that the rungs see."""
    held_out: float


def task_work(spec: SearchSpec, *, cards: Sequence[Mapping[str, Any]], vocab_size: int) -> TaskWork:
    """Tokens of the tasks, from the bytes that their cards tell. A token of a vocabulary of V is taken for .27 log2 V bytes (512: 2.4, 128k: 4.6)."""
    per_token = 0.27 * math.log2(max(vocab_size, 4))
    rungs = held_out = 0.0
    for card in cards:
        documents = card["num_documents"]
        seen = min(spec.evaluation.documents_per_task, documents // 2)
        kept = documents - seen
        if spec.evaluation.held_out_documents is not None:
            kept = min(kept, spec.evaluation.held_out_documents)
        per_document = card.get("bytes_per_document", 0.0) / per_token
        rungs, held_out = rungs + seen * per_document, held_out + kept * per_document
    return TaskWork(rungs=rungs, held_out=held_out)


def estimate_seconds(spec: SearchSpec, *, spaces: Sequence[SearchSpace], work: Sequence[RungWork], tasks: TaskWork, speed: Speed) -> dict[str, Any]:
    """Device seconds and wall seconds of a search by stage, for workers of one speed."""
    architecture, length = spaces[0].architecture, spec.corpus.sequence_length
    shapes = [*(shape for space in spaces for shape in space.anchors().values()), *spec.shapes] or [spaces[0].extremes()[1]]
    student = mean(flops_per_token(architecture, shape, context_length=length // 2) for shape in shapes)
    teacher = flops_per_token(architecture, architecture.shape, context_length=length // 2)
    validation = spec.corpus.validation_tokens
    beside = spec.distillation.signals == "off" or spec.distillation.hidden_states == "all"
    rungs = []
    for step in work:
        seconds = STEP_SECONDS + speed.score_seconds(validation, flops=student)
        if step.tokens:
            seconds += speed.train_seconds(step.tokens, flops=student) + (speed.score_seconds(step.tokens, flops=teacher) if beside else 0.0)
        if spec.scores_tasks(step.rung):
            seconds += speed.score_seconds(tasks.rungs, flops=student)
        rungs.append({"rung": step.rung, "seconds_per_trial": seconds, "expected": step.expected * seconds, "at_most": step.at_most * seconds})
    finalists = min(spec.num_finalists + work[-1].expected, work[-1].at_most)
    confirm = finalists * (STEP_SECONDS + RELOAD_SECONDS + speed.score_seconds(tasks.held_out + validation, flops=student))
    prepare = _prepare_seconds(spec, architecture=architecture, teacher=teacher, validation=validation, tasks=tasks, speed=speed, signals=not beside)
    parallel = spec.resources.max_parallel_trials
    device = {name: sum(rung[name] for rung in rungs) for name in ("expected", "at_most")}
    wall = {name: prepare + (seconds + confirm) / parallel for name, seconds in device.items()}
    return {
        "device_seconds": {name: round(prepare + seconds + confirm, 1) for name, seconds in device.items()},
        "wall_seconds": {name: round(seconds, 1) for name, seconds in wall.items()},
        "prepare_seconds": round(prepare, 1),
        "confirm_seconds": round(confirm / parallel, 1),
        "rungs": [{name: round(value, 2) for name, value in rung.items()} for rung in rungs],
    }


def _prepare_seconds(spec: SearchSpec, *, architecture: Architecture, teacher: float, validation: int, tasks: TaskWork, speed: Speed, signals: bool) -> float:
    """The teacher on the calibration text (importance, moments, sets of layers) and once on the training text (signals); it and random weights on the tasks."""
    layers, calibration = architecture.shape.num_hidden_layers, spec.corpus.calibration_tokens
    # Contiguous cuts of every size and greedy single removals, half of the layers run again on average.
    sets = layers * (layers + 1) // 2
    tokens = 3.0 * calibration + 0.5 * sets * min(calibration, _DEPTH_TOKENS) + 4 * validation + 2 * (tasks.rungs + tasks.held_out)
    if signals:
        tokens += spec.rungs.tokens(spec.rungs.num_trained)
    seconds = STEP_SECONDS + speed.score_seconds(tokens, flops=teacher)
    if spec.compression.teacher_correction_tokens:
        seconds += speed.train_seconds(spec.compression.teacher_correction_tokens, flops=teacher)
    return seconds
