"""What `make bench` is made of, small."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from api.schemas.searches import Cost
from nas.compress.objective import TeacherLogits
from nas.compress.teacher_outputs import outputs_of
from nas.compress.train_plan import TrainPlan
from tests.benchmarks import campaign, curves, headline, reproduce, search_cost, spread
from tests.benchmarks.__main__ import SECTIONS
from tests.benchmarks.learning import Curve, Run, read_curves, tokens_to_reach, trace
from tests.benchmarks.recipes import METHODS, SHAPES, compute
from tests.compress.training_values import SEQUENCE_LENGTH, STEP_TOKENS, tiny_model

RUN = Run(teacher="stories260K", shape="mlp75", method="plain", learning_rate=2e-3, batch_size=4, train_tokens=2**20)
DATA_FILES = [file for name in campaign.CAMPAIGNS if (file := campaign.DATA / f"{name}.jsonl").exists()]


def curve(*losses: float, method: str = "plain", shape: str = "mlp75", seed: int = 0) -> Curve:
    """One point at 100, 200, 400, ... tokens."""
    run = Run(teacher="stories260K", shape=shape, method=method, learning_rate=2e-3, batch_size=4, seed=seed, train_tokens=2**20)
    tokens = [100 * 2**index for index in range(len(losses))]
    return Curve(run=run, tokens=tokens, loss=list(losses), loss_se=[0.01] * len(losses), kl=list(losses), kl_se=[0.01] * len(losses))


def test_every_section_has_its_module() -> None:
    assert [module for module in SECTIONS.values() if find_spec(f"tests.benchmarks.{module}") is None] == []


def test_tokens_between_two_points_are_linear_in_their_logarithm() -> None:
    assert tokens_to_reach(2.5, tokens=[100, 400, 800], values=[3.0, 2.0, 1.0]) == pytest.approx(200)
    assert tokens_to_reach(2.0, tokens=[100, 400, 800], values=[3.0, 2.0, 1.0]) == pytest.approx(400)


def test_a_loss_before_the_first_point_or_after_the_last_is_told_apart() -> None:
    assert tokens_to_reach(3.5, tokens=[100, 400], values=[3.0, 2.0]) == 0
    assert math.isinf(tokens_to_reach(1.9, tokens=[100, 400], values=[3.0, 2.0]))


def test_half_of_the_tokens_is_a_share_of_one_half() -> None:
    ours, plain = curve(3.0, 2.0, 1.0, method="ours"), curve(4.0, 3.0, 2.0)
    assert curves.share_of_tokens(ours, plain, tokens=400, quantity="loss") == pytest.approx(0.5)


def test_a_share_is_at_most_that_of_the_first_point() -> None:
    ours, plain = curve(1.0, 0.5, method="ours"), curve(4.0, 3.0)
    assert curves.share_of_tokens(ours, plain, tokens=200, quantity="loss") == pytest.approx(0.5)


def test_only_curves_of_the_same_shape_and_seed_are_compared() -> None:
    ours, same = curve(2.0, method="ours", seed=1), curve(3.0, seed=1)
    others = [curve(3.0, seed=0), curve(3.0, seed=1, shape="mlp50"), curve(3.0, seed=1, method="minitron")]
    assert curves.paired([ours, same, *others], teacher="stories260K", ours="ours", baseline="plain") == {"mlp75": [(ours, same)]}


def test_scratch_that_never_gets_there_is_a_bound() -> None:
    scratch = curve(5.0, 4.0, 3.0)
    assert headline.times_more(10, 4.0, scratch=scratch) == (pytest.approx(20), "20.0 x")
    assert headline.times_more(10, 2.0, scratch=scratch) == (math.inf, "> 40 x")
    assert headline.times_more(10, 6.0, scratch=scratch)[1] == "< 10.0 x"


def test_the_spread_between_seeds_is_pooled_over_shapes_of_one_method() -> None:
    found = [curve(1.0, seed=0), curve(3.0, seed=1), curve(7.0, seed=0, shape="mlp50"), curve(9.0, seed=1, shape="mlp50"), curve(50.0, method="minitron")]
    assert reproduce.seed_spread(found, like=found[0], tokens=100) == pytest.approx(math.sqrt(2))


def test_a_step_that_only_some_rungs_have_is_shown_of_those(capsys: pytest.CaptureFixture[str]) -> None:
    def rung(number: int, **seconds: float) -> dict[str, object]:
        return {"rung": number, "tokens": number, "seconds": seconds}

    details = [{"rungs": [rung(0, evaluate=2.0, latency=0.25), rung(1, distil=5.0, evaluate=1.0)]}]
    times = {"search.preparing": 0.0, "search.searching": 5.0, "search.confirming": 9.0, "search.succeeded": 20.0}
    search_cost._print_search(
        {"cost": Cost(distillation_tokens=1, step_seconds={}, device_seconds=0.0, decisions=[]).model_dump()}, details=details, times=times, cores=4
    )
    told = capsys.readouterr().out
    assert "0.25" in told
    assert "neither distillation nor evaluation: 50.0%" in told


def test_the_best_recipe_counts_only_where_every_shape_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "DATA", tmp_path)
    tried = [(1e-3, "mlp50", 2.0), (1e-3, "mixed51", 2.2), (2e-3, "mlp50", 2.1), (2e-3, "mixed51", 2.0), (4e-3, "mlp50", 1.0)]
    for rate, shape, loss in tried:
        run = Run(teacher="stories260K", shape=shape, method="plain", learning_rate=rate, batch_size=4, train_tokens=2**20)
        campaign.merge([Curve(run=run, tokens=[100_000], loss=[loss])], file=tmp_path / "grid.jsonl")
    assert campaign.best_recipe("stories260K", "plain") == (2e-3, 4)


def test_a_curve_that_was_stopped_and_went_on_is_the_curve(tmp_path: Path) -> None:
    teacher, blocks_NT = tiny_model(seed=0), torch.randint(0, 40, (32, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(0))

    def points(tokens: list[int], folder: Path) -> Curve:
        return trace(
            RUN,
            tokens=tokens,
            student=lambda: tiny_model(seed=1),
            objective=TeacherLogits(teacher),
            plan=lambda number: TrainPlan(tokens=number, decay_tokens=number // 3, learning_rate=1e-2, batch_size=4),
            train_NT=blocks_NT[:24],
            held_out_NT=blocks_NT[24:],
            held_out=outputs_of(teacher),
            folder=folder,
        )

    whole = points([4 * STEP_TOKENS, 8 * STEP_TOKENS, 16 * STEP_TOKENS], tmp_path / "whole")
    points([8 * STEP_TOKENS], tmp_path / "parts")  # as the grid does before the curves
    assert points([4 * STEP_TOKENS, 8 * STEP_TOKENS, 16 * STEP_TOKENS], tmp_path / "parts") == whole
    assert whole.kl[-1] < whole.kl[0]
    assert whole.epoch_tokens == 24 * SEQUENCE_LENGTH
    assert Curve.from_line(whole.as_line()) == whole


@pytest.mark.parametrize("file", DATA_FILES, ids=lambda file: file.stem)
def test_committed_curves_are_of_runs_that_the_benchmarks_know(file: Path) -> None:
    for found in read_curves(file):
        assert found.run.method in METHODS
        assert found.run.shape in SHAPES[found.run.teacher]
        assert found.tokens == sorted(set(found.tokens))
        assert {len(found.loss), len(found.loss_se), len(found.kl), len(found.kl_se)} == {len(found.tokens)}
        assert all(map(math.isfinite, found.loss + found.kl))


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.skipif("NAS_REFERENCE" not in os.environ, reason="needs the reference teachers: NAS_REFERENCE is not set")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_student_of_the_reference_teacher(method: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    cache = tmp_path_factory.getbasetemp() / "benchmarks"
    run = Run(teacher="stories260K", shape="mixed30", method=method, learning_rate=1e-3, batch_size=4, train_tokens=10_240)
    found = compute(run, tokens=[1_024, 10_240], folder=tmp_path, cache=cache)
    assert found.loss[1] < found.loss[0]


def test_the_spread_of_a_seed_is_told_apart_from_what_it_does_to_all_shapes() -> None:
    """Planted: shapes far apart, .05 of each seed in common, .01 of each run's own, and blocks that agree."""
    generator = np.random.default_rng(0)
    level, common = 2.0 * generator.standard_normal(20), 0.05 * generator.standard_normal(12)
    blocks = generator.uniform(0.5, 1.5, 32)
    logs = {f"shape {shape}": {seed: level[shape] + common[seed] + 0.01 * generator.standard_normal() for seed in range(12)} for shape in range(20)}
    runs = {shape: {seed: np.stack([blocks * np.exp(log)]) for seed, log in seeds.items()} for shape, seeds in logs.items()}

    found = spread.parts(runs, point=0)

    assert found["own"] == pytest.approx(0.01, rel=0.15)
    assert found["common"] == pytest.approx(float(np.std(common, ddof=1)), rel=0.1)
    assert found["within"] == pytest.approx(math.hypot(found["own"], found["common"]), rel=0.1)
    assert found["blocks"] == pytest.approx(0.0, abs=1e-9)
