"""The training loop: exact when repeated, stopped or killed; right about counts; clear when it cannot go on."""

from __future__ import annotations

import copy
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from nas.compress import distillation
from nas.compress.distillation import Distilled, Diverged, Progress, Stopped, TrainPlan, distil, evaluate_kl, load_trunk, sound_checkpoint
from nas.compress.losses import forward_kl
from nas.errors import Conflict, CorruptFile

SEQUENCE_LENGTH = 16
STEP_TOKENS = 4 * SEQUENCE_LENGTH


def tiny_model(*, seed: int, hidden_size: int = 16, tied: bool = True) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=hidden_size,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():  # larger than the default of 0.02, so that the teacher has opinions
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.3)
    return model


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
    return torch.randint(40, (22, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def plan(*, steps: int = 12, decay_steps: int = 4, **changes: Any) -> TrainPlan:
    values = {"learning_rate": 3e-3, "batch_size": 4, "warmup_tokens": 2 * STEP_TOKENS, "weight_decay": 0.01}
    return TrainPlan(**{**values, "tokens": steps * STEP_TOKENS, "decay_tokens": decay_steps * STEP_TOKENS, **changes})


class Killed(BaseException):
    """The process is gone: nothing may be saved on its way out."""


def stop_at(call: int, *, by: Callable[[], bool] = lambda: True) -> Callable[[], bool]:
    """A `should_stop` that answers True, or raises, at its nth call, that is before the nth step."""
    calls = iter(range(10**9))
    return lambda: by() if next(calls) == call else False


def kill() -> bool:
    raise Killed


def weights(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_bits(found: LlamaForCausalLM, expected: LlamaForCausalLM) -> None:
    for (name, one), two in zip(weights(found).items(), weights(expected).values(), strict=True):
        assert torch.equal(one, two), name


def run(teacher: LlamaForCausalLM | None, blocks_NT: Tensor, train: TrainPlan, **options: Any) -> tuple[LlamaForCausalLM, Distilled]:
    student = tiny_model(seed=1)
    return student, distil(student, teacher=teacher, blocks_NT=blocks_NT, plan=train, **options)


# --- learning


def test_the_first_step_is_that_of_plain_autograd_and_adamw(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    train = plan(steps=1, decay_steps=0, warmup_tokens=0, max_grad_norm=1e9, weight_decay=0.0)
    student, distilled = run(teacher, blocks_NT, train)
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
    distil(student, teacher=teacher, blocks_NT=blocks_NT, plan=plan(steps=60, decay_steps=10, learning_rate=1e-2))
    after = evaluate_kl(student, teacher=teacher, blocks_NT=blocks_NT, batch_size=8)
    assert before.kl is not None
    assert after.kl is not None
    assert after.kl < 0.6 * before.kl


def test_without_a_teacher_the_next_token_is_learnt(blocks_NT: Tensor) -> None:
    counting_NT = (torch.arange(SEQUENCE_LENGTH) + torch.arange(22).unsqueeze(1)).remainder(40)
    student, _ = run(None, counting_NT, plan(steps=60, decay_steps=10, learning_rate=1e-2))
    held_out = evaluate_kl(student, teacher=None, blocks_NT=counting_NT, batch_size=8)
    assert held_out.kl is None
    assert held_out.loss < 1.0 < math.log(40)


def test_micro_batches_change_no_more_than_rounding(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    whole, _ = run(teacher, blocks_NT, plan())
    split, _ = run(teacher, blocks_NT, plan(micro_batch_size=3))
    for name, expected in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], expected, atol=1e-4, rtol=1e-3)


# --- exactness


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    one, _ = run(teacher, blocks_NT, plan())
    torch.manual_seed(99)
    before = torch.get_rng_state()
    two, _ = run(teacher, blocks_NT, plan())
    assert_same_bits(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    other, _ = run(teacher, blocks_NT, plan(seed=1))
    assert not torch.equal(weights(one)["model.norm.weight"], weights(other)["model.norm.weight"])


@pytest.mark.parametrize("step", [0, 1, 5, 7, 8, 9, 11])
def test_a_run_stopped_anywhere_and_resumed_equals_one_that_was_not(tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor, step: int) -> None:
    straight, expected = run(teacher, blocks_NT, plan())
    with pytest.raises(Stopped):
        run(teacher, blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(step))
    resumed, found = run(teacher, blocks_NT, plan(), checkpoint=tmp_path)
    assert_same_bits(resumed, straight)
    assert (found.tokens, found.loss) == (expected.tokens, expected.loss)
    assert found.trained_tokens == (12 - step) * STEP_TOKENS


@pytest.mark.parametrize("step", [3, 8, 10])
@pytest.mark.parametrize("every_seconds", [0.0, 3600.0])
def test_a_run_killed_anywhere_and_resumed_equals_one_that_was_not(
    tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor, step: int, every_seconds: float
) -> None:
    straight, _ = run(teacher, blocks_NT, plan())
    for _ in range(2):
        with pytest.raises(Killed):
            run(teacher, blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(step, by=kill), checkpoint_every_seconds=every_seconds)
        step = 1
    resumed, found = run(teacher, blocks_NT, plan(), checkpoint=tmp_path)
    assert_same_bits(resumed, straight)
    assert found.tokens == 12 * STEP_TOKENS


def test_the_next_rung_goes_on_from_the_trunk_as_if_there_had_been_no_branch(tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    straight, _ = run(teacher, blocks_NT, plan(steps=30, decay_steps=5))
    student, first = run(teacher, blocks_NT, plan(steps=10, decay_steps=3), checkpoint=tmp_path / "rung1")
    assert first.trunk.step == 7
    for state in (first.trunk, load_trunk(tmp_path / "rung1")):
        student = tiny_model(seed=2)  # whatever it holds, the state replaces it
        second = distil(student, teacher=teacher, blocks_NT=blocks_NT, plan=plan(steps=30, decay_steps=5), state=state)
        assert_same_bits(student, straight)
        assert second.trained_tokens == 23 * STEP_TOKENS


def test_a_finished_run_that_is_asked_for_again_gives_the_same_bits(tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    once, _ = run(teacher, blocks_NT, plan(), checkpoint=tmp_path)
    again, _ = run(teacher, blocks_NT, plan(), checkpoint=tmp_path)
    assert_same_bits(once, again)


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The states that are written, as (name, step)."""
    written: list[tuple[str, int]] = []
    save = distillation.save_tensors

    def note(folder: Path, *, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        written.append((name, facts["step"]))
        save(folder, name=name, tensors=tensors, facts=facts)

    monkeypatch.setattr(distillation, "save_tensors", note)
    return written


@pytest.mark.parametrize(("killed_at", "expected"), [(3, [("trunk", 8)]), (8, []), (10, [])])
def test_a_state_that_was_just_loaded_is_not_written_again(
    tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor, saves: list[tuple[str, int]], killed_at: int, expected: list[tuple[str, int]]
) -> None:
    with pytest.raises(Killed):
        run(teacher, blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(killed_at, by=kill))
    saves.clear()
    run(teacher, blocks_NT, plan(), checkpoint=tmp_path)
    assert saves == expected


def test_the_trunk_of_the_rung_below_is_written_even_where_nothing_is_trained_on_it(
    tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor, saves: list[tuple[str, int]]
) -> None:
    _, first = run(teacher, blocks_NT, plan(steps=10, decay_steps=3))
    run(teacher, blocks_NT, plan(steps=10, decay_steps=3), checkpoint=tmp_path, state=first.trunk)
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

    def save(folder: Path, *, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        written.append(facts["step"])
        now[0] += save_seconds

    def a_second_passes() -> bool:
        now[0] += 1.0
        return False

    monkeypatch.setattr(distillation, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(distillation, "save_tensors", save)
    train = plan(steps=60, decay_steps=0)
    run(teacher, blocks_NT, train, checkpoint=tmp_path, should_stop=a_second_passes, checkpoint_every_seconds=every_seconds)
    assert written == expected


def test_every_epoch_shows_every_block_once_in_another_order(blocks_NT: Tensor) -> None:
    from nas.compress.distillation import _DataOrder

    order = _DataOrder(blocks_NT, batch_size=4, seed=3)
    seen_NT = torch.cat([order.batch(step) for step in range(11)])  # two epochs of 22
    first, second = seen_NT[:22], seen_NT[22:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(blocks_NT.tolist())
    assert not torch.equal(first, second)
    assert torch.equal(order.batch(2), seen_NT[8:12])  # backwards, too: the order is a function, not a stream


def test_a_batch_may_be_larger_than_the_corpus(blocks_NT: Tensor) -> None:
    from nas.compress.distillation import _DataOrder

    batch_NT = _DataOrder(blocks_NT[:3], batch_size=7, seed=0).batch(0)
    assert sorted(batch_NT[:3].tolist()) == sorted(batch_NT[3:6].tolist()) == sorted(blocks_NT[:3].tolist())


# --- counts and rates


@given(tokens=st.integers(1, 10_000), decay_share=st.floats(0, 1), batch_size=st.integers(1, 9), warmup_tokens=st.integers(0, 5000))
@settings(max_examples=50, deadline=None)
def test_rates_rise_stay_and_fall_within_the_steps(tokens: int, decay_share: float, batch_size: int, warmup_tokens: int) -> None:
    train = TrainPlan(tokens=tokens, learning_rate=1.0, batch_size=batch_size, warmup_tokens=warmup_tokens, decay_tokens=int(decay_share * tokens), seed=0)
    steps, trunk = train.steps(SEQUENCE_LENGTH), train.trunk_steps(SEQUENCE_LENGTH)
    assert 0 <= tokens - (steps - 1) * batch_size * SEQUENCE_LENGTH <= batch_size * SEQUENCE_LENGTH
    assert 0 <= trunk <= steps
    rates = [train.rate(step, sequence_length=SEQUENCE_LENGTH) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:trunk] == sorted(rates[:trunk])
    if warmup_tokens == 0:
        assert rates[:trunk] == [1.0] * trunk
        assert rates[trunk:] == sorted(rates[trunk:], reverse=True)


def test_progress_ends_at_the_tokens_of_the_plan(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    reports: list[Progress] = []
    _, distilled = run(teacher, blocks_NT, plan(), report=reports.append)
    assert reports[-1].tokens == distilled.tokens == 12 * STEP_TOKENS
    assert reports[-1].learning_rate == pytest.approx(3e-3 / 5)
    assert all(report.tokens_per_second > 0 and math.isfinite(report.loss) for report in reports)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens: expected more than 0, got 0"),
        ({"learning_rate": math.nan}, "learning_rate: expected more than 0, got nan"),
        ({"decay_tokens": 10**9}, "decay_tokens: expected 0 to tokens"),
        ({"micro_batch_size": 0}, "micro_batch_size: expected at least 1"),
    ],
)
def test_an_impossible_plan_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**changes)


# --- what goes wrong


def test_a_student_that_diverges_says_where(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    student = tiny_model(seed=1)
    with torch.no_grad():
        student.model.norm.weight[0] = math.inf
    with pytest.raises(Diverged, match=r"loss: expected a finite number, got none at step 0 \(0 tokens\)") as raised:
        distil(student, teacher=teacher, blocks_NT=blocks_NT, plan=plan())
    copied = pickle.loads(pickle.dumps(raised.value))  # crosses process borders
    assert (copied.step, copied.tokens, str(copied)) == (0, 0, str(raised.value))


def flip_a_bit(checkpoint: Path, *, name: str) -> None:
    (file,) = checkpoint.glob(f"{name}-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(content)


@pytest.mark.parametrize(("damaged", "kept", "trained"), [("trunk", set(), 12), ("branch", {"trunk"}, 4)])
def test_a_damaged_state_alone_is_trained_again_to_the_same_bits(
    tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor, damaged: str, kept: set[str], trained: int
) -> None:
    straight, _ = run(teacher, blocks_NT, plan())
    with pytest.raises(Stopped):
        run(teacher, blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(10))
    flip_a_bit(tmp_path, name=damaged)
    sound_checkpoint(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.json")} == kept
    assert len(list(tmp_path.glob("*"))) == 2 * len(kept)
    resumed, found = run(teacher, blocks_NT, plan(), checkpoint=sound_checkpoint(tmp_path))
    assert_same_bits(resumed, straight)
    assert found.trained_tokens == trained * STEP_TOKENS


def test_a_sound_checkpoint_is_left_as_it_is(tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    assert not sound_checkpoint(tmp_path / "none").exists()
    with pytest.raises(Stopped):
        run(teacher, blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(10))
    files = sorted(tmp_path.iterdir())
    sound_checkpoint(tmp_path)
    assert sorted(tmp_path.iterdir()) == files


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    with pytest.raises(Stopped):
        run(teacher, blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(5))
    flip_a_bit(tmp_path, name="trunk")
    with pytest.raises(CorruptFile, match="trunk-"):
        run(teacher, blocks_NT, plan(), checkpoint=tmp_path)


def test_a_checkpoint_of_another_plan_is_not_gone_on_from(tmp_path: Path, teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    with pytest.raises(Stopped):
        run(teacher, blocks_NT, plan(), checkpoint=tmp_path, should_stop=stop_at(5))
    with pytest.raises(Conflict, match=r"learning_rate: expected 0\.003, with which the state was made, got 0\.1"):
        run(teacher, blocks_NT, plan(learning_rate=0.1), checkpoint=tmp_path)
    with pytest.raises(Conflict, match="tokens: expected 768"):
        run(teacher, blocks_NT, plan(steps=20), checkpoint=tmp_path)
    with pytest.raises(Conflict, match="objective: expected 'kl'"):
        run(None, blocks_NT, plan(), checkpoint=tmp_path)


def test_a_state_beyond_the_plan_is_refused(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    _, long = run(teacher, blocks_NT, plan(steps=12, decay_steps=2))
    with pytest.raises(Conflict, match="expected at most the 3 steps of this plan's trunk, got 10"):
        run(teacher, blocks_NT, plan(steps=5, decay_steps=2), state=long.trunk)


def test_no_blocks_and_half_precision_students_are_refused(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    with pytest.raises(ValueError, match="blocks_NT: expected at least one block"):
        run(teacher, blocks_NT[:0], plan())
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: expected float32 weights"):
        distil(tiny_model(seed=1).bfloat16(), teacher=teacher, blocks_NT=blocks_NT, plan=plan())


def test_out_of_memory_halves_the_micro_batch(teacher: LlamaForCausalLM, blocks_NT: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    student = tiny_model(seed=1)
    sizes: list[int] = []

    def limited(module: object, arguments: object, options: dict[str, Any]) -> None:
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > 1:
            raise torch.cuda.OutOfMemoryError

    handle = student.model.register_forward_pre_hook(limited, with_kwargs=True)
    distil(student, teacher=teacher, blocks_NT=blocks_NT, plan=plan(steps=2, decay_steps=0))
    handle.remove()
    assert sizes == [4, 2] + [1] * 8
    single, _ = run(teacher, blocks_NT, plan(steps=2, decay_steps=0, micro_batch_size=1))
    for name, expected in weights(single).items():
        torch.testing.assert_close(weights(student)[name], expected, atol=1e-6, rtol=0)


# --- held-out likelihood


def test_the_teacher_is_at_no_distance_from_itself(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    held_out = evaluate_kl(copy.deepcopy(teacher), teacher=teacher, blocks_NT=blocks_NT, batch_size=5)
    assert held_out.kl_N is not None
    assert held_out.kl_N.shape == held_out.loss_N.shape == (22,)
    assert held_out.kl_N.abs().max() < 1e-6


def test_held_out_numbers_are_those_of_plain_torch(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    student = tiny_model(seed=1)
    held_out = evaluate_kl(student, teacher=teacher, blocks_NT=blocks_NT, batch_size=5)
    with torch.no_grad():
        logits_BTV, teacher_BTV = student(blocks_NT.long()).logits, teacher(blocks_NT.long()).logits
    loss_N = functional.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), blocks_NT[:, 1:].long(), reduction="none").mean(1).double()
    kl_N = forward_kl(logits_BTV, teacher_BTV).mean(1).double()
    torch.testing.assert_close(held_out.loss_N, loss_N, atol=1e-5, rtol=0)
    torch.testing.assert_close(held_out.kl_N, kl_N, atol=1e-5, rtol=0)
    assert held_out.kl == pytest.approx(kl_N.mean().item(), abs=1e-5)
    assert held_out.loss_standard_error == pytest.approx((loss_N.std() / 22**0.5).item(), abs=1e-5)


def test_held_out_numbers_do_not_depend_on_the_batch_size(teacher: LlamaForCausalLM, blocks_NT: Tensor) -> None:
    student = tiny_model(seed=1)
    one, all_at_once = (evaluate_kl(student, teacher=teacher, blocks_NT=blocks_NT, batch_size=size) for size in (1, 100))
    torch.testing.assert_close(one.kl_N, all_at_once.kl_N, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.loss_N, all_at_once.loss_N, atol=1e-5, rtol=0)


# --- the real teacher


@pytest.mark.reference
def test_on_the_real_teacher_the_held_out_kl_falls(tmp_path: Path) -> None:
    if "NAS_REFERENCE" not in os.environ:
        pytest.skip("needs the reference material: set NAS_REFERENCE")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nas.compress.corpus import Part, build_blocks

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
        teacher=teacher,
        blocks_NT=blocks.train_NT,
        plan=TrainPlan(tokens=20_000, decay_tokens=4_000, warmup_tokens=1_000, batch_size=4, learning_rate=2e-3),
    )
    after = evaluate_kl(student, teacher=teacher, blocks_NT=blocks.validation_NT, batch_size=16)
    assert before.kl is not None
    assert after.kl is not None
    assert after.kl < 0.8 * before.kl
    assert after.loss < before.loss
