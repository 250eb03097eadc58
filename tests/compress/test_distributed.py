"""Two gloo processes on the CPU against one: the same losses and weights up to rounding, however the student is spread; stopped and resumed too."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nas.compress.distillation import distil
from nas.compress.distributed import Spread, World, join_world
from nas.compress.held_out import evaluate_kl
from nas.compress.objective import TeacherLogits
from nas.errors import InvalidSpec
from tests.compress.distributed_worker import PLANS, SPREADINGS, STOPPED_AT, Projected, frozen_teacher
from tests.compress.training_values import plan, tiny_blocks, tiny_model

SIZE = 2


def start_processes(arguments: list[str], *, size: int = SIZE, **options: Any) -> list[subprocess.Popen[str]]:
    """As torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for rank in range(size)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    processes = start_processes(["tests.compress.distributed_worker", str(folder)])
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * SIZE, "\n".join(errors)
    return folder


@pytest.fixture(scope="module")
def facts(found: Path) -> dict[str, Any]:
    return json.loads((found / "facts.json").read_text())


def trained_alone(*, tied: bool = True, projected: bool = False, **changes: Any) -> tuple[Any, float]:
    student = tiny_model(seed=1, tied=tied)
    objective = Projected(frozen_teacher()) if projected else TeacherLogits(frozen_teacher())
    return student, distil(student, objective=objective, blocks_NT=tiny_blocks(), plan=plan(**changes)).loss


def assert_same(found: Path, facts: dict[str, Any], *, name: str, student: Any, loss: float, tolerance: float = 2e-5) -> None:
    assert facts["losses"][name] == pytest.approx(loss, rel=1e-5)
    weights = load_file(found / f"{name}.safetensors")
    for key, weight in student.named_parameters():
        torch.testing.assert_close(weights[key], weight.detach(), atol=tolerance, rtol=tolerance, msg=lambda text, key=key: f"{name}, {key}: {text}")


@pytest.mark.parametrize("spreading", SPREADINGS)
@pytest.mark.parametrize("name", PLANS)
def test_two_processes_train_what_one_trains(found, facts, spreading, name):
    student, loss = trained_alone(tied="small" not in name, **PLANS[name])
    # bfloat16 moments: a rounding that falls the other way is a step of 1/256 of a moment.
    assert_same(found, facts, name=f"{spreading}, {name}", student=student, loss=loss, tolerance=1e-3 if "moments" in PLANS[name] else 2e-5)


@pytest.mark.parametrize("spreading", SPREADINGS)
def test_what_an_objective_learns_beside_the_student_is_trained_on_all_blocks(found, facts, spreading):
    student, loss = trained_alone(projected=True)
    assert_same(found, facts, name=f"{spreading}, with a projection", student=student, loss=loss)


def test_a_sharded_teacher_teaches_the_same(found, facts):
    student, loss = trained_alone()
    assert_same(found, facts, name="sharded, with a sharded teacher", student=student, loss=loss)


@pytest.mark.parametrize("spreading", SPREADINGS)
def test_two_processes_go_on_from_a_checkpoint_of_one(found, facts, spreading):
    student, loss = trained_alone()
    assert_same(found, facts, name=f"{spreading}, resumed", student=student, loss=loss)


@pytest.mark.parametrize("spreading", SPREADINGS)
def test_one_process_goes_on_from_a_checkpoint_of_two_that_a_single_one_was_asked_to_stop(found, facts, spreading):
    assert facts[f"{spreading}, stopped, number 2"] == STOPPED_AT + 1
    expected, loss = trained_alone()
    student = tiny_model(seed=2)  # whatever it holds, the checkpoint replaces it
    done = distil(student, objective=TeacherLogits(frozen_teacher()), blocks_NT=tiny_blocks(), plan=plan(), checkpoint=found / f"{spreading}, from 2")
    assert done.loss == pytest.approx(loss, rel=1e-5)
    assert done.trained_tokens < done.tokens
    for (key, weight), other in zip(student.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, other, atol=2e-5, rtol=2e-5, msg=key)


def test_processes_agree(facts):
    assert facts["any"] == [True, False, True]
    assert (facts["once"], facts["least"], facts["error"]) == ("made by 0", 10, "InvalidSpec")


def test_the_likelihood_of_a_sharded_student_is_that_of_the_whole_one(facts):
    expected = evaluate_kl(tiny_model(seed=1), teacher=frozen_teacher(), blocks_NT=tiny_blocks()[:5], batch_size=2)
    assert facts["kl"] == pytest.approx(expected.kl, rel=1e-5)
    assert facts["loss"] == pytest.approx(expected.loss, rel=1e-5)


def test_a_batch_that_cannot_be_shared_out_is_refused():
    world = World(rank=1, size=3)
    with pytest.raises(InvalidSpec, match="batch_size: expected a multiple of the 3 processes, got 4"):
        world.check_batch(4)


def test_the_shares_of_a_batch_are_equal_and_in_order():
    rows_B = torch.arange(12)
    shares = [replace(World(size=3), rank=rank).share(rows_B) for rank in range(3)]
    assert [len(share) for share in shares] == [4, 4, 4]
    assert torch.equal(torch.cat(shares), rows_B)


def test_one_process_alone_asks_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_world("cpu") as world:
        spread = Spread(tiny_model(seed=1), world=world)
        assert not torch.distributed.is_initialized()
        assert (world.any(True, False), world.least(3), world.once(lambda: 4)) == ((True, False), 3, 4)
        assert spread.run(lambda student: student) is spread.student
