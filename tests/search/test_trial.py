"""One rung of one trial: the same bits however often it was stopped, equal tokens, and metrics that can be paired."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.compress import fitting
from nas.compress.distillation import Diverged, Stopped
from nas.errors import DoesNotFit, TaskUnavailable
from nas.evaluate.scores import DocumentValues, MetricValue, TaskScore
from nas.memory import Capacity
from nas.search import shared as shared_module
from nas.search.layout import PROBE, RECONSTRUCTION, SIGNALS, STUDENT, clear_below
from nas.search.prepare import prepare
from nas.search.results import RungResult
from nas.search.shared import forget_shared, load_shared
from nas.search.trial import measure, paired_metric, run_rung
from nas.settings import Settings
from nas.shape import Shape
from nas.spec import SearchSpec, dump_spec, parse_spec
from nas.store.store import Store
from nas.submission import check_submission

SHAPE = Shape(num_hidden_layers=2, hidden_size=24, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
OTHER = Shape(num_hidden_layers=3, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, head_dim=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A prepared folder of the tiny teacher."""

    spec: SearchSpec
    inputs: dict[str, Any]
    prepared: Path

    def run(self, folder: Path, *, rung: int, shape: Shape = SHAPE, stop_after: int | None = None, seed: int | None = None) -> RungResult:
        asked = iter(range(10**6))
        return run_rung(
            self.spec,
            inputs=self.inputs,
            prepared=self.prepared,
            shape=shape,
            rung=rung,
            folder=folder,
            device="cpu",
            report=lambda progress: None,
            should_stop=lambda: stop_after is not None and next(asked) >= stop_after,
            seed=seed,
        )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]) -> Case:
    folder = tmp_path_factory.mktemp("trial")
    settings = Settings.from_environment({"NAS_DATA": str(folder)})
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    spec = parse_spec(json.dumps(tiny_spec()))
    inputs = check_submission(spec, store=store).inputs
    store.close()
    prepare(spec, inputs=inputs, folder=folder / "prepared", device="cpu", report=lambda line: None, should_stop=lambda: False)
    return Case(spec=spec, inputs=inputs, prepared=folder / "prepared")


@pytest.fixture(scope="module")
def undisturbed(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RungResult]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, [case.run(folder, rung=rung) for rung in range(3)]


def bits(result: RungResult) -> dict[str, Any]:
    return {name: value for name, value in result.as_dict().items() if name != "seconds"}


def weights(folder: Path) -> bytes:
    return (folder / STUDENT / "model.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_results_and_the_same_weights_bit_for_bit(case: Case, undisturbed: Any, tmp_path: Path) -> None:
    folder, results = undisturbed
    assert [bits(case.run(tmp_path, rung=rung)) for rung in range(3)] == [bits(result) for result in results]
    assert weights(tmp_path) == weights(folder)


def test_another_seed_is_another_data_order_and_nothing_else(case: Case, undisturbed: Any, tmp_path: Path) -> None:
    """Untrained it is the same student; trained it is what a search with that seed trains."""
    results = [case.run(tmp_path / "repeat", rung=rung, seed=case.spec.seed + 1) for rung in (0, 1)]
    values = dump_spec(case.spec)
    other = Case(spec=parse_spec(json.dumps({**values, "seed": values["seed"] + 1})), inputs=case.inputs, prepared=case.prepared)
    other.run(tmp_path / "other", rung=0)

    _, usual = undisturbed
    assert results[0].kl == usual[0].kl
    assert results[1].kl != usual[1].kl
    assert results[1].kl == other.run(tmp_path / "other", rung=1).kl


def test_every_rung_starts_from_the_reconstruction_that_the_first_one_settled(case: Case, undisturbed: Any, tmp_path: Path) -> None:
    folder, results = undisturbed
    assert results[0].reconstruction is not None
    assert {json.dumps(result.reconstruction) for result in results} == {(json.dumps(results[0].reconstruction))}
    assert json.loads((folder / RECONSTRUCTION).read_text()) == results[0].reconstruction
    plain = Case(spec=parse_spec(json.dumps(dump_spec(case.spec) | {"compression": {"reconstruction": False}})), inputs=case.inputs, prepared=case.prepared)
    without = plain.run(tmp_path, rung=0)
    assert without.reconstruction is None
    assert not (tmp_path / RECONSTRUCTION).exists()
    assert results[0].loss.value < without.loss.value if results[0].reconstruction["kept"] else results[0].loss == without.loss


@pytest.mark.parametrize("stop_after", [0, 5, 13, 21, 30])
def test_a_rung_that_was_stopped_and_resumed_equals_one_that_was_not(case: Case, undisturbed: Any, tmp_path: Path, stop_after: int) -> None:
    folder, results = undisturbed
    case.run(tmp_path, rung=1)
    for _ in range(2):
        try:
            last = case.run(tmp_path, rung=2, stop_after=stop_after)
        except Stopped:
            continue
        break
    else:
        last = case.run(tmp_path, rung=2)
    assert bits(last) == bits(results[2])
    assert weights(tmp_path) == weights(folder)


@pytest.fixture(scope="module")
def variant(case: Case, tmp_path_factory: pytest.TempPathFactory, tiny_spec: Callable[..., dict[str, Any]]) -> Callable[[str], Case]:
    """The same case with other signals."""

    def make(signals: str) -> Case:
        folder = tmp_path_factory.mktemp(signals)
        spec = parse_spec(json.dumps(tiny_spec(distillation={"learning_rate": 3e-3, "batch_size": 4, "signals": signals})))
        prepare(spec, inputs=case.inputs, folder=folder, device="cpu", report=lambda line: None, should_stop=lambda: False)
        return Case(spec=spec, inputs=case.inputs, prepared=folder)

    return make


def test_with_exact_signals_a_trial_gives_the_bits_of_one_with_the_teacher_and_loads_none(
    case: Case, variant: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_loop = variant("off")
    expected = [in_the_loop.run(tmp_path / "off", rung=rung) for rung in range(3)]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a trial with signals has no use for the teacher")

    monkeypatch.setattr(shared_module, "load_model", refuse)
    assert [bits(case.run(tmp_path / "exact", rung=rung)) for rung in range(3)] == [bits(result) for result in expected]
    assert weights(tmp_path / "exact") == weights(tmp_path / "off")


@pytest.mark.parametrize("hidden_states", ["off", "all"])
def test_every_choice_of_hidden_states_trains_another_student_that_is_nearer_to_the_teacher(
    case: Case, undisturbed: Any, tmp_path: Path, tiny_spec: Callable[..., dict[str, Any]], hidden_states: str
) -> None:
    distillation = {"learning_rate": 3e-3, "batch_size": 4, "signals": "auto" if hidden_states == "off" else "off", "hidden_states": hidden_states}
    spec = parse_spec(json.dumps(tiny_spec(distillation=distillation)))
    prepare(spec, inputs=case.inputs, folder=tmp_path / "prepared", device="cpu", report=lambda line: None, should_stop=lambda: False)
    other = Case(spec=spec, inputs=case.inputs, prepared=tmp_path / "prepared")
    results = [other.run(tmp_path, rung=rung) for rung in range(2)]
    assert results[0].kl == undisturbed[1][0].kl
    assert results[1].kl.value < results[0].kl.value
    assert results[1].kl.value != undisturbed[1][1].kl.value


def test_with_top_k_signals_held_out_kl_is_still_exact_and_training_is_close(
    case: Case, undisturbed: Any, variant: Callable[[str], Case], tmp_path: Path
) -> None:
    kept = variant("top_k")
    results = [kept.run(tmp_path, rung=rung) for rung in range(3)]
    assert results[0].kl == undisturbed[1][0].kl  # no training yet: measured by the same signals
    assert results[2].kl.value == pytest.approx(undisturbed[1][2].kl.value, rel=0.02)
    assert results[2].kl.value != undisturbed[1][2].kl.value


def test_a_flipped_bit_in_the_signals_costs_time_and_not_the_trial(case: Case, undisturbed: Any, tmp_path: Path) -> None:
    forget_shared()  # an open shard was compared with its digest already
    (shard,) = (case.prepared / SIGNALS).glob("train-00000-*.safetensors")
    sound = shard.read_bytes()
    shard.unlink()  # its old content may still be mapped
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert bits(case.run(tmp_path, rung=1)) == bits(undisturbed[1][1])
    assert shard.read_bytes() == sound


def test_a_rung_whose_trunk_is_lost_gives_the_same_student_from_the_start(case: Case, undisturbed: Any, tmp_path: Path) -> None:
    folder, results = undisturbed
    assert bits(case.run(tmp_path, rung=2)) == bits(results[2])
    assert weights(tmp_path) == weights(folder)


@pytest.mark.parametrize("rung", [1, 2])
def test_a_damaged_checkpoint_costs_time_and_not_the_trial(case: Case, undisturbed: Any, tmp_path: Path, rung: int) -> None:
    case.run(tmp_path, rung=1)
    with pytest.raises(Stopped):
        case.run(tmp_path, rung=2, stop_after=3)
    (damaged,) = (tmp_path / f"rung{rung}").glob("trunk-*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    assert bits(case.run(tmp_path, rung=2)) == bits(undisturbed[1][2])


def test_shapes_are_compared_at_equal_tokens(case: Case, undisturbed: Any, tmp_path: Path) -> None:
    other = [case.run(tmp_path, rung=rung, shape=OTHER) for rung in range(2)]
    assert [result.tokens for result in other] == [result.tokens for result in undisturbed[1][:2]] == [0, 2048]


def test_distillation_brings_the_student_nearer_to_the_teacher(undisturbed: Any) -> None:
    untrained, first, second = (result.kl.value for result in undisturbed[1])
    assert untrained > first > second > 0


def test_tasks_are_scored_at_the_rungs_that_the_spec_asks_for(case: Case, undisturbed: Any) -> None:
    assert [list(result.tasks) for result in undisturbed[1]] == [["choice"] if case.spec.scores_tasks(rung) else [] for rung in range(3)]
    assert list(undisturbed[1][2].tasks) == ["choice"]


def test_results_are_plain_json_and_parameters_are_counted(undisturbed: Any) -> None:
    for result in undisturbed[1]:
        json.dumps(result.as_dict(), allow_nan=False)
    assert {result.parameters for result in undisturbed[1]} == {2 * 18 * 24 + 24 + 2 * (2 * 24 + 2 * 24 * 32 + 2 * 24 * 16 + 3 * 24 * 32)}


def test_clearing_keeps_the_checkpoint_that_the_next_rung_resumes(case: Case, tmp_path: Path) -> None:
    for rung in (1, 2):
        case.run(tmp_path, rung=rung)
    clear_below(tmp_path, rung=2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("rung")) == ["rung2"]
    assert (tmp_path / f"{PROBE}.json").exists()


def test_a_model_that_is_not_a_number_has_diverged(case: Case) -> None:
    shared = load_shared(case.spec, inputs=case.inputs, prepared=case.prepared, device="cpu")
    model = type(shared.teacher)(shared.teacher.config)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(Diverged, match="KL or loss on the validation blocks: expected a finite number"):
        measure(case.spec, inputs=case.inputs, prepared=case.prepared, model=model, device="cpu", rung=1, tokens=0, held_out=False, with_tasks=True)


def a_score(values: DocumentValues) -> TaskScore:
    metric = MetricValue(value=values.value, standard_error=values.standard_error, higher_is_better=False)
    ids = tuple(range(len(values.numerators)))
    return TaskScore(name="task", metrics={"metric": metric, "f1": metric}, document_ids=ids, documents={"metric": values})


@given(st.integers(2, 30), st.booleans(), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_paired_metric_is_the_mean_of_its_documents_with_the_delta_method_s_error(count: int, is_mean: bool, exponential: bool, seed: int) -> None:
    generator = random.Random(seed)
    denominators = tuple(1.0 if is_mean else generator.uniform(1, 100) for _ in range(count))
    values = DocumentValues(numerators=tuple(generator.uniform(0, 3) * d for d in denominators), denominators=denominators, exponential=exponential)
    paired = paired_metric(a_score(values), name="metric")
    assert math.fsum(paired.documents) / count == pytest.approx(paired.value, rel=1e-9)
    assert paired.value == values.value
    assert paired.standard_error == pytest.approx(values.standard_error, rel=1e-6, abs=1e-12)


def test_an_accuracy_s_error_is_lm_eval_s(undisturbed: Any) -> None:
    result = undisturbed[1][2]
    accuracy, lm_eval = result.tasks["choice"], result.details["choice"]["acc"]
    assert (accuracy.value, accuracy.standard_error) == pytest.approx((lm_eval["value"], lm_eval["standard_error"]))
    assert set(accuracy.documents) <= {0.0, 1.0}


def test_a_metric_without_documents_cannot_rank() -> None:
    values = DocumentValues(numerators=(1.0, 0.0), denominators=(1.0, 1.0), exponential=False)
    with pytest.raises(TaskUnavailable, match=r"metric of task task: expected a mean over documents \(metric\), got 'f1'"):
        paired_metric(a_score(values), name="f1")


def test_a_rung_that_does_not_fit_is_refused_before_anything_is_trained(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "capacity", lambda device: Capacity(device="cpu", device_bytes=10**5, host_bytes=10**5))
    with pytest.raises(DoesNotFit, match=r"(?s)training a student of .* parameters: expected at most .*gradients"):
        case.run(tmp_path, rung=1)
    assert list(tmp_path.iterdir()) == []
