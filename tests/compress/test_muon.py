"""Muon against torch's, against the singular value decomposition, and as part of the loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nas.compress import muon
from nas.compress.held_out import evaluate_kl
from nas.compress.moments import make_optimizer
from nas.compress.muon import Muon, orthogonalise
from nas.compress.objective import TeacherLogits
from nas.errors import InvalidSpec
from tests.compress.training_values import Killed, assert_same_bits, kill, plan, run, stop_at, tiny_blocks, tiny_model, weights


@pytest.fixture(scope="module")
def blocks_NT() -> Tensor:
    return tiny_blocks()


@pytest.fixture(scope="module")
def objective() -> TeacherLogits:
    return TeacherLogits(tiny_model(seed=0).requires_grad_(False))


def matrix(*shape: int, seed: int = 0) -> nn.Parameter:
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100))
    return weight


def stepped(*starts: nn.Parameter, num_steps: int = 3) -> list[Tensor]:
    own = [nn.Parameter(start.detach().clone()) for start in starts]
    optimizer = Muon([{"params": own}], lr=0.1, momentum=0.6, weight_decay=0.01)
    for _ in range(num_steps):
        for weight, start in zip(own, starts, strict=True):
            weight.grad = start.grad
        optimizer.step()
    return [weight.detach() for weight in own]


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (100, 40)])
def test_it_is_the_published_update(shape: tuple[int, int]) -> None:
    start = matrix(*shape)
    reference = nn.Parameter(start.detach().clone())
    reference.grad = start.grad
    optimizer = torch.optim.Muon([reference], lr=0.1, momentum=0.6, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        optimizer.step()
    (found,) = stepped(start)
    assert (found - reference).norm() < 0.02 * (found - start).norm()  # torch's is in bfloat16 everywhere


@pytest.mark.parametrize("shape", [(3, 20, 50), (3, 50, 20)])
def test_singular_vectors_stay_and_singular_values_become_alike(shape: tuple[int, ...]) -> None:
    matrices_SMN = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    left, _, right = torch.linalg.svd(matrices_SMN, full_matrices=False)
    found = orthogonalise(matrices_SMN)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    along = torch.einsum("smi,smn,sin->si", left, found, right)
    torch.testing.assert_close(along.sum(-1), values.sum(-1), rtol=0.01, atol=0)


def test_a_gradient_of_zeros_moves_nothing() -> None:
    start = matrix(8, 8)
    start.grad = torch.zeros(8, 8)
    torch.testing.assert_close(stepped(start)[0], start * (1 - 0.1 * 0.01) ** 3)


def test_stacks_experts_and_single_matrices_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = [matrix(12, 20, seed=seed) for seed in range(3)]
    experts = nn.Parameter(torch.stack([weight.detach() for weight in alike]))
    experts.grad = torch.stack([weight.grad for weight in alike if weight.grad is not None])
    together = stepped(*alike, matrix(20, 12))
    (stacked,) = stepped(experts)
    monkeypatch.setattr(muon, "_STACK_ELEMENTS", 12 * 20)
    alone = stepped(*alike)
    for number in range(3):
        torch.testing.assert_close(stacked[number], together[number], rtol=0, atol=2e-3)
        torch.testing.assert_close(alone[number], together[number], rtol=0, atol=2e-3)


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="expected matrices"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))]}], lr=0.1, momentum=0.6, weight_decay=0.0)


# --- in the loop


def test_matrices_of_the_layers_alone_are_its(objective: TeacherLogits) -> None:
    model = tiny_model(seed=1, tied=False)
    named = dict(model.named_parameters())
    optimizer = make_optimizer(named, plan=plan(optimizer="muon"), tables=[model.model.embed_tokens.weight, model.lm_head.weight])
    own = {name for name, weight in named.items() if "momentum" in optimizer.state[weight]}
    assert own == {name for name in named if name.endswith("proj.weight")}
    assert {group["rate_scale"] for group in optimizer.param_groups} == {1.0, 3.0}


def test_the_student_comes_nearer_to_the_teacher(objective: TeacherLogits, blocks_NT: Tensor) -> None:
    teacher = tiny_model(seed=0)
    before = evaluate_kl(tiny_model(seed=1), teacher=teacher, blocks_NT=blocks_NT, batch_size=8).kl
    student, _ = run(objective, blocks_NT, plan(steps=60, decay_steps=10, learning_rate=1e-2, optimizer="muon"))
    after = evaluate_kl(student, teacher=teacher, blocks_NT=blocks_NT, batch_size=8).kl
    assert before is not None
    assert after is not None
    assert after < 0.6 * before


@pytest.mark.parametrize("step", [1, 6, 9])
@pytest.mark.parametrize("moments", ["float32", "offloaded", "bfloat16"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, objective: TeacherLogits, blocks_NT: Tensor, moments: str, step: int) -> None:
    train = plan(optimizer="muon", rate_follows_loss=True, moments=moments)
    straight, _ = run(objective, blocks_NT, train)
    with pytest.raises(Killed):
        run(objective, blocks_NT, train, checkpoint=tmp_path, should_stop=stop_at(step, by=kill), checkpoint_every_seconds=0)
    resumed, _ = run(objective, blocks_NT, train, checkpoint=tmp_path)
    assert_same_bits(resumed, straight)


def test_offloaded_moments_change_no_more_than_rounding(objective: TeacherLogits, blocks_NT: Tensor) -> None:
    expected, _ = run(objective, blocks_NT, plan(optimizer="muon"))
    found, _ = run(objective, blocks_NT, plan(optimizer="muon", moments="offloaded"))
    before = weights(tiny_model(seed=1))
    for name, weight in weights(expected).items():
        assert (weights(found)[name] - weight).norm() <= 0.02 * (weight - before[name]).norm(), name


def test_shards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.compress.moments.DTensor", nn.Parameter)
    with pytest.raises(InvalidSpec, match="optimizer: expected adamw where the weights are sharded"):
        make_optimizer(dict(tiny_model(seed=1).named_parameters()), plan=plan(optimizer="muon"))
