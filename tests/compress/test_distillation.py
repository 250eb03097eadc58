"""The training loop: exact when repeated, stopped or killed; right about counts; clear when it cannot go on."""

from __future__ import annotations

import copy
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nas.compress import distillation
from nas.compress.distillation import Diverged, Progress, Stopped, distil
from nas.compress.held_out import evaluate_kl
from nas.compress.losses import forward_kl
from nas.compress.objective import NextToken, Objective, TeacherLogits
from nas.compress.train_plan import TrainPlan
from nas.compress.train_state import TrainState, load_trunk, sound_checkpoint
from nas.errors import Conflict, CorruptFile
from tests.compress.training_values import (
    SEQUENCE_LENGTH,
    STEP_TOKENS,
    Killed,
    assert_same_bits,
    kill,
    plan,
    run,
    stop_at,
    tiny_blocks,
    tiny_model,
    weights,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def teacher() -> LlamaForCausalLM:
    return tiny_model(seed=0, hidden_size=24)


@pytest.fixture
def blocks_NT() -> Tensor:
    return tiny_blocks()


# --- learning


def test_the_first_step_is_that_of_plain_autograd_and_adamw(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    train = plan(steps=1, decay_steps=0, warmup_tokens=0, max_grad_norm=1e9, weight_decay=0.0)
    student, distilled = run(TeacherLogits(teacher), blocks_NT, train)
    reference = tiny_model(seed=1)
    first = torch.randperm(22, generator=torch.Generator().manual_seed(_epoch_seed(0, 0)))[:4]
    tokens_BT = blocks_NT[first].long()
    loss = forward_kl(reference(tokens_BT).logits, teacher(tokens_BT).logits.detach()).mean()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=train.learning_rate, betas=(train.beta1, train.beta2), weight_decay=0.0)
    loss.backward()
    optimizer.step()
    assert distilled.loss == pytest.approx(loss.item(), abs=1e-5)
    for name, expected in weights(reference).items():
        torch.testing.assert_close(weights(student)[name], expected, atol=1e-4, rtol=0)


def _epoch_seed(seed: int, epoch: int) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:7], "big")


@pytest.mark.parametrize("tied", [True, False])
def test_the_student_comes_nearer_to_the_teacher(teacher: LlamaForCausalLM, blocks_NT: Tensor, tied: bool) -> None:
    student = tiny_model(seed=1, tied=tied)
    before = evaluate_kl(student, teacher=teacher, blocks_NT=blocks_NT, batch_size=8)
    distil(student, objective=TeacherLogits(teacher), blocks_NT=blocks_NT, plan=plan(steps=60, decay_steps=10, learning_rate=1e-2))
    after = evaluate_kl(student, teacher=teacher, blocks_NT=blocks_NT, batch_size=8)
    assert before.kl is not None
    assert after.kl is not None
    assert after.kl < 0.6 * before.kl


def test_without_a_teacher_the_next_token_is_learnt(blocks_NT: Tensor) -> None:
    counting_NT = (torch.arange(SEQUENCE_LENGTH) + torch.arange(22).unsqueeze(1)).remainder(40)
    student, _ = run(NextToken(), counting_NT, plan(steps=60, decay_steps=10, learning_rate=1e-2))
    held_out = evaluate_kl(student, teacher=None, blocks_NT=counting_NT, batch_size=8)
    assert held_out.kl is None
    assert held_out.loss < 1.0 < math.log(40)


def test_micro_batches_change_no_more_than_rounding(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    whole, _ = run(TeacherLogits(teacher), blocks_NT, plan())
    split, _ = run(TeacherLogits(teacher), blocks_NT, plan(micro_batch_size=3))
    for name, expected in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], expected, atol=1e-4, rtol=1e-3)


def test_bfloat16_is_used_where_the_processor_has_it_and_ends_near_float32(
    teacher: LlamaForCausalLM, blocks_NT: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = run(TeacherLogits(teacher), blocks_NT, plan())
    for capabilities, rounds in (({"avx512_bf16": True}, True), ({"avx512_bf16": False}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        student, found = run(TeacherLogits(teacher), blocks_NT, plan(dtype="bfloat16"))
        assert {weight.dtype for weight in weights(student).values()} == {torch.float32}
        assert (found.loss != expected.loss) == rounds
        assert found.loss == pytest.approx(expected.loss, rel=0.02)


# --- exactness


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    one, _ = run(TeacherLogits(teacher), blocks_NT, plan())
    torch.manual_seed(99)
    before = torch.get_rng_state()
    two, _ = run(TeacherLogits(teacher), blocks_NT, plan())
    assert_same_bits(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    other, _ = run(TeacherLogits(teacher), blocks_NT, plan(seed=1))
    assert not torch.equal(weights(one)["model.norm.weight"], weights(other)["model.norm.weight"])


@pytest.mark.parametrize("step", [0, 1, 5, 7, 8, 9, 11])
def test_a_run_stopped_anywhere_and_resumed_equals_one_that_was_not(tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor, step: int) -> None:
    straight, expected = run(TeacherLogits(teacher), blocks_NT, plan())
    with pytest.raises(Stopped):
        run(TeacherLogits(teacher), blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(step))
    resumed, found = run(TeacherLogits(teacher), blocks_NT, plan(), checkpoint=tmp_path)
    assert_same_bits(resumed, straight)
    assert (found.tokens, found.loss) == (expected.tokens, expected.loss)
    assert found.trained_tokens == (12 - step) * STEP_TOKENS


@pytest.mark.parametrize("step", [3, 8, 10])
@pytest.mark.parametrize("every_seconds", [0.0, 3600.0])
def test_a_run_killed_anywhere_and_resumed_equals_one_that_was_not(
    tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor, step: int, every_seconds: float
) -> None:
    straight, _ = run(TeacherLogits(teacher), blocks_NT, plan())
    for _ in range(2):
        with pytest.raises(Killed):
            run(TeacherLogits(teacher), blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(step, by=kill), checkpoint_every_seconds=every_seconds)
        step = 1
    resumed, found = run(TeacherLogits(teacher), blocks_NT, plan(), checkpoint=tmp_path)
    assert_same_bits(resumed, straight)
    assert found.tokens == 12 * STEP_TOKENS


def test_the_next_rung_goes_on_from_the_trunk_as_if_there_had_been_no_branch(tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    straight, _ = run(TeacherLogits(teacher), blocks_NT, plan(steps=30, decay_steps=5))
    student, first = run(TeacherLogits(teacher), blocks_NT, plan(steps=10, decay_steps=3))
    run(TeacherLogits(teacher), blocks_NT, plan(steps=10, decay_steps=3), checkpoint=tmp_path / "rung1")
    assert first.trunk.step == 7
    for state in (first.trunk, load_trunk(tmp_path / "rung1")):
        student = tiny_model(seed=2)  # whatever it holds, the state replaces it
        second = distil(student, objective=TeacherLogits(teacher), blocks_NT=blocks_NT, plan=plan(steps=30, decay_steps=5), state=state)
        assert_same_bits(student, straight)
        assert second.trained_tokens == 23 * STEP_TOKENS


def test_a_finished_run_that_is_asked_for_again_gives_the_same_bits(tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    once, _ = run(TeacherLogits(teacher), blocks_NT, plan(), checkpoint=tmp_path)
    again, _ = run(TeacherLogits(teacher), blocks_NT, plan(), checkpoint=tmp_path)
    assert_same_bits(once, again)


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The states that are written, as (name, step)."""
    written: list[tuple[str, int]] = []
    save = distillation.save_state

    def note(state: TrainState, *, checkpoint: Path, name: str, tokens: int) -> None:
        written.append((name, state.step))
        save(state, checkpoint=checkpoint, name=name, tokens=tokens)

    monkeypatch.setattr(distillation, "save_state", note)
    return written


@pytest.mark.parametrize(("killed_at", "expected"), [(3, [("trunk", 8)]), (8, []), (10, [])])
def test_a_state_that_was_just_loaded_is_not_written_again(
    tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor, saves: list[tuple[str, int]], killed_at: int, expected: list[tuple[str, int]]
) -> None:
    with pytest.raises(Killed):
        run(TeacherLogits(teacher), blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(killed_at, by=kill))
    saves.clear()
    run(TeacherLogits(teacher), blocks_NT, plan(), checkpoint=tmp_path)
    assert saves == expected


def test_the_trunk_of_the_rung_below_is_written_even_where_nothing_is_trained_on_it(
    tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor, saves: list[tuple[str, int]]
) -> None:
    _, first = run(TeacherLogits(teacher), blocks_NT, plan(steps=10, decay_steps=3))
    run(TeacherLogits(teacher), blocks_NT, plan(steps=10, decay_steps=3), checkpoint=tmp_path, state=first.trunk)
    assert saves == [("trunk", 7)]


@pytest.mark.parametrize(
    ("every_seconds", "save_seconds", "expected"),
    [
        (0.0, 3.0, list(range(1, 61))),
        (10.0, 0.0, [10, 20, 30, 40, 50, 60]),
        (10.0, 1.0, [10, 30, 50, 60]),
    ],
)
def test_a_save_that_takes_long_is_made_less_often(
    tmp_path: Path,
    teacher: LlamaForCausalLM,
    blocks_NT: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    every_seconds: float,
    save_seconds: float,
    expected: list[int],
) -> None:
    now = [0.0]
    written: list[int] = []

    def save(state: TrainState, *, checkpoint: Path, name: str, tokens: int) -> None:
        written.append(state.step)
        now[0] += save_seconds

    def a_second_passes() -> bool:
        now[0] += 1.0
        return False

    monkeypatch.setattr(distillation, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(distillation, "save_state", save)
    train = plan(steps=60, decay_steps=0)
    run(TeacherLogits(teacher), blocks_NT, train, checkpoint=tmp_path, should_stop=a_second_passes, checkpoint_every_seconds=every_seconds)
    assert written == expected


def test_progress_ends_at_the_tokens_of_the_plan(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    reports: list[Progress] = []
    _, distilled = run(TeacherLogits(teacher), blocks_NT, plan(), report=reports.append)
    assert reports[-1].tokens == distilled.tokens == 12 * STEP_TOKENS
    assert reports[-1].learning_rate == pytest.approx(3e-3 / 5)
    assert all(report.tokens_per_second > 0 and math.isfinite(report.loss) for report in reports)


# --- what goes wrong


def test_a_student_that_diverges_says_where(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    student = tiny_model(seed=1)
    with torch.no_grad():
        student.model.norm.weight[0] = math.inf
    with pytest.raises(Diverged, match=r"loss: expected a finite number, got none at step 0 \(0 tokens\)") as raised:
        distil(student, objective=TeacherLogits(teacher), blocks_NT=blocks_NT, plan=plan())
    copied = pickle.loads(pickle.dumps(raised.value))  # crosses process borders
    assert (copied.step, copied.tokens, str(copied)) == (0, 0, str(raised.value))


class Scaled:
    """An objective whose loss is another one's times a factor that may change with the step."""

    facts: ClassVar[dict[str, Any]] = {"loss": "scaled"}

    def __init__(self, objective: Objective, factor: Callable[[int], float]) -> None:
        self.objective, self.factor, self.calls = objective, factor, 0

    def weights(self) -> dict[str, nn.Parameter]:
        return {}

    def loss(self, student: nn.Module, tokens_BT: Tensor, *, rows_B: Tensor) -> Tensor:
        self.calls += 1
        return self.objective.loss(student, tokens_BT, rows_B=rows_B) * self.factor(self.calls - 1)


@pytest.mark.parametrize("steps_between_looks", [1, 5])
@pytest.mark.parametrize("broken_at", [3, 7])
def test_what_is_saved_is_sound_whenever_the_losses_are_looked_at(
    tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor, monkeypatch: pytest.MonkeyPatch, steps_between_looks: int, broken_at: int
) -> None:
    monkeypatch.setattr(distillation, "_STEPS_BETWEEN_LOOKS", {"cpu": steps_between_looks})
    straight, _ = run(Scaled(TeacherLogits(teacher), lambda step: 1.0), blocks_NT, plan())
    objective = Scaled(TeacherLogits(teacher), lambda step: math.nan if step >= broken_at else 1.0)
    with pytest.raises(Diverged, match=rf"loss: expected a finite number, got none at step {broken_at} "):
        run(objective, blocks_NT, plan(), checkpoint=tmp_path, checkpoint_every_seconds=0.0)
    assert load_trunk(tmp_path).step == broken_at
    resumed, _ = run(Scaled(TeacherLogits(teacher), lambda step: 1.0), blocks_NT, plan(), checkpoint=tmp_path)
    assert_same_bits(resumed, straight)


def test_looking_at_the_losses_less_often_changes_nothing(teacher: LlamaForCausalLM, blocks_NT: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, expected = run(TeacherLogits(teacher), blocks_NT, plan())
    monkeypatch.setattr(distillation, "_STEPS_BETWEEN_LOOKS", {"cpu": 5})
    seldom, found = run(TeacherLogits(teacher), blocks_NT, plan())
    assert_same_bits(seldom, straight)
    assert found.loss == expected.loss


def test_a_student_that_gets_worse_than_it_was_untrained_is_stopped_with_both_losses(teacher: LlamaForCausalLM, blocks_NT: Tensor, tmp_path: Path) -> None:
    worse = Scaled(TeacherLogits(teacher), lambda step: 1.0 if step < 150 else 10.0)
    with pytest.raises(Diverged, match=r"loss: expected less than the untrained student's \d+\.\d+, got \d+\.\d+ at step 1[56]\d ") as raised:
        run(worse, blocks_NT, plan(steps=200, learning_rate=1e-4), checkpoint=tmp_path)
    copied = pickle.loads(pickle.dumps(raised.value))  # crosses process borders
    assert str(copied) == str(raised.value)


def test_the_untrained_loss_outlives_a_resume(teacher: LlamaForCausalLM, blocks_NT: Tensor, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(Scaled(TeacherLogits(teacher), lambda step: 1.0), blocks_NT, plan(steps=200), checkpoint=tmp_path, should_stop=stop_at(50))
    with pytest.raises(Diverged, match="untrained"):
        run(Scaled(TeacherLogits(teacher), lambda step: 10.0), blocks_NT, plan(steps=200), checkpoint=tmp_path)


def test_a_student_that_starts_at_its_teacher_may_go_away_from_it(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    student = copy.deepcopy(teacher)
    distilled = distil(student, objective=NextToken(), blocks_NT=blocks_NT, plan=plan(steps=5, decay_steps=0))
    assert distilled.loss > 0
    distil(copy.deepcopy(teacher), objective=TeacherLogits(teacher), blocks_NT=blocks_NT, plan=plan(steps=150, learning_rate=1e-3))


class Learned:
    """An objective with a weight of its own: the loss through a learned temperature."""

    facts: ClassVar[dict[str, Any]] = {"loss": "learned"}

    def __init__(self, teacher: nn.Module) -> None:
        self.objective, self.factor = TeacherLogits(teacher), nn.Parameter(torch.ones(3))

    def weights(self) -> dict[str, nn.Parameter]:
        return {"factor": self.factor}

    def loss(self, student: nn.Module, tokens_BT: Tensor, *, rows_B: Tensor) -> Tensor:
        return self.objective.loss(student, tokens_BT, rows_B=rows_B) * self.factor.square().mean() + (self.factor - 0.5).square().sum()


@pytest.mark.parametrize("step", [0, 5, 10])
def test_what_an_objective_learns_is_resumed_with_the_student(tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor, step: int) -> None:
    whole, again = Learned(teacher), Learned(teacher)
    straight, _ = run(whole, blocks_NT, plan())
    assert not torch.equal(whole.factor, torch.ones(3))
    with pytest.raises(Stopped):
        run(Learned(teacher), blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(step))
    resumed, _ = run(again, blocks_NT, plan(), checkpoint=tmp_path)
    assert_same_bits(resumed, straight)
    assert torch.equal(again.factor, whole.factor)


def flip_a_bit(checkpoint: Path, *, name: str) -> None:
    (file,) = checkpoint.glob(f"{name}-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(content)


@pytest.mark.parametrize(("damaged", "kept", "trained"), [("trunk", set(), 12), ("branch", {"trunk"}, 4)])
def test_a_damaged_state_alone_is_trained_again_to_the_same_bits(
    tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor, damaged: str, kept: set[str], trained: int
) -> None:
    straight, _ = run(TeacherLogits(teacher), blocks_NT, plan())
    checkpoint = tmp_path / "rung1"
    with pytest.raises(Stopped):
        run(TeacherLogits(teacher), blocks_NT, plan(), checkpoint=checkpoint, should_stop=stop_at(10))
    flip_a_bit(checkpoint, name=damaged)
    sound_checkpoint(checkpoint)
    assert {path.stem for path in checkpoint.glob("*.json")} == kept
    assert len(list(checkpoint.glob("*"))) == 2 * len(kept)
    quarantined = {path.suffix for path in (tmp_path / "rung1.damaged").glob(f"{damaged}*")}
    assert quarantined == {".json", ".safetensors"}
    resumed, found = run(TeacherLogits(teacher), blocks_NT, plan(), checkpoint=sound_checkpoint(checkpoint))
    assert_same_bits(resumed, straight)
    assert found.trained_tokens == trained * STEP_TOKENS


def test_a_sound_checkpoint_is_left_as_it_is(tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    assert not sound_checkpoint(tmp_path / "none").exists()
    with pytest.raises(Stopped):
        run(TeacherLogits(teacher), blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(10))
    files = sorted(tmp_path.iterdir())
    sound_checkpoint(tmp_path)
    assert sorted(tmp_path.iterdir()) == files


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    with pytest.raises(Stopped):
        run(TeacherLogits(teacher), blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(5))
    flip_a_bit(tmp_path, name="trunk")
    with pytest.raises(CorruptFile, match="trunk-"):
        run(TeacherLogits(teacher), blocks_NT, plan(), checkpoint=tmp_path)


def test_a_checkpoint_of_another_plan_is_not_gone_on_from(tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    with pytest.raises(Stopped):
        run(TeacherLogits(teacher), blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(5))
    with pytest.raises(Conflict, match=r"learning_rate: expected 0\.003, with which the state was made, got 0\.1"):
        run(TeacherLogits(teacher), blocks_NT, plan(learning_rate=0.1), checkpoint=tmp_path)
    with pytest.raises(Conflict, match="tokens: expected 768"):
        run(TeacherLogits(teacher), blocks_NT, plan(steps=20), checkpoint=tmp_path)
    with pytest.raises(Conflict, match=r"objective: expected {'loss': 'forward_kl', 'temperature': 1.0}, .* got {'loss': 'cross_entropy'}"):
        run(NextToken(), blocks_NT, plan(), checkpoint=tmp_path)


def test_a_state_beyond_the_plan_is_refused(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    _, long = run(TeacherLogits(teacher), blocks_NT, plan(steps=12, decay_steps=2))
    with pytest.raises(Conflict, match="expected at most the 3 steps of this plan's trunk, got 10"):
        run(TeacherLogits(teacher), blocks_NT, plan(steps=5, decay_steps=2), state=long.trunk)


def test_no_blocks_and_half_precision_students_are_refused(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    with pytest.raises(ValueError, match="blocks_NT: expected at least one block"):
        run(TeacherLogits(teacher), blocks_NT[:0], plan())
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: expected float32 weights"):
        distil(tiny_model(seed=1).bfloat16(), objective=TeacherLogits(teacher), blocks_NT=blocks_NT, plan=plan())


def test_out_of_memory_halves_the_micro_batch(teacher: LlamaForCausalLM, blocks_NT: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    student = tiny_model(seed=1)
    sizes: list[int] = []

    def limited(module: object, arguments: object, options: dict[str, Any]) -> None:
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > 1:
            raise torch.cuda.OutOfMemoryError

    handle = student.model.register_forward_pre_hook(limited, with_kwargs=True)
    distil(student, objective=TeacherLogits(teacher), blocks_NT=blocks_NT, plan=plan(steps=2, decay_steps=0))
    handle.remove()
    assert sizes == [4, 2] + [1] * 8
    single, _ = run(TeacherLogits(teacher), blocks_NT, plan(steps=2, decay_steps=0, micro_batch_size=1))
    for name, expected in weights(single).items():
        torch.testing.assert_close(weights(student)[name], expected, atol=1e-6, rtol=0)


# --- the real teacher


@pytest.mark.reference
def test_on_the_real_teacher_the_held_out_kl_falls(tmp_path: Path) -> None:
    if "NAS_REFERENCE" not in os.environ:
        pytest.skip("needs the reference material: set NAS_REFERENCE")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nas.compress.blocks import Part, build_blocks

    reference = Path(os.environ["NAS_REFERENCE"])
    folder = reference / "models" / "stories260K"
    blocks = build_blocks(
        [Part(name="tinystories", files=(reference / "data" / "text" / "tinystories" / "train.jsonl",))],
        tokenizer=AutoTokenizer.from_pretrained(folder),
        sequence_length=128,
        train_tokens=20_000,
        calibration_tokens=128,
        validation_tokens=4_000,
        seed=0,
        folder=tmp_path,
    )
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    del student.model.layers[2]
    student.config.num_hidden_layers = 4
    before = evaluate_kl(student, teacher=teacher, blocks_NT=blocks.validation_NT, batch_size=16)
    distil(
        student,
        objective=TeacherLogits(teacher),
        blocks_NT=blocks.train_NT,
        plan=TrainPlan(tokens=20_000, decay_tokens=4_000, warmup_tokens=1_000, batch_size=4, learning_rate=2e-3),
    )
    after = evaluate_kl(student, teacher=teacher, blocks_NT=blocks.validation_NT, batch_size=16)
    assert before.kl is not None
    assert after.kl is not None
    assert after.kl < 0.8 * before.kl
    assert after.loss < before.loss
