from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.architecture import Architecture
from nas.errors import Conflict
from nas.search import study
from nas.search.pareto import best_first
from nas.search.study import ExportedTrial, Observation, Proposal, choose_sampler, dimension_importances, export_study, propose
from nas.shape import Shape
from nas.space import Choices, SearchSpace
from nas.spec import AxisSpec, BudgetSpec, SamplerSpec, SpaceSpec

TEACHER = Shape(num_hidden_layers=5, hidden_size=64, intermediate_size=172, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
ARCHITECTURE = Architecture(model_type="llama", shape=TEACHER, vocab_size=512, tie_word_embeddings=True, attention_bias=False, mlp_bias=False)
SPACE = SearchSpace(ARCHITECTURE, space=SpaceSpec(), budget=BudgetSpec(max_fraction=0.6))
SMALL = SearchSpace(
    ARCHITECTURE,
    space=SpaceSpec(
        num_hidden_layers=AxisSpec(min=4, max=5), hidden_size=AxisSpec(min=48, max=48), intermediate_size=AxisSpec(multiple=48, max=144), min_mlp_fill=1.0
    ),
    budget=BudgetSpec(max_fraction=0.6),
)
SAMPLERS = ("gp", "tpe", "nsga2", "random", "enumerate")
MODELS = ("gp", "tpe", "nsga2")
"""Those that learn from what was observed."""


def value_of(shape: Shape) -> float:
    return -(((shape.num_hidden_layers - 4) / 5) ** 2) - ((shape.hidden_size - 48) / 64) ** 2 - ((shape.intermediate_size - 128) / 172) ** 2


def ask(space: SearchSpace, *, sampler, evaluated: list[Shape], number: int | None = None, seed: int = 0, startup: int = 4, pending=()) -> Proposal | None:
    return propose(
        space,
        sampler=sampler,
        observations=[Observation(choices=space.choices_of(shape), value=value_of(shape)) for shape in evaluated],
        pending=pending,
        seen={shape.key for shape in evaluated},
        number=len(evaluated) if number is None else number,
        seed=seed,
        num_startup_trials=startup,
    )


def draws(count: int, *, seed: int = 0) -> list[Shape]:
    generator = np.random.default_rng(seed)
    return [SPACE.draw(generator) for _ in range(count)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@settings(max_examples=8, deadline=None)
@given(count=st.integers(0, 12), seed=st.integers(0, 2**31 - 1))
def test_every_proposal_is_legal_unseen_and_reproducible(sampler, count, seed):
    evaluated = draws(count, seed=seed)

    proposal = ask(SPACE, sampler=sampler, evaluated=evaluated, seed=seed)

    assert proposal is not None
    assert proposal.shape not in evaluated
    assert SPACE.explain(proposal.shape) == ()
    assert SPACE.resolve(proposal.choices) == proposal.shape
    assert ask(SPACE, sampler=sampler, evaluated=evaluated, seed=seed) == proposal


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_small_space_is_proposed_whole_without_repeats_and_then_ends(sampler):
    evaluated: list[Shape] = []
    while (proposal := ask(SMALL, sampler=sampler, evaluated=evaluated, startup=2)) is not None:
        evaluated.append(proposal.shape)

    assert Counter(evaluated) == Counter(SMALL.shapes())


@pytest.mark.parametrize("sampler", MODELS)
def test_a_shape_in_flight_is_not_proposed_again(sampler):
    evaluated = draws(6)
    first = ask(SPACE, sampler=sampler, evaluated=evaluated)

    second = propose(
        SPACE,
        sampler=sampler,
        observations=[Observation(choices=SPACE.choices_of(shape), value=value_of(shape)) for shape in evaluated],
        pending=[first.choices],
        seen={shape.key for shape in evaluated} | {first.shape.key},
        number=6,
        seed=0,
        num_startup_trials=4,
    )

    assert second.shape != first.shape


@pytest.mark.parametrize("sampler", MODELS)
def test_the_observations_steer_the_proposal(sampler):
    evaluated = draws(20)
    towards_depth = [Observation(choices=SPACE.choices_of(shape), value=float(shape.num_hidden_layers)) for shape in evaluated]
    away_from_depth = [Observation(choices=item.choices, value=-item.value) for item in towards_depth]
    seen = {shape.key for shape in evaluated}

    deep, shallow = (
        [
            propose(SPACE, sampler=sampler, observations=told, pending=[], seen=seen, number=n, seed=1, num_startup_trials=4).shape.num_hidden_layers
            for n in range(5)
        ]
        for told in (towards_depth, away_from_depth)
    )

    assert np.mean(deep) > np.mean(shallow) + 1


@pytest.mark.parametrize("sampler", MODELS)
def test_a_second_objective_draws_the_proposals_towards_the_cheap(sampler):
    evaluated = draws(20)
    dear_is_good = [
        Observation(choices=SPACE.choices_of(shape), value=float(shape.hidden_size), costs=(float(shape.num_hidden_layers),)) for shape in evaluated
    ]

    def layers_of(told: list[Observation]) -> float:
        proposals = [
            propose(SPACE, sampler=sampler, observations=told, pending=[], seen={s.key for s in evaluated}, number=n, seed=2, num_startup_trials=4)
            for n in range(6)
        ]
        return float(np.mean([proposal.shape.num_hidden_layers for proposal in proposals]))

    inverted = [Observation(choices=item.choices, value=item.value, costs=(-item.costs[0],)) for item in dear_is_good]
    assert layers_of(dear_is_good) < layers_of(inverted)


@pytest.mark.parametrize(("num_known", "num_asks"), [(12, study.MAX_REPEATS), (study.MAX_BEST_TOLD + study.MAX_LATEST_TOLD + 1, study.MAX_REPEATS_OF_MANY)])
def test_a_shape_that_is_known_is_answered_from_memory_and_told_to_the_model_again(num_known, num_asks, monkeypatch):
    told, known = [], list(SPACE.shapes())[:num_known]

    class Stubborn(optuna.samplers.TPESampler):
        """Asks for the best there is, for as long as it is not told anything new of it."""

        def sample_independent(self, study, trial, param_name, param_distribution):
            return study.best_trial.params[param_name]

        def sample_relative(self, study, trial, search_space):
            return {}

        def infer_relative_search_space(self, study, trial):
            return {}

        def after_trial(self, study, trial, state, values):
            told.append((study.best_trial.params == trial.params, values))

    monkeypatch.setattr(study, "_optuna_sampler", lambda name, *, seed, population_size: Stubborn(seed=seed))

    proposal = ask(SPACE, sampler="tpe", evaluated=known)

    best = max(map(value_of, known))
    assert told == [(True, [best])] * num_asks
    assert proposal.shape not in known
    # What the model wanted is near: no farther than a few steps of any axis from the best one known.
    favourite = max(known, key=value_of)
    assert abs(proposal.shape.num_hidden_layers - favourite.num_hidden_layers) <= 2


def test_choices_that_resolve_to_one_shape_are_told_alike():
    shape = next(SPACE.shapes())
    told = SPACE.choices_of(shape)
    # A fill a little below the next MLP width snaps down to the same shape.
    raw = Choices(**{**told.as_dict(), "mlp_fill": told.mlp_fill + 0.005})
    assert SPACE.resolve(raw) == shape
    others = [Observation(choices=SPACE.choices_of(other), value=value_of(other)) for other in draws(6)]

    first, second = (
        propose(
            SPACE,
            sampler="tpe",
            observations=[*others, Observation(choices=choices, value=1.0)],
            pending=[],
            seen=set(),
            number=7,
            seed=0,
            num_startup_trials=1,
        )
        for choices in (raw, told)
    )

    assert first == second


def test_the_startup_draws_take_the_depths_in_turn():
    depths = [ask(SPACE, sampler="gp", evaluated=[], number=number, startup=99).shape.num_hidden_layers for number in range(6)]

    assert set(depths[:3]) == set(depths[3:]) == {3, 4, 5}


def test_two_seeds_enumerate_in_two_orders():
    first, second = (ask(SPACE, sampler="enumerate", evaluated=[], seed=seed).shape for seed in (0, 1))

    assert first != second


@pytest.mark.parametrize(
    ("spec", "space_size", "expected"),
    [
        (SamplerSpec(max_trials=24), 24, "enumerate"),
        (SamplerSpec(max_trials=24), 25, "gp"),
        (SamplerSpec(max_trials=150), 10**6, "gp"),
        (SamplerSpec(max_trials=151), 10**6, "tpe"),
        (SamplerSpec(name="random", max_trials=24), 10, "random"),
        (SamplerSpec(name="tpe", max_trials=24), 10, "tpe"),
    ],
)
def test_auto_decides_by_space_and_trials_and_a_named_sampler_stands(spec, space_size, expected):
    assert choose_sampler(spec, space_size=space_size) == expected


def test_the_dimension_that_decides_is_the_most_important():
    generator = np.random.default_rng(0)
    evaluated = [SPACE.draw(generator) for _ in range(24)]

    for dimension in ("num_hidden_layers", "hidden_size", "num_key_value_heads"):
        told = [
            Observation(choices=SPACE.choices_of(shape), value=getattr(shape, dimension) / 10 + 0.01 * float(generator.standard_normal()))
            for shape in evaluated
        ]
        shares = dimension_importances(told)

        assert next(iter(shares)) == dimension
        assert sum(shares.values()) == pytest.approx(1)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert dimension_importances(told) == shares


def test_too_few_observations_or_equal_values_have_no_importances():
    told = [Observation(choices=SPACE.choices_of(shape), value=1.0) for shape in draws(12)]

    assert dimension_importances(told) == {}
    assert dimension_importances([Observation(choices=item.choices, value=float(index)) for index, item in enumerate(told[:7])]) == {}


def exported() -> list[ExportedTrial]:
    states = ("completed", "stopped", "failed", "completed", "waiting")
    return [
        ExportedTrial(
            number=number,
            origin="sampler",
            shape=shape,
            state=state,
            values=(0.5 + number / 10, float(number)) if state == "completed" else (),
            kl_by_tokens={0: 3.0, 1000: 1.0} if state != "failed" else {},
            attributes={"parameters": 1000},
        )
        for number, (state, shape) in enumerate(zip(states, draws(5), strict=True))
    ]


@pytest.mark.parametrize("name", ["study.db", "study.log"])
def test_an_exported_study_holds_every_trial_as_optuna_reads_it(tmp_path, name):
    path = tmp_path / name
    trials = exported()

    export_study(trials, path=path, name="srch_1", objectives=["score", "memory_bytes"])

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path))) if name.endswith("log") else f"sqlite:///{path}"
    loaded = optuna.load_study(study_name="srch_1", storage=storage)
    assert [direction.name for direction in loaded.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert loaded.metric_names == ["score", "memory_bytes"]
    assert [trial.state.name for trial in loaded.trials] == ["COMPLETE", "PRUNED", "FAIL", "COMPLETE", "RUNNING"]
    assert [trial.params["hidden_size"] for trial in loaded.trials] == [trial.shape.hidden_size for trial in trials]
    assert loaded.trials[1].intermediate_values == {0: 3.0, 1000: 1.0}
    assert {trial.user_attrs["trial"] for trial in loaded.best_trials} == {0, 3}
    assert loaded.trials[3].values == [0.8, 3.0]


def test_an_export_overwrites_nothing(tmp_path):
    path = tmp_path / "study.db"
    path.write_text("mine")

    with pytest.raises(Conflict, match="expected no such file"):
        export_study(exported(), path=path, name="srch_1", objectives=["score", "memory_bytes"])
    assert path.read_text() == "mine"


@pytest.mark.parametrize("sampler", [pytest.param("gp", marks=pytest.mark.slow), "tpe", "nsga2"])
def test_a_sampler_that_learns_finds_better_shapes_than_chance(sampler):
    """The mean of the best five after 24 trials, over seeds, on a smooth landscape."""
    best = max(map(value_of, SPACE.shapes()))

    def shortfall(name: str, *, seed: int) -> float:
        evaluated: list[Shape] = []
        for number in range(24):
            proposal = ask(SPACE, sampler=name, evaluated=evaluated, number=number, seed=seed, startup=8)
            assert proposal is not None
            evaluated.append(proposal.shape)
        return best - float(np.mean(sorted(map(value_of, evaluated), reverse=True)[:5]))

    seeds = range(1) if sampler == "gp" else range(6)
    learned = np.mean([shortfall(sampler, seed=seed) for seed in seeds])
    chance = np.mean([shortfall("random", seed=seed) for seed in range(6)])

    assert learned < 0.75 * chance


def test_importing_the_study_does_not_load_torch():
    code = "import sys, nas.search.study, nas.search.ranking; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
@pytest.mark.parametrize("num_costs", [0, 1])
def test_of_many_observations_the_best_of_the_older_and_the_latest_decide(sampler, num_costs, monkeypatch):
    shapes = list({shape.key: shape for shape in draws(60)}.values())[:40]
    observed = [Observation(choices=SPACE.choices_of(shape), value=value_of(shape), costs=(float(shape.num_hidden_layers),) * num_costs) for shape in shapes]
    older, latest = observed[:32], observed[32:]
    order = best_first([(-one.value, *one.costs) for one in older]) if num_costs else sorted(range(32), key=lambda index: -older[index].value)
    told = [older[index] for index in sorted(order[:4])] + latest

    def asked(observations: list[Observation]) -> Proposal | None:
        seen = {shape.key for shape in shapes}
        return propose(SPACE, sampler=sampler, observations=observations, pending=(), seen=seen, number=40, seed=1, num_startup_trials=4)

    expected = asked(told)
    monkeypatch.setattr(study, "MAX_REPEATS_OF_MANY", study.MAX_REPEATS)
    monkeypatch.setattr(study, "MAX_BEST_TOLD", 4)
    monkeypatch.setattr(study, "MAX_LATEST_TOLD", 8)
    assert asked(observed) == expected
