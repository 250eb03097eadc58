"""Proposals: which shape to evaluate next; what the choices were worth, and the study as Optuna's own tools read it. The only importer of optuna.

Optuna is a projection: no study is kept. Each proposal rebuilds one in memory from our own records and seeds its sampler
by (seed, number), so that the same records give the same proposal, after a restart too. Every proposal is legal and unseen.

It does not decide whose values are comparable: all observations of one call must come from one rung.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from nas.errors import Conflict
from nas.search.pareto import best_first
from nas.shape import Shape
from nas.space import Choices, SearchSpace
from nas.spec import SamplerSpec

Sampler = Literal["gp", "tpe", "nsga2", "random", "enumerate"]

MAX_TRIALS_FOR_GP = 150
"""Above this "auto" takes TPE: an ask of the GP costs about the cube of the observations."""

MAX_BEST_TOLD, MAX_LATEST_TOLD = 100, 200
"""Of more observations than both together the sampler is told the best of the older ones and the latest, so that a proposal costs the same after ten
thousand trials. TPE takes at most the 25 best for good ones, and the others for where it has been; proposals are no worse (LOG)."""

MAX_PENDING_TOLD = 100
"""The latest of them; older ones have a value soon."""

MAX_REPEATS = 5
"""Asks that may end in a seen shape before an unseen one is taken from around the first of them."""

MAX_REPEATS_OF_MANY = 1
"""The same where there are more observations than the sampler is told. Seldom does a later ask end elsewhere by then: of 800 proposals on a model of the
ground truth none was another with 5, for twice the time (LOG)."""

MAX_STEPS = 128
"""Random steps away from there, longer and longer, before any unseen shape is drawn."""

MIN_FOR_IMPORTANCE = 8
"""Observations below which no importance is told: a forest on fewer says what the noise was."""

MAX_DRAWS = 1000
"""Random draws before the unseen shapes are listed; when they all fail, few of the space are left to list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a finished trial taught: its choices and its value at one rung."""

    choices: Choices
    value: float
    """Finite, to be maximised."""
    costs: tuple[float, ...] = ()
    """Finite, to be minimised beside it; as many in every observation. Empty: one objective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A legal shape that was not evaluated yet, with the choices that resolve to it."""

    choices: Choices
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedTrial:
    """A trial as another tool is told of it."""

    number: int
    origin: str
    shape: Shape
    state: Literal["completed", "stopped", "failed", "cancelled", "running", "waiting"]
    values: Sequence[float]
    """Of a completed one: score and costs, in the order of the study's objectives."""
    kl_by_tokens: Mapping[int, float]
    """Held-out KL by the tokens of each finished rung."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """What else to show of it, plain JSON."""


_STATES = {
    "completed": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "cancelled": TrialState.FAIL,
    "running": TrialState.RUNNING,
    "waiting": TrialState.RUNNING,
}


def choose_sampler(spec: SamplerSpec, *, space_size: int) -> Sampler:
    """The sampler that the spec names; "auto" decides by the number of legal shapes and of trials."""
    if spec.name != "auto":
        return spec.name
    if space_size <= spec.max_trials:
        return "enumerate"
    return "gp" if spec.max_trials <= MAX_TRIALS_FOR_GP else "tpe"


def propose(
    space: SearchSpace,
    *,
    sampler: Sampler,
    observations: Sequence[Observation],
    pending: Sequence[Choices],
    seen: Collection[str],
    number: int,
    seed: int,
    num_startup_trials: int,
) -> Proposal | None:
    """The next shape to evaluate; None when every legal shape is seen.

    Args:
        observations: values of one rung, in the order in which they came.
        pending: choices of the trials without a value yet; the sampler keeps away from them.
        seen: keys of every shape proposed so far, whatever became of it.
        number: of the trial to come; with `seed` it decides every random draw.
        num_startup_trials: with fewer observations the shape is drawn at random, one depth after the other; also the size of a generation of NSGA-II.
    """
    seen = frozenset(seen)
    shape: Shape | None = None
    if sampler == "enumerate":
        shape = _next_in_order(space, seen=seen, seed=seed)
    elif sampler == "random":
        shape = _draw_unseen(space, seen=seen, number=number, seed=seed, depth=None)
    elif len(observations) < num_startup_trials:
        shape = _draw_unseen(space, seen=seen, number=number, seed=seed, depth=_startup_depth(space, number=number, seed=seed))
    else:
        asked = _optuna_sampler(sampler, seed=_digest(seed, number), population_size=max(num_startup_trials, 2))
        shape = _ask_unseen(space, sampler=asked, observations=observations, pending=pending, seen=seen, generator=np.random.default_rng([seed, number, 1]))
        shape = shape or _draw_unseen(space, seen=seen, number=number, seed=seed, depth=None)
    return Proposal(choices=space.choices_of(shape), shape=shape) if shape else None


def dimension_importances(observations: Sequence[Observation]) -> dict[str, float]:
    """Share of the spread of `value` that each choice explains by itself, most important first; they sum to 1.

    fANOVA over a random forest (Hutter et al., ICML 2014), with a fixed seed. At 24 observations it named the dimension that mattered most in every
    one of 20 synthetic spaces, Optuna's default (PED-ANOVA) in 16 (LOG.md). What is measured is importance *among the shapes observed*: a sampler
    that soon left the small widths says little of them. Empty with fewer than MIN_FOR_IMPORTANCE observations, or where all values are one.
    """
    if len(observations) < MIN_FOR_IMPORTANCE or len({observation.value for observation in observations}) == 1:
        return {}
    rows = [observation.choices.as_dict() for observation in observations]
    spans = {name: (min(row[name] for row in rows), max(row[name] for row in rows)) for name in rows[0]}
    distributions: dict[str, BaseDistribution] = {name: FloatDistribution(*span) for name, span in spans.items()}
    with _quiet():
        study = _new_study(None, num_costs=0)
        for row, observation in zip(rows, observations, strict=True):
            study.add_trial(create_trial(state=TrialState.COMPLETE, value=observation.value, params=row, distributions=distributions))
        found = optuna.importance.get_param_importances(study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0))
    return {name: float(share) for name, share in found.items()}


def export_study(trials: Sequence[ExportedTrial], *, path: Path, name: str, objectives: Sequence[str]) -> None:
    """Write trials as an Optuna study that `optuna-dashboard` opens: an SQLite file, or a journal where the name ends in `.log` or `.journal`.

    The first objective is the score, which is maximised; the others are costs. A trial that did not reach the last rung is `PRUNED`.

    Args:
        path: a new file. name: of the study. objectives: names of the values, in their order.
    Raises:
        Conflict: there is a file.
    """
    if path.exists():
        raise Conflict(f"{path}: expected no such file, got one; choose another name or remove it")
    rows = [_dimensions(trial.shape) for trial in trials]
    distributions: dict[str, BaseDistribution] = {
        axis: IntDistribution(min(row[axis] for row in rows), max(row[axis] for row in rows)) for axis in (rows[0] if rows else ())
    }
    with _quiet():
        is_journal = path.suffix in (".log", ".journal")
        storage = JournalStorage(JournalFileBackend(str(path))) if is_journal else f"sqlite:///{path.absolute()}"
        study = _new_study(None, num_costs=len(objectives) - 1, storage=storage, name=name)
        study.set_metric_names(list(objectives))
        for row, trial in zip(rows, trials, strict=True):
            study.add_trial(
                create_trial(
                    state=_STATES[trial.state],
                    values=trial.values if trial.state == "completed" else None,
                    params=row,
                    distributions=distributions,
                    intermediate_values=dict(trial.kl_by_tokens),
                    user_attrs={"trial": trial.number, "origin": trial.origin, **trial.attributes},
                )
            )


def _dimensions(shape: Shape) -> dict[str, int]:
    """What a shape is free to choose, by name."""
    experts = {} if shape.num_experts is None else {"num_experts": shape.num_experts}
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_key_value_heads", "query_heads_per_kv")
    return {name: getattr(shape, name) for name in names} | experts


def _next_in_order(space: SearchSpace, *, seen: frozenset[str], seed: int) -> Shape | None:
    shapes = list(space.shapes())
    order = np.random.default_rng(seed).permutation(len(shapes))
    return next((shapes[index] for index in order if shapes[index].key not in seen), None)


def _startup_depth(space: SearchSpace, *, number: int, seed: int) -> int:
    """The depths in turn, in an order of the seed's: a model of the space needs each of them."""
    depths = np.random.default_rng(seed).permutation(space.axes["num_hidden_layers"])
    return int(depths[number % len(depths)])


def _draw_unseen(space: SearchSpace, *, seen: frozenset[str], number: int, seed: int, depth: int | None) -> Shape | None:
    """An unseen legal shape, of the depth asked for if draws find one there."""
    generator = np.random.default_rng([seed, number])
    other: Shape | None = None
    for _ in range(MAX_DRAWS):
        shape = space.draw(generator)
        if shape.key in seen:
            continue
        if depth is None or shape.num_hidden_layers == depth:
            return shape
        other = other or shape
    if other is not None:
        return other
    unseen = [shape for shape in space.shapes() if shape.key not in seen]
    return unseen[int(generator.integers(len(unseen)))] if unseen else None


def _ask_unseen(
    space: SearchSpace,
    *,
    sampler: optuna.samplers.BaseSampler,
    observations: Sequence[Observation],
    pending: Sequence[Choices],
    seen: frozenset[str],
    generator: np.random.Generator,
) -> Shape | None:
    """The first unseen shape that the sampler asks for; after a few seen ones an unseen one near the first, if steps find any.

    A repeat whose value is known is told it, which flattens the model there; one without stays running, which the
    samplers keep away from. Rejecting by PRUNED or FAIL instead teaches the GP nothing: it asks for the same again.
    Where little is left unseen, a model that is sure of the best asks for that again and again: what it wants is the neighbourhood.
    """
    distributions = _distributions(space)
    values: dict[str, tuple[float, ...]] = {}
    with _quiet():
        study = _new_study(sampler, num_costs=len(observations[0].costs))
        for index, observation in enumerate(_told(observations, generation_size=_generation_size(sampler))):
            shape = space.resolve(observation.choices)
            values[shape.key] = (observation.value, *observation.costs)
            params = _params_of(space, space.choices_of(shape))
            attributes = _generation_of(index, sampler=sampler)
            study.add_trial(_Told.of(params, values=values[shape.key], distributions=distributions, attributes=attributes))
        for choices in pending[-MAX_PENDING_TOLD:]:
            params = _params_of(space, space.choices_of(space.resolve(choices)))
            study.add_trial(_Told.of(params, values=None, distributions=distributions, attributes={}))
        asked: list[dict[str, Any]] = []
        for _ in range(MAX_REPEATS if len(observations) <= MAX_BEST_TOLD + MAX_LATEST_TOLD else MAX_REPEATS_OF_MANY):
            trial = study.ask(fixed_distributions=distributions)
            asked.append(trial.params)
            shape = space.resolve(_choices_of(space, trial.params))
            if shape.key not in seen:
                return shape
            if shape.key in values:
                study.tell(trial, values[shape.key])
    return _near_unseen(space, asked[0], seen=seen, generator=generator)


class _Told(FrozenTrial):
    """A trial for a study that lives for one proposal: nobody changes it, so its copy, which costs Optuna most of the time of adding it, is a shallow one."""

    @classmethod
    def of(
        cls,
        params: dict[str, Any],
        *,
        values: Sequence[float] | None,
        distributions: dict[str, BaseDistribution],
        attributes: dict[str, Any],
    ) -> _Told:
        """A finished trial, or one that runs: without values."""
        return cls(
            number=-1,  # the study numbers it
            trial_id=-1,
            state=TrialState.RUNNING if values is None else TrialState.COMPLETE,
            value=None,
            values=values,
            datetime_start=_SOME_DAY,
            datetime_complete=None if values is None else _SOME_DAY,
            params=params,
            distributions=distributions,
            user_attrs={},
            system_attrs=attributes,
            intermediate_values={},
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Told:
        return copy.copy(self)


_SOME_DAY = datetime(2000, 1, 1)
"""No sampler reads it."""


def _told(observations: Sequence[Observation], *, generation_size: int) -> Sequence[Observation]:
    """The observations, or where they are many the best and the latest of them, in the order in which they came, in whole generations."""
    if len(observations) <= MAX_BEST_TOLD + MAX_LATEST_TOLD:
        return observations
    start = max(len(observations) - MAX_LATEST_TOLD, 0) // generation_size * generation_size
    older = observations[:start]
    num_best = max(MAX_BEST_TOLD // generation_size, 1) * generation_size
    if observations[0].costs:
        order = best_first([(-observation.value, *observation.costs) for observation in older])
    else:
        order = sorted(range(start), key=lambda index: -older[index].value)
    return [*(older[index] for index in sorted(order[:num_best])), *observations[start:]]


def _near_unseen(space: SearchSpace, params: Mapping[str, Any], *, seen: frozenset[str], generator: np.random.Generator) -> Shape | None:
    """An unseen shape a few steps from the params: along every axis at once, in steps that grow from one to the longest axis."""
    longest = max(len(values) for values in space.axes.values())
    for number in range(MAX_STEPS):
        reach = 1 + number * longest // MAX_STEPS
        moved = {name: params[name] + int(generator.integers(-reach, reach + 1)) for name in space.axes}
        near: dict[str, Any] = {name: min(max(index, 0), len(space.axes[name]) - 1) for name, index in moved.items()}
        fill = params["mlp_fill"] + generator.uniform(-1, 1) * min(reach / longest, 1.0) * (1.0 - space.min_mlp_fill)
        shape = space.resolve(_choices_of(space, {**near, "mlp_fill": min(max(fill, space.min_mlp_fill), 1.0)}))
        if shape.key not in seen:
            return shape
    return None


def _optuna_sampler(name: Literal["gp", "tpe", "nsga2"], *, seed: int, population_size: int) -> optuna.samplers.BaseSampler:
    # The start-up draws are ours (`_draw_unseen`), so the samplers get none.
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=1)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=population_size)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=1)


def _generation_size(sampler: optuna.samplers.BaseSampler) -> int:
    """Trials of a generation; 1 for the samplers that have none."""
    return (sampler.population_size or 1) if isinstance(sampler, optuna.samplers.NSGAIISampler) else 1


def _generation_of(index: int, *, sampler: optuna.samplers.BaseSampler) -> dict[str, int]:
    """Where NSGA-II keeps the generation of a trial (samplers/_ga/_base.py, Optuna 5): one that was added and not asked for has none, and is no parent."""
    if not isinstance(sampler, optuna.samplers.NSGAIISampler):
        return {}
    return {"NSGAIISampler:generation": index // _generation_size(sampler)}


def _new_study(
    sampler: optuna.samplers.BaseSampler | None, *, num_costs: int, storage: str | BaseStorage | None = None, name: str | None = None
) -> optuna.Study:
    directions = [StudyDirection.MAXIMIZE, *[StudyDirection.MINIMIZE] * num_costs]
    return optuna.create_study(directions=directions, sampler=sampler, storage=storage, study_name=name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna says on every new study what we know: experimental arguments, that a study was created."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Each axis as an index into its values: regular, ordered and small even where the teacher's own value is off the grid."""
    distributions: dict[str, BaseDistribution] = {name: IntDistribution(0, len(space.axes[name]) - 1) for name in space.axes}
    return {**distributions, "mlp_fill": FloatDistribution(space.min_mlp_fill, 1.0)}


def _params_of(space: SearchSpace, choices: Choices) -> dict[str, Any]:
    params = {name: space.axes[name].index(getattr(choices, name)) for name in space.axes}
    return {**params, "mlp_fill": min(max(choices.mlp_fill, space.min_mlp_fill), 1.0)}


def _choices_of(space: SearchSpace, params: Mapping[str, Any]) -> Choices:
    return Choices(**{name: space.axes[name][params[name]] for name in space.axes}, mlp_fill=params["mlp_fill"])


def _digest(seed: int, number: int) -> int:
    """A seed for numpy's legacy generator, which takes 32 bits; neighbours in (seed, number) are unrelated."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big")
