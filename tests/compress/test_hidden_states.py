"""Training towards the teacher's residual stream: the right channels, the right layers, the right gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from nas.compress.distillation import Stopped, distil
from nas.compress.held_out import evaluate_kl
from nas.compress.hidden_states import StreamMap, TeacherStates
from nas.compress.losses import final_hidden, forward_kl
from nas.compress.objective import TeacherLogits
from nas.compress.slicing import build_student
from nas.compress.sorting import Sorting
from nas.compress.teacher_outputs import RunningTeacher
from tests.compress.family_models import PLAIN, random_model
from tests.compress.training_values import assert_same_bits, plan, stop_at, tiny_blocks, tiny_model

ROWS_B = torch.arange(4)


@pytest.fixture(scope="module")
def sortings(sort_on_disk: Callable[..., Sorting], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Sorting]]:
    teachers = {kind: random_model(kind) for kind in PLAIN}
    return {kind: (teacher, sort_on_disk(teacher, folder=tmp_path_factory.mktemp("teacher"))) for kind, teacher in teachers.items()}


def towards(teacher: Any, sorting: Sorting, student: PreTrainedModel, *, layers: bool) -> TeacherStates:
    kept = sorting.layers[student.config.num_hidden_layers] if layers else None
    return TeacherStates(teacher, onto=StreamMap.selection(sorting.order.hidden_D[: student.config.hidden_size]), layers=kept)


@pytest.mark.parametrize("layers", [True, False])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_student_that_is_the_teacher_in_other_order_is_at_no_distance_from_it(
    kind: str, layers: bool, sortings: dict[str, tuple[PreTrainedModel, Sorting]], random_tokens: Callable[..., Tensor]
) -> None:
    teacher, sorting = sortings[kind]
    student = build_student(sorting, sorting.architecture.shape, dtype="float32", device="cpu").eval()
    tokens_BT = random_tokens(rows=4)
    objective = towards(teacher, sorting, student, layers=layers)
    for channel_distance, channels_D in ((0.0, None), (0.1, sorting.order.hidden_D.flip(0))):
        if channels_D is not None:  # the control: with wrong channels there is a distance
            objective = TeacherStates(
                teacher, onto=StreamMap.selection(channels_D), layers=sorting.layers[student.config.num_hidden_layers] if layers else None
            )
        distances = objective.distances(student, tokens_BT, rows_B=ROWS_B)[1]
        assert len(distances) == (student.config.num_hidden_layers if layers else 1)
        assert (torch.stack(distances) < 1e-4).all() if channel_distance == 0 else (torch.stack(distances) > channel_distance).all()


def test_behind_a_kept_layer_the_stream_of_the_next_kept_layer_is_expected(
    sortings: dict[str, tuple[PreTrainedModel, Sorting]], random_tokens: Callable[..., Tensor]
) -> None:
    teacher, sorting = sortings["llama"]
    shape = replace(sorting.architecture.shape, num_hidden_layers=2)
    student = build_student(sorting, shape, dtype="float32", device="cpu").eval()
    tokens_BT, layers, channels_D = random_tokens(rows=4), sorting.layers[2], sorting.order.hidden_D
    found = TeacherStates(teacher, onto=StreamMap.selection(channels_D), layers=layers).distances(student, tokens_BT, rows_B=ROWS_B)[1]
    streams: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, arguments, name=name: streams.update({name: arguments[0]}))
        for name, module in (("student", student.model.layers[1]), ("teacher", teacher.model.layers[layers[1]]))
    ]
    with torch.no_grad():
        ends = final_hidden(student, tokens_BT), final_hidden(teacher, tokens_BT)
    for handle in handles:
        handle.remove()
    behind_first = 1 - cosine_similarity(streams["student"], streams["teacher"][..., channels_D], dim=-1).mean()
    behind_last = 1 - cosine_similarity(ends[0], ends[1][:, channels_D], dim=-1).mean()
    torch.testing.assert_close(torch.stack(found), torch.stack([behind_first, behind_last]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", [None, (1,)], ids=["last", "all"])
def test_the_value_is_that_of_the_logits_and_the_gradient_that_of_both(layers: tuple[int, ...] | None) -> None:
    teacher, student, tokens_BT = tiny_model(seed=0, hidden_size=24), tiny_model(seed=1), tiny_blocks()[:4].long()
    if layers is not None:  # one layer: its stream is the final state
        student = tiny_model(seed=1)
        del student.model.layers[1]
        student.config.num_hidden_layers = 1
    channels_D = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:16]
    loss = TeacherStates(teacher, onto=StreamMap.selection(channels_D), layers=layers).loss(student, tokens_BT, rows_B=ROWS_B)
    found = torch.autograd.grad(loss, list(student.parameters()))
    with torch.no_grad():
        teacher_ND, teacher_logits_NV = final_hidden(teacher, tokens_BT), teacher(tokens_BT).logits.flatten(0, 1)
    hidden_ND = final_hidden(student, tokens_BT)
    logits = forward_kl(student.lm_head(hidden_ND), teacher_logits_NV).mean()
    hidden = 1 - cosine_similarity(hidden_ND, teacher_ND[:, channels_D]).mean()
    expected = torch.autograd.grad(logits + hidden * (logits / hidden).item(), list(student.parameters()))
    torch.testing.assert_close(loss, logits, atol=1e-5, rtol=1e-5)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("layers", [None, (0, 1)])
def test_a_run_stopped_and_resumed_equals_one_that_was_not_and_learns(tmp_path: Path, layers: tuple[int, ...] | None) -> None:
    teacher, blocks_NT, train = tiny_model(seed=0, hidden_size=24), tiny_blocks(), plan(steps=40, learning_rate=1e-2)

    def run(student: nn.Module, **options: Any) -> None:
        distil(student, objective=TeacherStates(teacher, onto=StreamMap.selection(torch.arange(16)), layers=layers), blocks_NT=blocks_NT, plan=train, **options)

    straight, stopped, resumed = (tiny_model(seed=1) for _ in range(3))
    before = evaluate_kl(straight, teacher=teacher, blocks_NT=blocks_NT, batch_size=8)
    run(straight)
    with pytest.raises(Stopped):
        run(stopped, checkpoint=tmp_path, should_stop=stop_at(17))
    run(resumed, checkpoint=tmp_path)
    assert_same_bits(resumed, straight)
    after = evaluate_kl(straight, teacher=teacher, blocks_NT=blocks_NT, batch_size=8)
    assert before.kl is not None
    assert after.kl is not None
    assert after.kl < 0.8 * before.kl


def test_stored_outputs_serve_the_final_state_and_are_refused_for_the_layers() -> None:
    teacher, student, tokens_BT = tiny_model(seed=0, hidden_size=24), tiny_model(seed=1), tiny_blocks()[:4].long()
    running, stored = (TeacherStates(source, onto=StreamMap.selection(torch.arange(16))) for source in (teacher, RunningTeacher(teacher)))
    assert torch.equal(running.loss(student, tokens_BT, rows_B=ROWS_B), stored.loss(student, tokens_BT, rows_B=ROWS_B))
    assert running.facts == stored.facts != TeacherLogits(teacher).facts
    with pytest.raises(ValueError, match="teacher: expected a model, whose layers run, got stored outputs"):
        TeacherStates(RunningTeacher(teacher), onto=StreamMap.selection(torch.arange(16)), layers=(0, 1))
