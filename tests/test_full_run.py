"""The full run and pruning without a search: what they write, and that a folder holds one run and no other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nas import full_run, pruning, run_folder
from nas.compress.blocks import load_blocks
from nas.compress.corpus import check_corpus
from nas.compress.distillation import Diverged, Stopped
from nas.compress.held_out import HeldOut
from nas.compress.teacher import check_teacher, write_checkpoint
from nas.errors import Conflict, InvalidSpec
from nas.full_run import distil_fully
from nas.pruning import prune_teacher
from nas.recipe import Recipe, RecipeInputs
from nas.shape import Shape

SHAPE = Shape(num_hidden_layers=2, hidden_size=24, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
RECIPE = Recipe(tokens=4096, learning_rate=3e-3, batch_size=4, sequence_length=32, validation_tokens=256)


@pytest.fixture(scope="module")
def student(tiny_sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "pruned"
    prune(tiny_sources, out=folder)
    return folder


def prune(sources: dict[str, Path], *, out: Path, shape: Shape = SHAPE, sequence_length: int = 32) -> dict[str, Any]:
    corpus = [sources["corpus"]]
    return prune_teacher(teacher=sources["teacher"], shape=shape, corpus=corpus, out=out, device="cpu", sequence_length=sequence_length, calibration_tokens=512)


def distil(
    sources: dict[str, Path],
    *,
    student: Path,
    out: Path,
    recipe: Recipe = RECIPE,
    corpora: Sequence[tuple[Path, float]] | None = None,
    expected_teacher: str | None = None,
    stop_after: int | None = None,
) -> dict[str, Any]:
    asked = iter(range(10**6))
    return distil_fully(
        recipe,
        student=student,
        teacher=sources["teacher"],
        corpora=[(check_corpus([path]), weight) for path, weight in corpora or [(sources["corpus"], 1.0)]],
        out=out,
        device="cpu",
        expected_teacher=expected_teacher,
        should_stop=lambda: stop_after is not None and next(asked) >= stop_after,
    )


def test_a_pruned_teacher_has_the_shape_and_loads_with_plain_transformers(student: Path) -> None:
    assert check_teacher(student).architecture.shape == SHAPE
    model = AutoModelForCausalLM.from_pretrained(student)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    kept = json.loads((student / "kept_indices.json").read_text())
    assert len(kept["layers"]) == 2
    assert not (student / run_folder.WORK).exists()


def test_a_plain_slice_is_given_when_it_is_asked_for(tiny_sources: dict[str, Path], student: Path, tmp_path: Path) -> None:
    fitted = json.loads((student / "kept_indices.json").read_text())
    summary = prune_teacher(
        teacher=tiny_sources["teacher"],
        shape=SHAPE,
        corpus=[tiny_sources["corpus"]],
        out=tmp_path / "plain",
        device="cpu",
        sequence_length=32,
        calibration_tokens=512,
        reconstruction=False,
    )
    plain = json.loads((tmp_path / "plain" / "kept_indices.json").read_text())
    assert summary["reconstruction"] is None
    assert len(plain["hidden_channels"]) == SHAPE.hidden_size
    assert {name: kept for name, kept in plain.items() if name != "hidden_channels"} == {
        name: kept for name, kept in fitted.items() if name != "hidden_channels"
    }
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() != (student / "model.safetensors").read_bytes()


def test_the_full_shape_is_the_teacher(tiny_sources: dict[str, Path], tmp_path: Path) -> None:
    whole = check_teacher(tiny_sources["teacher"]).architecture.shape
    prune(tiny_sources, out=tmp_path / "whole", shape=whole)
    tokens = torch.tensor([[1, 5, 9, 4]])
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_sources["teacher"], tmp_path / "whole")]
    first, second = (model(tokens).logits for model in models)
    assert (first - second).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 40}, "hidden_size: expected at most the teacher's 32, got 40"),
        ({"head_dim": 16}, "head_dim: expected the teacher's 8, got 16"),
        ({"hidden_size": 25}, "hidden_size: expected a multiple of num_attention_heads=2, .* got 25"),
        ({"sequence_length": 65}, "sequence_length: expected at most the teacher's context of 64, got 65"),
        ({"num_attention_heads": 4, "num_key_value_heads": 1}, "num_attention_heads: expected at most the teacher's 2 query heads per KV head, got 4 for 1"),
    ],
)
def test_what_cannot_be_cut_out_is_told_before_the_work(
    tiny_sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], message: str
) -> None:
    for work in ("check_corpus", "load_model", "build_blocks"):
        monkeypatch.setattr(pruning, work, None)
    sequence_length = changes.get("sequence_length", 32)
    shape = replace(SHAPE, **{name: value for name, value in changes.items() if name != "sequence_length"})
    with pytest.raises(InvalidSpec, match=message):
        prune(tiny_sources, out=tmp_path / "out", shape=shape, sequence_length=sequence_length)
    assert not (tmp_path / "out").exists()


def test_distillation_lowers_the_held_out_kl_and_leaves_a_checkpoint_alone(tiny_sources: dict[str, Path], student: Path, tmp_path: Path) -> None:
    summary = distil(tiny_sources, student=student, out=tmp_path)
    assert summary["held_out_after"]["kl"] < summary["held_out_before"]["kl"]
    assert check_teacher(tmp_path).architecture.shape == SHAPE
    assert not (tmp_path / run_folder.WORK).exists()
    assert json.loads((tmp_path / "distillation.json").read_text()) == summary


@pytest.mark.parametrize("stop_after", [0, 7, 26, 30])
def test_a_run_that_was_stopped_and_resumed_gives_the_same_weights_bit_for_bit(
    tiny_sources: dict[str, Path], student: Path, tmp_path: Path, stop_after: int
) -> None:
    distil(tiny_sources, student=student, out=tmp_path / "whole")
    with pytest.raises(Stopped):
        distil(tiny_sources, student=student, out=tmp_path / "stopped", stop_after=stop_after)
    distil(tiny_sources, student=student, out=tmp_path / "stopped")
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("damaged", "stop_after"), [("trunk", 7), ("trunk", 30), ("branch", 30)])
def test_a_damaged_checkpoint_costs_time_and_not_the_run(tiny_sources: dict[str, Path], student: Path, tmp_path: Path, damaged: str, stop_after: int) -> None:
    distil(tiny_sources, student=student, out=tmp_path / "whole")
    with pytest.raises(Stopped):
        distil(tiny_sources, student=student, out=tmp_path / "stopped", stop_after=stop_after)
    (file,) = (tmp_path / "stopped" / run_folder.WORK / run_folder.CHECKPOINT).glob(f"{damaged}-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    distil(tiny_sources, student=student, out=tmp_path / "stopped")
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_another_teacher_than_the_student_s_is_refused(tiny_sources: dict[str, Path], student: Path, tmp_path: Path) -> None:
    digest = check_teacher(tiny_sources["teacher"]).digest
    expected = f"teacher: expected the one that the student was cut out of, digest {'0' * 64}, got .*, digest {digest}"
    with pytest.raises(InvalidSpec, match=expected):
        distil(tiny_sources, student=student, out=tmp_path / "out", expected_teacher="0" * 64)
    assert not (tmp_path / "out").exists()
    assert distil(tiny_sources, student=student, out=tmp_path / "out", expected_teacher=digest)["tokens"] == RECIPE.tokens


@pytest.fixture
def second_corpus(tiny_sources: dict[str, Path], tmp_path: Path) -> Path:
    """The same words in other sentences."""
    lines = tiny_sources["corpus"].read_text().splitlines()
    path = tmp_path / "second.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(reversed(json.loads(line)["text"].split()))}) + "\n" for line in lines))
    return path


def test_corpora_are_mixed_by_their_weights(tiny_sources: dict[str, Path], second_corpus: Path, student: Path, tmp_path: Path) -> None:
    corpora = [(tiny_sources["corpus"], 3.0), (second_corpus, 1.0)]
    with pytest.raises(Stopped):
        distil(tiny_sources, student=student, out=tmp_path / "out", corpora=corpora, stop_after=0)
    parts = load_blocks(tmp_path / "out" / run_folder.WORK / "blocks").facts["parts"]
    assert [(part["name"], part["train"]["blocks"], part["validation"]["blocks"]) for part in parts] == [("corpus.jsonl", 96, 6), ("second.jsonl", 32, 2)]


def test_a_run_does_not_go_on_with_other_weights(tiny_sources: dict[str, Path], second_corpus: Path, student: Path, tmp_path: Path) -> None:
    paths = [tiny_sources["corpus"], second_corpus]
    with pytest.raises(Stopped):
        distil(tiny_sources, student=student, out=tmp_path / "out", corpora=list(zip(paths, [3.0, 1.0], strict=True)), stop_after=3)
    with pytest.raises(Conflict, match=r"weights: expected \[3\.0, 1\.0\], with which it was begun, got \[1\.0, 1\.0\]"):
        distil(tiny_sources, student=student, out=tmp_path / "out", corpora=list(zip(paths, [1.0, 1.0], strict=True)))


def test_a_student_whose_likelihood_is_not_a_number_has_diverged(
    tiny_sources: dict[str, Path], student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = HeldOut(kl_N=torch.full((2,), math.nan), loss_N=torch.ones(2))
    monkeypatch.setattr(full_run, "evaluate_kl", lambda *arguments, **options: nothing)
    with pytest.raises(Diverged, match="KL or loss on the validation blocks: expected a finite number"):
        distil(tiny_sources, student=student, out=tmp_path / "out")
    assert not (tmp_path / "out" / "distillation.json").exists()


def test_a_finished_run_is_not_run_again(tiny_sources: dict[str, Path], student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = distil(tiny_sources, student=student, out=tmp_path)
    monkeypatch.setattr(full_run, "load_model", None)
    assert distil(tiny_sources, student=student, out=tmp_path) == summary


@pytest.mark.parametrize("stop_after", [3, None])
def test_another_recipe_in_the_folder_of_a_run_is_refused(tiny_sources: dict[str, Path], student: Path, tmp_path: Path, stop_after: int | None) -> None:
    if stop_after is None:
        distil(tiny_sources, student=student, out=tmp_path)
    else:
        with pytest.raises(Stopped):
            distil(tiny_sources, student=student, out=tmp_path, stop_after=stop_after)
    with pytest.raises(Conflict, match=r"holds another run; learning_rate: expected 0.003, with which it was begun, got 0.001"):
        distil(tiny_sources, student=student, out=tmp_path, recipe=replace(RECIPE, learning_rate=1e-3))


def test_a_run_that_failed_before_it_trained_does_not_bind_the_next_one(tiny_sources: dict[str, Path], student: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="expected at least this many tokens"):
        distil(tiny_sources, student=student, out=tmp_path, recipe=replace(RECIPE, validation_tokens=10**6))
    assert distil(tiny_sources, student=student, out=tmp_path)["tokens"] == RECIPE.tokens


def test_a_folder_with_other_files_is_left_alone(tiny_sources: dict[str, Path], student: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for work in (lambda: distil(tiny_sources, student=student, out=tmp_path), lambda: prune(tiny_sources, out=tmp_path)):
        with pytest.raises(Conflict, match="expected a new or empty folder"):
            work()


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_the_folder_of_an_input_is_not_written_to(tiny_sources: dict[str, Path], student: Path, which: str) -> None:
    with pytest.raises(Conflict, match="got the folder of an input"):
        distil(tiny_sources, student=student, out={"teacher": tiny_sources["teacher"], "student": student}[which])


def test_a_sequence_longer_than_the_context_is_refused(tiny_sources: dict[str, Path], student: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="sequence_length: expected at most the teacher's context of 64, got 128"):
        distil(tiny_sources, student=student, out=tmp_path, recipe=replace(RECIPE, sequence_length=128))


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[Any], Path]:
    def write(content: Any) -> Path:
        path = tmp_path / "recipe.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


LEAST = {"tokens": 1, "learning_rate": 0.1, "batch_size": 1, "sequence_length": 8}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a JSON file with the object `distillation`"),
        ({"tokens": 1}, "expected a JSON file with the object `distillation`"),
        ({"distillation": [1]}, "expected a JSON file with the object `distillation`"),
        ({"distillation": {**LEAST, "rate": 1}}, "distillation.rate: expected no such field, got 1"),
        ({"distillation": {"tokens": 1, "batch_size": 1, "learning_rate": 0.1}}, "distillation.sequence_length: expected a value, got nothing"),
        ({"distillation": {**LEAST, "tokens": "many"}}, "tokens: expected an integer of at least 1, got 'many'"),
        ({"distillation": {**LEAST, "tokens": True}}, "tokens: expected an integer of at least 1, got True"),
        ({"distillation": {**LEAST, "learning_rate": 0}}, "learning_rate: expected a number in"),
        ({"distillation": {**LEAST, "decay_share": 1.0}}, "decay_share: expected a number in"),
        ({"distillation": {**LEAST, "validation_tokens": 15}}, "validation_tokens: expected at least two blocks of sequence_length=8, .*, got 15"),
        ({"distillation": {**LEAST, "dtype": "float16"}}, "dtype: expected float32 or bfloat16, got 'float16'"),
    ],
)
def test_a_wrong_recipe_is_told_by_field(write_recipe: Callable[[Any], Path], content: Any, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        Recipe.read(write_recipe(content))


def test_what_the_caller_says_is_on_top_of_the_recipe(write_recipe: Callable[[Any], Path]) -> None:
    recipe = Recipe.read(write_recipe({"distillation": LEAST, "note": "for people"}), tokens=7, learning_rate=None)
    assert (recipe.tokens, recipe.learning_rate) == (7, 0.1)


def test_a_recipe_written_by_hand_may_leave_its_inputs_out(write_recipe: Callable[[Any], Path]) -> None:
    inputs = RecipeInputs.read(write_recipe({"distillation": LEAST}))
    assert (inputs.teacher, inputs.corpora) == (None, ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"teacher": "llama"}, "expected `teacher` with a digest"),
        ({"corpora": 3}, "expected `teacher` with a digest and `corpora`, a list"),
        ({"corpora": [{"weight": 1}]}, "expected `teacher` with a digest and `corpora`, a list"),
        ({"corpora": [{"name": "a"}, {"name": "b", "weight": 0}]}, r"corpora\.1\.weight: expected a number above 0, got 0"),
    ],
)
def test_wrong_inputs_of_a_recipe_are_told(write_recipe: Callable[[Any], Path], content: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        RecipeInputs.read(write_recipe({"distillation": LEAST, **content}))


def test_a_mixture_of_experts_is_pruned_and_distilled_into_one_that_plain_transformers_loads(tiny_sources: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = check_teacher(tiny_sources["teacher"])
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2}
    numbers = {**whole.architecture.shape.as_dict(), "intermediate_size": 32, "vocab_size": whole.architecture.vocab_size, "max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**experts, **numbers))
    teacher, student, out = tmp_path / "teacher", tmp_path / "pruned", tmp_path / "out"
    write_checkpoint(model.state_dict(), config=model.config.to_dict(), tokenizer_from=whole.path, folder=teacher)
    sources = {**tiny_sources, "teacher": teacher}
    shape = replace(SHAPE, intermediate_size=24, num_experts=3)

    prune(sources, out=student, shape=shape)
    summary = distil(sources, student=student, out=out)

    assert summary["held_out_after"]["kl"] < summary["held_out_before"]["kl"]
    assert check_teacher(out).architecture.shape == shape
    kept = json.loads((student / "kept_indices.json").read_text())
    assert [len(layer) for layer in kept["experts"]] == [3, 3]
    assert [len(neurons) for layer in kept["neurons"] for neurons in layer] == [24] * 6
    assert AutoModelForCausalLM.from_pretrained(out).model.layers[1].mlp.experts.down_proj.shape == (3, 24, 24)
