"""A learning rate that follows the loss: what it is, and that a run may be cut anywhere without changing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.compress.distillation import Progress
from nas.compress.objective import TeacherLogits
from tests.compress.training_values import Killed, assert_same_bits, kill, plan, run, stop_at, tiny_blocks, tiny_model, weights


@pytest.fixture(scope="module")
def blocks_NT() -> Tensor:
    return tiny_blocks()


@pytest.fixture(scope="module")
def objective() -> TeacherLogits:
    return TeacherLogits(tiny_model(seed=0).requires_grad_(False))


class Known:
    """A loss of given values, one per step, with a gradient that says nothing."""

    facts: dict[str, Any] = {"loss": "known"}  # noqa: RUF012

    def __init__(self, *losses: float) -> None:
        self.losses = iter(losses)

    def weights(self) -> dict[str, nn.Parameter]:
        return {}

    def loss(self, student: nn.Module, tokens_BT: Tensor, *, rows_B: Tensor) -> Tensor:
        return 0 * next(student.parameters()).sum() + next(self.losses)


def rates(objective: Any, blocks_NT: Tensor, **changes: Any) -> list[float]:
    told: list[Progress] = []
    run(objective, blocks_NT, plan(warmup_tokens=0, rate_follows_loss=True, learning_rate=1e-2, **changes), report=told.append)
    return [progress.learning_rate for progress in told]


def test_the_rate_is_the_given_one_times_the_fourth_root_of_the_loss(blocks_NT: Tensor) -> None:
    assert rates(Known(*[0.0625] * 6), blocks_NT, steps=6, decay_steps=0) == pytest.approx([5e-3] * 6)
    assert rates(Known(*[0.0625] * 6), blocks_NT, steps=6, decay_steps=2) == pytest.approx([5e-3] * 4 + [5e-3 * 2 / 3, 5e-3 / 3])


def test_the_loss_that_it_follows_is_the_mean_of_the_first_steps_then_a_running_one(blocks_NT: Tensor) -> None:
    found = rates(Known(4.0, 0.0, *[2.0] * 18), blocks_NT, steps=20, decay_steps=0)
    assert found[:3] == pytest.approx([1e-2 * 4**0.25, 1e-2 * 2**0.25, 1e-2 * 2**0.25])
    assert found[-1] == pytest.approx(1e-2 * 2**0.25)
    assert rates(Known(*[0.0] * 20, 16.0), blocks_NT, steps=21, decay_steps=0)[-1] == pytest.approx(1e-2)


def test_a_student_that_equals_its_teacher_stays(blocks_NT: Tensor) -> None:
    student, _ = run(TeacherLogits(tiny_model(seed=1).requires_grad_(False)), blocks_NT, plan(rate_follows_loss=True, learning_rate=1e-2, weight_decay=0.0))
    for name, before in weights(tiny_model(seed=1)).items():
        torch.testing.assert_close(weights(student)[name], before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("moments", ["float32", "offloaded"])
@pytest.mark.parametrize("step", [1, 5, 9])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, objective: TeacherLogits, blocks_NT: Tensor, moments: str, step: int) -> None:
    train = plan(rate_follows_loss=True, learning_rate=1e-2)
    straight, _ = run(objective, blocks_NT, train)
    with pytest.raises(Killed):
        run(objective, blocks_NT, train, checkpoint=tmp_path, should_stop=stop_at(step, by=kill), checkpoint_every_seconds=0)
    resumed, _ = run(objective, blocks_NT, plan(rate_follows_loss=True, learning_rate=1e-2, moments=moments), checkpoint=tmp_path)
    assert_same_bits(resumed, straight)


def test_the_next_rung_goes_on_with_the_rate_of_the_trunk(objective: TeacherLogits, blocks_NT: Tensor) -> None:
    train: dict[str, Any] = {"rate_follows_loss": True, "learning_rate": 1e-2}
    _, short = run(objective, blocks_NT, plan(steps=10, decay_steps=4, **train))
    straight, _ = run(objective, blocks_NT, plan(steps=20, decay_steps=4, **train))
    continued, _ = run(objective, blocks_NT, plan(steps=20, decay_steps=4, **train), state=short.trunk)
    assert_same_bits(continued, straight)
