"""What a machine with little room does to a plan, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nas.compress import fitting
from nas.compress.distributed import World
from nas.compress.fitting import Fitted, check_disk_fits, check_host_fits, check_teacher_fits, fit_plan, fit_run
from nas.errors import DoesNotFit, InvalidSpec
from nas.memory import Capacity, TeacherMemory
from tests.compress.training_values import plan
from tests.test_memory import HALF, LLAMA

TEACHER = TeacherMemory(architecture=LLAMA, dtype="float32")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch):
    def give(size: float) -> None:
        monkeypatch.setattr(fitting, "capacity", lambda device: Capacity(device="cpu", device_bytes=int(size), host_bytes=int(size)))

    return give


def fitted(**options):
    return fit_plan(plan(batch_size=64), architecture=LLAMA, shape=HALF, teacher=None, sequence_length=512, device="cpu", **options)


def test_with_room_the_plan_stays_as_it_is_but_says_its_micro_batch(room):
    room(1e13)
    assert fitted() == plan(batch_size=64, micro_batch_size=64)


def test_with_less_room_passes_shrink_then_layers_are_checkpointed_then_moments_rounded(room):
    found = []
    for size in (800e9, 120e9, 84e9, 66e9):
        room(size)
        one = fitted()
        assert one.batch_size == 64
        found.append((one.micro_batch_size, one.checkpoint_activations, one.moments))
    assert found[0][0] > found[1][0]
    assert [(checkpointed, moments) for _, checkpointed, moments in found[1:]] == [(False, "float32"), (True, "float32"), (True, "bfloat16")]


def test_a_kind_of_moments_that_is_asked_for_is_kept(room):
    room(1e13)
    assert fitted(moments="bfloat16").moments == "bfloat16"
    room(66e9)
    with pytest.raises(DoesNotFit, match="optimiser state"):
        fitted(moments="float32")


def test_a_teacher_that_is_too_large_is_refused_with_what_else_can_be_done(room):
    room(20e9)
    with pytest.raises(DoesNotFit, match=r"(?s)the teacher: expected at most 19\.000 GB.*teacher weights.*random weights.*torchrun"):
        check_teacher_fits(TEACHER, tokens=4096, beside={"random weights": 10**9}, device="cpu")
    room(60e9)
    check_teacher_fits(TEACHER, tokens=4096, beside={"random weights": 10**9}, device="cpu")


def test_host_and_disk_are_refused_with_their_components(room, tmp_path: Path):
    room(10e9)
    with pytest.raises(DoesNotFit, match=r"(?s)sorting: expected at most 9\.500 GB of memory, got 12\.000 GB.*a copy +4\.000 GB"):
        check_host_fits({"teacher": 8 * 10**9, "a copy": 4 * 10**9}, what="sorting")
    with pytest.raises(DoesNotFit, match=r"(?s)a rung: expected at most .* free on the disk of .*trunk"):
        check_disk_fits({"trunk": 10**18}, folder=tmp_path, what="a rung")
    check_disk_fits({"trunk": 10}, folder=tmp_path, what="a rung")


def spread_over(processes: int, *, room: float, monkeypatch: pytest.MonkeyPatch, **options) -> Fitted:
    """A 4B student under an 8B teacher on GPUs of that size; the processes see the same."""
    monkeypatch.setattr(fitting, "capacity", lambda device: Capacity(device="cuda", device_bytes=int(room), host_bytes=10**11))
    monkeypatch.setattr(World, "least", lambda self, number: number)
    world = World(rank=0, size=processes, processes_on_host=processes, device="cuda:0")
    train = plan(batch_size=64, dtype="bfloat16", optimizer=options.pop("optimizer", "adamw"))
    beside = TeacherMemory(architecture=LLAMA, dtype="bfloat16")
    student = replace(LLAMA, shape=HALF)
    return fit_run(train, architecture=student, teacher=beside, sequence_length=4096, world=world, **{"moments": None, "spreading": None, **options})


def test_models_are_whole_in_every_process_while_they_fit_then_the_student_is_sharded_then_the_teacher(monkeypatch):
    found = [spread_over(8, room=room, monkeypatch=monkeypatch) for room in (160e9, 60e9, 36e9)]
    assert [(one.spreading, one.teacher_sharded) for one in found] == [("replicated", False), ("sharded", False), ("sharded", True)]
    with pytest.raises(DoesNotFit, match="on each of 8 processes, training a student"):
        spread_over(8, room=10e9, monkeypatch=monkeypatch)


def test_a_spreading_that_is_asked_for_is_kept_or_refused(monkeypatch):
    assert spread_over(8, room=160e9, monkeypatch=monkeypatch, spreading="sharded").spreading == "sharded"
    with pytest.raises(DoesNotFit):
        spread_over(8, room=36e9, monkeypatch=monkeypatch, spreading="replicated")


def test_one_process_keeps_both_whole(monkeypatch):
    assert spread_over(1, room=1e12, monkeypatch=monkeypatch).spreading == "replicated"


def test_muon_is_not_sharded(monkeypatch):
    with pytest.raises(InvalidSpec, match="optimizer: expected adamw where the weights are sharded"):
        spread_over(8, room=1e12, monkeypatch=monkeypatch, optimizer="muon", spreading="sharded")
    assert spread_over(8, room=90e9, monkeypatch=monkeypatch, optimizer="muon").spreading == "replicated"
    with pytest.raises(DoesNotFit):
        spread_over(8, room=36e9, monkeypatch=monkeypatch, optimizer="muon")
