"""Settings that need less memory: the same student, bit for bit, except with bfloat16 moments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nas.compress.distillation import distil
from nas.compress.moments import make_optimizer
from nas.compress.objective import TeacherLogits
from tests.compress.training_values import Killed, assert_same_bits, kill, plan, run, stop_at, tiny_blocks, tiny_model, weights


@pytest.fixture(scope="module")
def blocks_NT() -> Tensor:
    return tiny_blocks()


@pytest.fixture(scope="module")
def objective() -> TeacherLogits:
    return TeacherLogits(tiny_model(seed=0).requires_grad_(False))


@pytest.mark.parametrize("setting", [{"moments": "offloaded"}, {"checkpoint_activations": True}, {"moments": "offloaded", "checkpoint_activations": True}])
def test_offloaded_moments_and_checkpointed_activations_give_the_same_bits(setting, objective, blocks_NT):
    expected, _ = run(objective, blocks_NT, plan())
    found, _ = run(objective, blocks_NT, plan(**setting))
    assert_same_bits(found, expected)


def test_checkpointing_keeps_less_and_leaves_no_trace(objective, blocks_NT):
    kept = {}
    for on in (False, True):
        student = tiny_model(seed=1)
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            distil(student, objective=objective, blocks_NT=blocks_NT, plan=plan(steps=1, decay_steps=0, checkpoint_activations=on))
        kept[on] = sum(sizes)
        assert not any(module.training for module in student.modules())
    assert kept[True] < kept[False]


def test_bfloat16_moments_are_stored_in_half_and_train_nearly_the_same(objective, blocks_NT):
    train = plan(steps=60, decay_steps=20, moments="bfloat16")
    optimizer = make_optimizer(dict(tiny_model(seed=1).named_parameters()), plan=train)
    assert {tensor.dtype for state in optimizer.state.values() for key, tensor in state.items() if key != "step"} == {torch.bfloat16}

    exact, expected = run(objective, blocks_NT, plan(steps=60, decay_steps=20))
    rounded, found = run(objective, blocks_NT, train)

    assert found.loss == pytest.approx(expected.loss, rel=0.01)
    before = weights(tiny_model(seed=1))
    for name, weight in weights(exact).items():
        assert (weights(rounded)[name] - weight).norm() < 0.1 * (weight - before[name]).norm(), name


@pytest.mark.parametrize("moments", ["offloaded", "bfloat16"])
def test_a_killed_run_with_parked_moments_resumes_to_the_same_bits(tmp_path: Path, moments, objective, blocks_NT):
    straight, _ = run(objective, blocks_NT, plan(moments=moments))
    with pytest.raises(Killed):
        run(objective, blocks_NT, plan(moments=moments), checkpoint=tmp_path, should_stop=stop_at(6, by=kill), checkpoint_every_seconds=0)
    resumed, _ = run(objective, blocks_NT, plan(moments=moments), checkpoint=tmp_path)
    assert_same_bits(resumed, straight)


def test_a_run_may_go_on_with_less_memory(tmp_path: Path, objective, blocks_NT):
    straight, _ = run(objective, blocks_NT, plan())
    with pytest.raises(Killed):
        run(objective, blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(6, by=kill), checkpoint_every_seconds=0)
    resumed, _ = run(objective, blocks_NT, plan(moments="offloaded", checkpoint_activations=True), checkpoint=tmp_path)
    assert_same_bits(resumed, straight)
