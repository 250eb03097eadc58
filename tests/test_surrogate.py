"""What searches are replayed on where no table can answer: the surrogate of the ground truth, on results made up here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from nas.architecture import read_architecture
from nas.shape import Shape
from nas.space import SearchSpace
from nas.spec import BudgetSpec, SpaceSpec
from tests.benchmarks.samplers import check, replay
from tests.benchmarks.surrogate import TOKENS, Field, Measured, Surrogate, features, fit, judge, leave_one_out, make_field
from tests.test_ground_truth import TEACHER

SPACE = SearchSpace(read_architecture(TEACHER), space=SpaceSpec(), budget=BudgetSpec(max_fraction=0.6))
NUM_BLOCKS = 64


def log_kl_of(shapes: list[Shape]) -> NDArray[np.float64]:
    """Falls with the tokens, and has one smooth valley over layers and widths."""
    layers, hidden, mlp, *_ = (features(shapes) - features([Shape.from_key("L4-D56-F112-H8-K4-E8")])).T
    return np.log(2.0 / (1 + np.arange(len(TOKENS)))) + (0.1 * layers**2 + 0.3 * hidden**2 + 0.2 * mlp**2)[:, None]


def make_measured(*, number: int = 60, noise: float = 0.0, on_grid: int | None = None) -> Measured:
    generator = np.random.default_rng(0)
    drawn = {shape.key: shape for shape in (SPACE.draw(generator) for _ in range(number))}
    anchors = {shape.key: shape for shape in SPACE.anchors().values()}
    shapes = list((anchors | drawn).values())
    log_kl = log_kl_of(shapes)
    return Measured(
        shapes=tuple(shapes),
        is_on_grid=np.arange(len(shapes)) < (len(shapes) if on_grid is None else on_grid),
        log_kl=log_kl + noise * generator.standard_normal(log_kl.shape),
        patterns=np.ones((len(shapes), len(TOKENS), NUM_BLOCKS)),
        seed_sd=np.full(len(TOKENS), noise),
        final_error=0.01,
    )


@pytest.fixture(scope="module")
def surrogate() -> Surrogate:
    return fit(make_measured())


@pytest.fixture(scope="module")
def field(surrogate: Surrogate) -> Field:
    return make_field(SPACE, num_landscapes=3, surrogate=surrogate)


def test_a_smooth_truth_is_predicted_for_shapes_that_were_not_measured(surrogate: Surrogate) -> None:
    shapes = list(SPACE.shapes())
    mean, _ = surrogate.predict(shapes)
    assert np.abs(mean - log_kl_of(shapes)).max() < 0.1 * np.ptp(log_kl_of(shapes)[:, -1])


def test_the_surrogate_knows_what_it_does_not_know() -> None:
    measured = make_measured(noise=0.05)
    mean, spread = leave_one_out(measured, surrogate=fit(measured))
    found = judge(mean, spread, log_kl=measured.log_kl)
    assert found.calibration == pytest.approx(1.0, abs=0.3)
    assert found.rmse[-1] == pytest.approx(0.05, rel=0.4)


def test_shapes_beside_the_grid_are_judged_by_a_surrogate_that_never_saw_them() -> None:
    measured = make_measured(on_grid=40)
    off = ~measured.is_on_grid
    wrong = replace(measured, log_kl=np.where(off[:, None], measured.log_kl + 1.0, measured.log_kl))
    *_, (_, beside) = check(wrong)
    assert beside.num_shapes == off.sum()
    assert beside.rmse[-1] == pytest.approx(1.0, abs=0.1)
    assert beside.tau[-1] > 0.9


def test_a_landscape_goes_through_what_was_measured(surrogate: Surrogate) -> None:
    drawn = surrogate.draws(surrogate.measured.shapes, number=5, seed=0)
    np.testing.assert_allclose(drawn, np.broadcast_to(surrogate.measured.log_kl, drawn.shape), atol=0.03)


def test_landscapes_differ_where_nothing_was_measured() -> None:
    few = make_measured(number=6)
    shapes = list(SPACE.shapes())
    drawn = fit(few).draws(shapes, number=20, seed=0)[:, :, -1].std(axis=0)
    known = np.isin([shape.key for shape in shapes], [shape.key for shape in few.shapes])
    assert drawn[~known].mean() > 3 * drawn[known].mean()


def test_only_the_best_shape_of_a_landscape_has_no_regret(field: Field) -> None:
    for landscape in field.landscapes:
        regrets = np.array([landscape.regret(index) for index in range(len(landscape.shapes))])
        assert regrets.argmin() == landscape.log_kl[:, -1].argmin()
        assert regrets.min() == 0.0


def test_a_search_that_takes_every_shape_to_the_last_rung_ends_with_the_best(field: Field) -> None:
    found = replay(field, sampler="enumerate", num_trials=SPACE.count() + 3, num_replays=1, changes={"rungs": {"keep": 1.0, "keep_untrained": 1.0}})
    assert found.regrets == found.proposed == (0.0,)


def test_the_same_landscapes_and_chance_meet_every_setting(field: Field) -> None:
    one, again = (replay(field, sampler="random", num_trials=8, num_replays=3) for _ in range(2))
    assert (one.regrets, one.tokens) == (again.regrets, again.tokens)
    assert len(set(replay(field, sampler="tpe", num_trials=20, num_replays=3).regrets)) > 1
