"""What is computed once per teacher, corpus and tasks: found again, taken up after a kill, keyed by what it depends on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nas.compress import depth as depth_module
from nas.compress import fitting
from nas.compress import signals as signals_module
from nas.compress.blocks import load_blocks
from nas.compress.distillation import Stopped
from nas.errors import CorpusUnavailable, DoesNotFit, InvalidSpec, TeacherUnavailable
from nas.memory import Capacity
from nas.search import prepare as prepare_module
from nas.search import shared as shared_module
from nas.search.layout import BLOCKS, CORRECTED, PREPARED, SIGNALS, SORTED, SPLITS, prepared_key
from nas.search.prepare import StoppedEarly, prepare
from nas.search.results import RungResult
from nas.settings import Settings
from nas.spec import parse_spec
from nas.store.store import Store
from nas.submission import check_submission


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A registered tiny teacher, and a prepared folder that nothing disturbed."""

    inputs: dict[str, Any]
    folder: Path
    facts: dict[str, Any]
    lines: list[dict[str, Any]]
    values: Callable[..., dict[str, Any]]

    def spec(self, **changes: Any) -> Any:
        return parse_spec(json.dumps(self.values(**{"compression": {"depth": "bridged_damage"}, **changes})))

    def prepare(self, folder: Path, *, inputs: dict[str, Any] | None = None, stop_at: str | None = None) -> dict[str, Any]:
        lines: list[dict[str, Any]] = []
        asked = {"step": stop_at}
        return prepare(
            self.spec(),
            inputs=inputs or self.inputs,
            folder=folder,
            device="cpu",
            report=lines.append,
            should_stop=lambda: bool(lines) and lines[-1] == asked,
        )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]) -> Case:
    folder = tmp_path_factory.mktemp("prepare")
    settings = Settings.from_environment({"NAS_DATA": str(folder)})
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    spec = parse_spec(json.dumps(tiny_spec(compression={"depth": "bridged_damage"})))
    inputs = check_submission(spec, store=store).inputs
    store.close()
    lines: list[dict[str, Any]] = []
    facts = prepare(spec, inputs=inputs, folder=folder / "prepared", device="cpu", report=lines.append, should_stop=lambda: False)
    return Case(inputs=inputs, folder=folder / "prepared", facts=facts, lines=lines, values=tiny_spec)


def without_seconds(value: Any) -> Any:
    """Nor the reason for the signals' kind, which says how much of the disk happens to be free."""
    if isinstance(value, dict):
        return {name: without_seconds(item) for name, item in value.items() if name not in ("seconds", "reason")}
    return value


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("this should not be done again")


def test_a_prepared_folder_is_found_again_without_loading_a_model(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load_model", "load_shared", "build_blocks"):
        monkeypatch.setattr(prepare_module, name, refuse)
    assert case.prepare(case.folder) == case.facts


def test_a_teacher_that_was_changed_is_refused_even_where_the_folder_is_prepared(case: Case) -> None:
    changed = {**case.inputs, "teacher": {**case.inputs["teacher"], "digest": "0" * 64}}
    with pytest.raises(TeacherUnavailable, match="with which it was registered"):
        case.prepare(case.folder, inputs=changed)


def test_students_are_cut_from_float32_whatever_the_arithmetic(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "teacher_dtype", lambda *_, **__: "bfloat16")
    case.prepare(tmp_path)
    with safe_open(tmp_path / SORTED / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F32"}  # noqa: SIM118
    with safe_open(case.folder / SORTED / "model.safetensors", framework="pt") as whole:
        values = whole.get_tensor("model.embed_tokens.weight")
    assert not torch.equal(values, values.bfloat16().float())  # the teacher does not fit bfloat16, so rounding would show


def test_the_facts_are_plain_json(case: Case) -> None:
    assert json.loads(json.dumps(case.facts, allow_nan=False)) == case.facts


def test_every_step_is_told_and_timed(case: Case) -> None:
    steps = [line["step"] for line in case.lines if "done" not in line]
    assert steps == ["check", "corpus", "tasks", "importance", "depth", "sort", "moments", "signals", "baselines"]
    assert list(case.facts["seconds"]) == steps


@pytest.mark.parametrize("part", ["teacher", "teacher_held_out"])
def test_the_teacher_does_not_differ_from_itself(case: Case, part: str) -> None:
    teacher = RungResult.from_dict(case.facts[part])
    assert abs(teacher.kl.value) < 1e-6
    assert teacher.tasks["choice"].value == 1.0


def test_random_weights_differ_from_the_teacher_on_both_halves(case: Case) -> None:
    for part in ("random", "random_held_out"):
        assert RungResult.from_dict(case.facts[part]).kl.value > 0.1


def test_rungs_and_confirmation_share_no_document(case: Case) -> None:
    split = json.loads((case.folder / SPLITS).read_text())["choice"]
    assert not set(split["search"]) & set(split["held_out"])
    assert {name: len(ids) for name, ids in split.items()} == case.facts["documents"]["choice"]


def test_both_halves_of_the_validation_blocks_have_what_the_spec_asks_for(case: Case) -> None:
    assert load_blocks(case.folder / BLOCKS).validation_NT.numel() == 2 * case.spec().corpus.validation_tokens


@pytest.mark.parametrize("step", ["check", "corpus", "tasks", "importance", "depth", "sort", "moments", "signals"])
def test_stopped_after_any_step_and_run_again_it_finds_the_same(case: Case, tmp_path: Path, step: str) -> None:
    with pytest.raises(StoppedEarly):
        case.prepare(tmp_path, stop_at=step)
    assert not (tmp_path / PREPARED).exists()
    assert without_seconds(case.prepare(tmp_path)) == without_seconds(case.facts)


def test_run_again_it_takes_up_the_blocks_and_the_sorted_teacher(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (BLOCKS, SORTED):
        shutil.copytree(case.folder / name, tmp_path / name)
    for name in ("build_blocks", "measure_importance"):
        monkeypatch.setattr(prepare_module, name, refuse)
    assert without_seconds(case.prepare(tmp_path)) == without_seconds(case.facts)


def test_signals_that_were_begun_are_gone_on_with(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget of an attempt that goes on is not less by what the first one wrote."""
    shutil.copytree(case.folder / SIGNALS, tmp_path / SIGNALS)
    (tmp_path / SIGNALS / "choice.json").unlink()
    monkeypatch.setattr(signals_module, "_make_shard", refuse)
    used = sum(file.stat().st_size for file in (tmp_path / SIGNALS).iterdir())
    full = SimpleNamespace(free=case.facts["signals"]["bytes"] - used + 1)
    monkeypatch.setattr(shared_module.shutil, "disk_usage", lambda _: full)
    facts = case.prepare(tmp_path)
    assert facts["signals"]["kind"] == "exact"
    assert without_seconds(facts) | {"signals": None} == without_seconds(case.facts) | {"signals": None}


def test_signals_of_a_teacher_in_another_order_are_not_taken_up(case: Case, tmp_path: Path) -> None:
    """Its channels, and with them the stored states, are permuted: under another order's head they would be noise."""
    shutil.copytree(case.folder / SIGNALS, tmp_path / SIGNALS)
    shard = next((tmp_path / SIGNALS).glob("train-00000.json"))
    before = json.loads(shard.read_text())["sha256"]
    other = case.spec(compression={"depth": "damage", "importance": "l2_mean"})
    facts = prepare(other, inputs=case.inputs, folder=tmp_path, device="cpu", report=lambda line: None, should_stop=lambda: False)
    assert abs(RungResult.from_dict(facts["teacher"]).kl.value) < 1e-6
    assert json.loads(shard.read_text())["sha256"] != before


def test_a_kind_of_signals_that_does_not_fit_is_refused_with_the_numbers(case: Case, tmp_path: Path) -> None:
    spec = case.spec(distillation={"learning_rate": 3e-3, "batch_size": 4, "signals": "exact", "max_signal_bytes": 1000})
    with pytest.raises(
        InvalidSpec, match=r"distillation.signals: expected exact 657,664 bytes for 4,096 training tokens, got 1,000 \(distillation.max_signal_bytes\)"
    ):
        prepare(spec, inputs=case.inputs, folder=tmp_path, device="cpu", report=lambda line: None, should_stop=lambda: False)


def test_a_corrected_teacher_is_the_teacher_of_all_that_follows(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = case.spec(compression={"teacher_correction_tokens": 16_384})

    def corrected(**changes: Any) -> dict[str, Any]:
        told = {"report": lambda line: None, "should_stop": lambda: False, **changes}
        return prepare(spec, inputs=case.inputs, folder=tmp_path, device="cpu", **told)

    lines: list[dict[str, Any]] = []
    asked = iter(range(10))
    with pytest.raises(Stopped):
        corrected(report=lines.append, should_stop=lambda: bool(lines) and lines[-1] == {"step": "correction"} and next(asked) > 4)
    facts = corrected()
    assert facts["correction"]["loss_after"] < facts["correction"]["loss_before"] - 3 * facts["correction"]["loss_standard_error"]
    assert facts["correction"]["learning_rate"] == pytest.approx(3e-3 / 5)
    with safe_open(tmp_path / SORTED / "model.safetensors", framework="pt") as tensors, safe_open(case.folder / SORTED / "model.safetensors", "pt") as plain:
        # Sorting permutes: the sum of a matrix is the corrected teacher's.
        found, expected = (file.get_tensor("lm_head.weight").double().sum() for file in (tensors, plain))
    with safe_open(tmp_path / CORRECTED / "model.safetensors", framework="pt") as tensors:
        assert tensors.get_tensor("lm_head.weight").double().sum() == pytest.approx(float(found))
    assert float(found) != pytest.approx(float(expected))
    assert abs(RungResult.from_dict(facts["teacher"]).kl.value) < 1e-6
    assert RungResult.from_dict(facts["teacher"]).loss.value < RungResult.from_dict(case.facts["teacher"]).loss.value
    monkeypatch.setattr(prepare_module, "correct_teacher", refuse)
    (tmp_path / PREPARED).unlink()
    assert without_seconds(corrected()) == without_seconds(facts)


def test_a_damaged_sorted_teacher_is_made_again(case: Case, tmp_path: Path) -> None:
    shutil.copytree(case.folder / SORTED, tmp_path / SORTED)
    weights = tmp_path / SORTED / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    assert without_seconds(case.prepare(tmp_path)) == without_seconds(case.facts)


def test_a_teacher_that_was_changed_since_it_was_registered_is_refused(case: Case, tmp_path: Path) -> None:
    copied = shutil.copytree(case.inputs["teacher"]["path"], tmp_path / "teacher")
    (copied / "tokenizer_config.json").write_text("{}")
    changed = {**case.inputs, "teacher": {**case.inputs["teacher"], "path": str(copied)}}
    with pytest.raises(TeacherUnavailable, match=r"teacher tiny: expected the digest .* with which it was registered"):
        case.prepare(tmp_path / "prepared", inputs=changed)


def test_a_corpus_that_was_changed_since_it_was_registered_is_refused(case: Case, tmp_path: Path) -> None:
    longer = tmp_path / "corpus.jsonl"
    longer.write_text(Path(case.inputs["corpora"][0]["files"][0]).read_text() + '{"text": "one more"}\n')
    changed = {**case.inputs, "corpora": [{**case.inputs["corpora"][0], "files": [str(longer)]}]}
    with pytest.raises(CorpusUnavailable, match="corpus words: expected the digest"):
        case.prepare(tmp_path / "prepared", inputs=changed)


def test_layers_are_selected_on_few_tokens_and_report_how_far_they_are(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    real = depth_module.bridged_damage

    def recorded(model: Any, *, blocks_BT: Any, batch_size: int) -> Any:
        used.append(blocks_BT.numel())
        return real(model, blocks_BT=blocks_BT, batch_size=batch_size)

    monkeypatch.setattr(depth_module, "bridged_damage", recorded)
    monkeypatch.setattr(depth_module, "DEPTH_TOKENS", 100)
    monkeypatch.setattr(prepare_module, "REPORT_SECONDS", 0.0)
    lines: list[dict[str, Any]] = []
    stopping = pytest.raises(StoppedEarly)
    with stopping:  # asked in the middle of the step, it does not go through all the sets
        prepare(
            case.spec(), inputs=case.inputs, folder=tmp_path, device="cpu", report=lines.append, should_stop=lambda: lines[-1:] and lines[-1].get("done") == 2
        )  # type: ignore[arg-type,return-value]
    assert used == [96]
    assert [line["done"] for line in lines if line["step"] == "depth" and "done" in line] == [1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"corpus": {"parts": [{"name": "words"}], "sequence_length": 16, "calibration_tokens": 512, "validation_tokens": 512}},
        {"corpus": {"parts": [{"name": "words"}], "sequence_length": 32, "calibration_tokens": 256, "validation_tokens": 512}},
        {"rungs": {"first_tokens": 4096, "factor": 2, "num_trained": 2, "keep": 0.5}},
        {"compression": {"depth": "block_influence"}},
        {"compression": {"depth": "damage", "importance": "l2_mean"}},
        {"evaluation": {"documents_per_task": 8, "latency_prompt_tokens": 8, "latency_new_tokens": 2}},
        {"distillation": {"learning_rate": 3e-3, "batch_size": 4, "signals": "top_k"}},
        {"distillation": {"learning_rate": 3e-3, "batch_size": 4, "max_signal_bytes": 10**6}},
        {"compression": {"teacher_correction_tokens": 2048}},
        {"tasks": [{"name": "choice", "num_fewshot": 1}]},
        {"space": {"num_hidden_layers": {"min": 3}}, "controls": {"anchors": False}},
    ],
)
def test_the_key_changes_with_what_the_folder_depends_on(case: Case, changes: dict[str, Any]) -> None:
    assert prepared_key(case.spec(**changes), inputs=case.inputs) != prepared_key(case.spec(), inputs=case.inputs)


def test_the_key_changes_with_the_tasks_weights_where_tasks_choose_the_layers(case: Case) -> None:
    one, three = (case.spec(compression={"depth": "task"}, tasks=[{"name": "choice", "weight": weight}]) for weight in (1.0, 3.0))
    assert prepared_key(one, inputs=case.inputs) != prepared_key(three, inputs=case.inputs)


@pytest.mark.parametrize("part", ["teacher", "corpora", "tasks"])
def test_the_key_changes_with_the_content_of_the_inputs(case: Case, part: str) -> None:
    value = case.inputs[part]
    other = [{**value[0], "digest": "f" * 64}] if isinstance(value, list) else {**value, "digest": "f" * 64}
    assert prepared_key(case.spec(), inputs={**case.inputs, part: other}) != prepared_key(case.spec(), inputs=case.inputs)


@pytest.mark.parametrize(
    "changes",
    [
        {"label": "another"},
        {"num_finalists": 2},
        {"sampler": {"name": "random", "max_trials": 9}},
        {"distillation": {"learning_rate": 1e-4, "batch_size": 8}},
        {"tasks": [{"name": "choice", "weight": 3.0}]},
        {"rungs": {"first_tokens": 1024, "factor": 4, "num_trained": 2}},
        {"limits": {"max_attempts": 1}},
    ],
)
def test_the_key_does_not_change_with_anything_else(case: Case, changes: dict[str, Any]) -> None:
    assert prepared_key(case.spec(**changes), inputs=case.inputs) == prepared_key(case.spec(), inputs=case.inputs)


def test_a_teacher_that_does_not_fit_is_refused_before_it_is_loaded(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = {"cpu": 10**9, "cuda": 10**5}
    monkeypatch.setattr(fitting, "capacity", lambda device: Capacity(device=device, device_bytes=room[device], host_bytes=10**9))
    with pytest.raises(DoesNotFit, match=r"(?s)the teacher: .*teacher weights .*torchrun"):
        prepare(case.spec(), inputs=case.inputs, folder=tmp_path / "new", device="cuda", report=lambda line: None, should_stop=lambda: False)
    assert not (tmp_path / "new").exists()
