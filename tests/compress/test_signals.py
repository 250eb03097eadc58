"""Teacher signals: the same student as with the teacher in the loop, shards that survive kills and show flipped bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.compress import signals as signals_module
from nas.compress.distillation import distil
from nas.compress.held_out import evaluate_kl
from nas.compress.losses import Head, forward_kl
from nas.compress.objective import TeacherLogits
from nas.compress.signals import StoredSignals, StoredTeacher, StoredTopK, build_signals, top_k_kl_loss
from nas.compress.train_plan import TrainPlan
from nas.cost import SignalKind, signal_bytes_per_token
from nas.errors import CorruptFile, NotFound

T = 32
VOCAB_SIZE = 61


@pytest.fixture(scope="module")
def teacher(random_llama: Callable[..., Any]) -> Any:
    return random_llama(seed=0).requires_grad_(False)


@pytest.fixture(scope="module")
def student(random_llama: Callable[..., Any]) -> Any:
    return random_llama(seed=1, num_hidden_layers=2, intermediate_size=12)


@pytest.fixture(scope="module")
def blocks_NT(random_tokens: Callable[..., Tensor]) -> Tensor:
    return random_tokens(rows=11, length=T).to(torch.int32)


@pytest.fixture(autouse=True)
def _three_rows_per_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals_module, "SHARD_BYTES", 3 * T * 36 * 4)


def build(teacher: nn.Module, blocks_NT: Tensor, folder: Path, *, kind: SignalKind = "exact", **changes: Any) -> Path:
    values = {"part": "train", "kind": kind, "top_k": 8, "folder": folder, "teacher_digest": "t", "batch_size": 2, **changes}
    build_signals(teacher, blocks_NT=blocks_NT, **values)
    return folder


def trained(student: nn.Module, objective: Any, blocks_NT: Tensor) -> dict[str, Tensor]:
    model = copy.deepcopy(student)
    # More tokens than blocks: epochs read the same signals again.
    distil(model, objective=objective, blocks_NT=blocks_NT, plan=TrainPlan(tokens=20 * T, learning_rate=1e-2, batch_size=4, micro_batch_size=3))
    return model.state_dict()


def test_a_student_of_exact_signals_is_bit_for_bit_that_of_the_teacher_in_the_loop(teacher: Any, student: Any, blocks_NT: Tensor, tmp_path: Path) -> None:
    stored = StoredTeacher(StoredSignals(build(teacher, blocks_NT, tmp_path), part="train"))
    expected, found = trained(student, TeacherLogits(teacher), blocks_NT), trained(student, TeacherLogits(stored), blocks_NT)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found["lm_head.weight"], student.state_dict()["lm_head.weight"])


def test_held_out_kl_from_signals_is_that_of_the_teacher(teacher: Any, student: Any, blocks_NT: Tensor, tmp_path: Path) -> None:
    build(teacher, blocks_NT, tmp_path)
    for first in (0, 5):
        stored = StoredTeacher(StoredSignals(tmp_path, part="train"), first_row=first)
        found = evaluate_kl(student, teacher=stored, blocks_NT=blocks_NT[first:], batch_size=4)
        expected = evaluate_kl(student, teacher=teacher, blocks_NT=blocks_NT[first:], batch_size=4)
        assert found.kl_N is not None
        assert expected.kl_N is not None
        assert torch.equal(found.kl_N, expected.kl_N)


def test_rows_are_found_whatever_their_order_and_shard(teacher: Any, blocks_NT: Tensor, tmp_path: Path) -> None:
    stored = StoredSignals(build(teacher, blocks_NT, tmp_path), part="train")
    whole_MD = stored.read(torch.arange(11))["hidden"]
    rows_B = torch.tensor([10, 0, 3, 2, 3])
    assert len(list(tmp_path.glob("train-*.json"))) == 4
    assert torch.equal(stored.read(rows_B)["hidden"].view(5, T, -1), whole_MD.view(11, T, -1)[rows_B])


@pytest.mark.parametrize(("kind", "per_token"), [("exact", 36 * 4), ("top_k", 8 * 6 + 4)])
def test_the_bytes_on_disk_are_those_of_the_closed_form(teacher: Any, blocks_NT: Tensor, tmp_path: Path, kind: SignalKind, per_token: int) -> None:
    stored = StoredSignals(build(teacher, blocks_NT, tmp_path, kind=kind), part="train").read(torch.arange(11))
    assert sum(tensor.nbytes for tensor in stored.values()) == 11 * T * per_token
    assert signal_bytes_per_token(kind, hidden_size=36, bytes_per_element=4, top_k=8) == per_token


def test_a_build_that_was_stopped_goes_on_with_the_first_missing_shard(teacher: Any, blocks_NT: Tensor, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def stop(done: int, of: int) -> None:
        if done > 4:
            raise Killed

    with pytest.raises(Killed):
        build(teacher, blocks_NT, tmp_path, report=stop)
    with pytest.raises(NotFound):
        StoredSignals(tmp_path, part="train")
    first = (tmp_path / "train-00000.json").stat().st_mtime_ns
    told: list[tuple[int, int]] = []
    build(teacher, blocks_NT, tmp_path, report=lambda done, of: told.append((done, of)))
    assert (tmp_path / "train-00000.json").stat().st_mtime_ns == first
    assert told == [(3, 11), (5, 11), (6, 11), (6, 11), (8, 11), (9, 11), (9, 11), (11, 11), (11, 11)]
    assert len(StoredSignals(tmp_path, part="train")) == 11


def test_a_flipped_bit_is_found_and_only_that_shard_is_made_again(teacher: Any, blocks_NT: Tensor, tmp_path: Path) -> None:
    expected = StoredSignals(build(teacher, blocks_NT, tmp_path), part="train").read(torch.arange(11))["hidden"].clone()
    written = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("train-0*.safetensors")}
    (damaged,) = tmp_path.glob("train-00002-*.safetensors")
    content = bytearray(damaged.read_bytes())
    content[-7] ^= 1
    damaged.write_bytes(content)
    broken = StoredSignals(tmp_path, part="train")
    broken.read(torch.arange(6))  # the shards before it are sound
    with pytest.raises(CorruptFile, match="expected sha256"):
        broken.read(torch.tensor([7]))
    repaired = StoredSignals(tmp_path, part="train", repair=lambda: build(teacher, blocks_NT, tmp_path))
    assert torch.equal(repaired.read(torch.arange(11))["hidden"], expected)
    now = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("train-0*.safetensors")}
    assert [name for name in now if now[name] != written[name]] == [damaged.name]


@pytest.mark.parametrize("change", [{"teacher_digest": "u"}, {"kind": "top_k"}, {"blocks": 1}])
def test_shards_of_another_teacher_kind_or_text_are_not_taken_up(teacher: Any, blocks_NT: Tensor, tmp_path: Path, change: dict[str, Any]) -> None:
    build(teacher, blocks_NT, tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("train-*.json")}
    other_NT = blocks_NT.flip(1) if change.pop("blocks", None) else blocks_NT
    build(teacher, other_NT, tmp_path, **change)
    assert all(file.stat().st_mtime_ns != before[file.name] for file in tmp_path.glob("train-*.json"))
    assert len(StoredSignals(tmp_path, part="train").read(torch.arange(11))) > 0


def test_all_tokens_kept_is_the_whole_kl_and_fewer_are_a_lower_bound(teacher: Any, student: Any, blocks_NT: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_MD, teacher_MV = torch.randn(20, 36, generator=generator), 3 * torch.randn(20, VOCAB_SIZE, generator=generator)
    head = Head(weight_VD=torch.randn(VOCAB_SIZE, 36, generator=generator))
    whole = forward_kl(head.logits(hidden_MD), teacher_MV).mean()
    log_MV = torch.log_softmax(teacher_MV, dim=-1)
    losses = []
    for top_k in (4, 16, VOCAB_SIZE):
        log_MK, indices_MK = log_MV.topk(top_k)
        rest_M = log_MV.scatter(1, indices_MK, -torch.inf).logsumexp(dim=-1).clamp_min(-1e4)
        losses.append(top_k_kl_loss(hidden_MD, head, log_probs_MK=log_MK, indices_MK=indices_MK.int(), log_rest_M=rest_M, chunk_tokens=7))
    assert losses[0] < losses[1] < whole
    assert torch.allclose(losses[2], whole, rtol=1e-5)


@pytest.mark.parametrize("top_k", [4, VOCAB_SIZE])
def test_the_gradient_of_the_top_k_loss_is_autograd_s(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(9, 6, generator=generator, requires_grad=True)
    weight_VD = torch.randn(VOCAB_SIZE, 6, generator=generator, requires_grad=True)
    log_MV = torch.log_softmax(2 * torch.randn(9, VOCAB_SIZE, generator=generator), dim=-1)
    log_MK, indices_MK = log_MV.topk(top_k)
    rest_M = log_MV.scatter(1, indices_MK, -torch.inf).logsumexp(dim=-1).clamp_min(-1e4)
    head = Head(weight_VD=weight_VD, softcap=5.0)
    loss = top_k_kl_loss(hidden_MD, head, log_probs_MK=log_MK, indices_MK=indices_MK, log_rest_M=rest_M, chunk_tokens=4)
    found = torch.autograd.grad(loss, (hidden_MD, weight_VD))
    q_MV = torch.softmax(5.0 * torch.tanh(hidden_MD @ weight_VD.t() / 5.0), dim=-1)
    q_MK = q_MV.gather(1, indices_MK)
    plain = (log_MK.exp() * (log_MK - q_MK.log())).sum(dim=-1)
    if top_k < VOCAB_SIZE:
        plain = plain + rest_M.exp() * (rest_M - (1 - q_MK.sum(dim=-1)).log())
    expected = torch.autograd.grad(plain.mean(), (hidden_MD, weight_VD))
    assert torch.allclose(loss, plain.mean(), rtol=1e-5)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_student_of_top_k_signals_comes_near_the_teacher(teacher: Any, student: Any, blocks_NT: Tensor, tmp_path: Path) -> None:
    objective = StoredTopK(StoredSignals(build(teacher, blocks_NT, tmp_path, kind="top_k", top_k=VOCAB_SIZE), part="train"))
    whole, kept = copy.deepcopy(student), copy.deepcopy(student)
    whole.load_state_dict(trained(student, TeacherLogits(teacher), blocks_NT))
    kept.load_state_dict(trained(student, objective, blocks_NT))
    kl = [evaluate_kl(model, teacher=teacher, blocks_NT=blocks_NT, batch_size=4).kl for model in (student, whole, kept)]
    assert kl[2] == pytest.approx(kl[1], rel=0.02)  # log-probabilities are float16
    assert kl[1] < 0.8 * kl[0]


def test_every_family_s_head_is_kept(random_llama: Callable[..., Any], blocks_NT: Tensor, tmp_path: Path) -> None:
    model = random_llama(seed=0)
    model.config.final_logit_softcapping = 3.0
    model.config.logits_scaling = 2.0
    model.lm_head.bias = nn.Parameter(torch.randn(VOCAB_SIZE))
    head = StoredSignals(build(model, blocks_NT, tmp_path), part="train").read_head()
    assert (head.scale, head.softcap) == (0.5, 3.0)
    assert head.bias_V is not None
    assert torch.equal(head.bias_V, model.lm_head.bias)
    assert torch.equal(head.weight_VD, model.lm_head.weight)
