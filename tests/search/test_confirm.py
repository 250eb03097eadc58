"""Verified or not ranked: a saved student that is not what it claims to be is found out, and the reason says what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nas.errors import CorruptFile
from nas.search.confirm import confirm, count_file, verify
from nas.search.prepare import prepare
from nas.search.results import RungResult
from nas.search.trial import STUDENT, run_rung
from nas.settings import Settings
from nas.shape import Shape
from nas.spec import SearchSpec, parse_spec
from nas.store.store import Store
from nas.submission import check_submission

SHAPE = Shape(num_hidden_layers=2, hidden_size=24, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A trial that reached its last rung."""

    spec: SearchSpec
    inputs: dict[str, Any]
    prepared: Path
    trial: Path

    def verify(self, trial: Path, *, with_reload: bool = False) -> str | None:
        return verify(trial / STUDENT, probe=trial, shape=SHAPE, config=self.inputs["teacher"]["config"], with_reload=with_reload)[0]

    def confirm(self, trial: Path, *, with_reload: bool = False) -> dict[str, Any]:
        return confirm(self.spec, inputs=self.inputs, prepared=self.prepared, shape=SHAPE, folder=trial, device="cpu", with_reload=with_reload)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]) -> Case:
    folder = tmp_path_factory.mktemp("confirm")
    settings = Settings.from_environment({"NAS_DATA": str(folder)})
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    spec = parse_spec(json.dumps(tiny_spec(rungs={"first_tokens": 2048, "factor": 2, "num_trained": 1})))
    inputs = check_submission(spec, store=store).inputs
    store.close()
    prepared = folder / "prepared"
    prepare(spec, inputs=inputs, folder=prepared, device="cpu", report=lambda line: None, should_stop=lambda: False)
    trial = folder / "trial"
    run_rung(
        spec,
        inputs=inputs,
        prepared=prepared,
        shape=SHAPE,
        rung=1,
        folder=trial,
        device="cpu",
        report=lambda progress: None,
        should_stop=lambda: False,
    )
    return Case(spec=spec, inputs=inputs, prepared=prepared, trial=trial)


@pytest.fixture
def trial(case: Case, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return shutil.copytree(case.trial, tmp_path / "trial")


def change_tensors(trial: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = trial / STUDENT / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(trial: Path, **changes: Any) -> None:
    file = trial / STUDENT / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_honest_student_is_verified_in_a_fresh_process_and_measured_on_held_out_documents(case: Case) -> None:
    confirmed = case.confirm(case.trial, with_reload=True)
    assert (confirmed["verified"], confirmed["reason"]) == (True, None)
    assert confirmed["parameters"] == count_file(case.trial / STUDENT)
    held_out = RungResult.from_dict(confirmed["held_out"])
    assert len(held_out.tasks["choice"].documents) == 32
    assert confirmed["latency"]["new_tokens"] == 2
    json.dumps(confirmed, allow_nan=False)


def test_a_changed_weight_is_found_in_the_logits(case: Case, trial: Path) -> None:
    change_tensors(trial, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.5))
    confirmed = case.confirm(trial, with_reload=True)
    assert confirmed["verified"] is False
    assert "reload: expected the trained student's logits within 0.001, got a difference of" in confirmed["reason"]


def test_a_changed_epsilon_is_found_in_the_logits(case: Case, trial: Path) -> None:
    change_config(trial, rms_norm_eps=0.5)
    assert "got a difference of" in str(case.verify(trial, with_reload=True))


def test_a_config_that_transformers_cannot_load_is_told_with_its_error(case: Case, trial: Path) -> None:
    change_config(trial, hidden_act="no such function")
    assert "reload: expected plain transformers to load and generate, got exit code 1" in str(case.verify(trial, with_reload=True))


def test_an_extra_layer_is_counted(case: Case, trial: Path) -> None:
    def add_layer(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in tensors.items() if "layers.1." in name})

    change_tensors(trial, add_layer)
    assert str(case.verify(trial)).startswith(f"parameters: expected {count_file(case.trial / STUDENT)} for shape {SHAPE.key}, got ")


def test_another_shape_in_the_config_is_told(case: Case, trial: Path) -> None:
    change_config(trial, num_attention_heads=2)
    assert "config.json: expected shape" in str(case.verify(trial))


def test_a_student_that_cannot_be_measured_at_all_fails_with_the_reason(case: Case, trial: Path) -> None:
    change_config(trial, hidden_size=16)
    with pytest.raises(CorruptFile, match=r"config.json: expected shape L2-D24-.*, got L2-D16-"):
        case.confirm(trial)


def test_missing_weights_are_named(case: Case, trial: Path) -> None:
    (trial / STUDENT / "model.safetensors").unlink()
    with pytest.raises(CorruptFile, match=r"expected model\.safetensors, got no such file"):
        case.confirm(trial)


def test_a_damaged_probe_is_no_proof(case: Case, trial: Path) -> None:
    (probe,) = trial.glob("probe-*.safetensors")
    probe.write_bytes(probe.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CorruptFile):
        case.verify(trial, with_reload=True)
