"""The winner's bundle: plain transformers loads it, `nas distill` takes it as it is, and equal bundles are equal files."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nas.bundle import write_bundle
from nas.compress.corpus import check_corpus
from nas.compress.teacher import check_teacher
from nas.full_run import distil_fully
from nas.pruning import prune_teacher
from nas.recipe import Recipe, RecipeInputs
from nas.registration import register_teacher
from nas.search.confirm import confirm
from nas.search.prepare import prepare
from nas.search.trial import run_rung
from nas.settings import Settings
from nas.shape import Shape
from nas.spec import SearchSpec, dump_spec, parse_spec
from nas.store.store import Store
from nas.submission import check_submission

SHAPE = Shape(num_hidden_layers=2, hidden_size=24, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
CORPUS = {"parts": [{"name": "words", "weight": 3.0}], "sequence_length": 32, "calibration_tokens": 512, "validation_tokens": 512}
RUNGS = {"first_tokens": 2048, "factor": 2, "num_trained": 1}

LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)("the cat sat on", return_tensors="pt")
    text = model.generate(tokens["input_ids"], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    print(sum(parameter.numel() for parameter in model.parameters()), text.shape[1])
"""


def win(folder: Path, register_tiny: Callable[..., None], values: dict[str, Any]) -> tuple[dict[str, Any], SearchSpec]:
    """What the controller asks for when a search has been won."""
    settings = Settings.from_environment({"NAS_DATA": str(folder)})
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    spec = parse_spec(json.dumps(values))
    inputs = check_submission(spec, store=store).inputs
    store.close()
    prepared, trial = folder / "prepared", folder / "trial"
    facts = prepare(spec, inputs=inputs, folder=prepared, device="cpu", report=lambda line: None, should_stop=lambda: False)
    common: dict[str, Any] = {"inputs": inputs, "prepared": prepared, "shape": SHAPE, "folder": trial, "device": "cpu"}
    result = run_rung(spec, rung=1, report=lambda progress: None, should_stop=lambda: False, **common)
    confirmation = confirm(spec, with_reload=False, **common)
    request = {
        "search_id": "srch_1",
        "trial": 4,
        "shape": SHAPE.as_dict(),
        "trial_folder": str(trial),
        "bundle_folder": str(folder / "winner"),
        "prepared": str(prepared),
        "inputs": inputs,
        "spec": dump_spec(spec),
        "result": result.as_dict(),
        "confirmation": confirmation,
        "board": {"cost": {"tokens": 12345}, "teacher": {"held_out": facts["teacher_held_out"]}},
    }
    return request, spec


@pytest.fixture(scope="module")
def request_and_spec(
    tmp_path_factory: pytest.TempPathFactory, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]
) -> tuple[dict[str, Any], SearchSpec]:
    return win(tmp_path_factory.mktemp("bundle"), register_tiny, tiny_spec(corpus=CORPUS, rungs=RUNGS))


@pytest.fixture(scope="module")
def winner(request_and_spec: tuple[dict[str, Any], SearchSpec]) -> dict[str, Any]:
    request, spec = request_and_spec
    return write_bundle(request, spec=spec)


@pytest.fixture(scope="module")
def bundle(winner: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as a user has it: unpacked from the tar, somewhere else."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(winner["bundle"]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "bundle"


def test_a_fresh_process_loads_both_students_and_generates(winner: dict[str, Any], bundle: Path) -> None:
    process = subprocess.run([sys.executable, "-c", LOAD, str(bundle), str(bundle / "pruned")], capture_output=True, text=True, check=True)
    assert process.stdout.split("\n")[:2] == [f"{winner['parameters']} 7"] * 2


def test_the_bundle_holds_what_is_promised(winner: dict[str, Any], bundle: Path, request_and_spec: tuple[dict[str, Any], SearchSpec]) -> None:
    contents = {name: json.loads((bundle / f"{name}.json").read_text()) for name in ("shape", "kept_indices", "spec", "scores", "provenance", "config")}
    request, spec = request_and_spec
    assert Shape.from_dict(contents["shape"]) == SHAPE
    assert parse_spec(json.dumps(contents["spec"])) == spec
    assert set(contents["kept_indices"]) == {"layers", "hidden_channels", "neurons", "key_value_heads", "query_heads"}
    assert contents["provenance"]["teacher"] == {"name": "tiny", "digest": request["inputs"]["teacher"]["digest"]}
    assert contents["provenance"]["versions"]["torch"]
    assert contents["config"] == winner["config"]
    assert "documents" not in json.dumps(contents["scores"])


def test_the_two_students_have_the_same_shape_and_other_weights(bundle: Path) -> None:
    trained, pruned = check_teacher(bundle), check_teacher(bundle / "pruned")
    assert trained.architecture.shape == pruned.architecture.shape == SHAPE
    assert trained.digest != pruned.digest


def test_the_tar_has_the_digest_that_is_announced(winner: dict[str, Any]) -> None:
    content = Path(winner["bundle"]).read_bytes()
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (winner["bundle_sha256"], winner["bundle_bytes"])


def test_equal_bundles_have_equal_digests(winner: dict[str, Any], request_and_spec: tuple[dict[str, Any], SearchSpec], tmp_path: Path) -> None:
    request, spec = request_and_spec
    again = write_bundle({**request, "bundle_folder": str(tmp_path)}, spec=spec)
    for path in (tmp_path / "bundle").rglob("*"):
        path.touch()
        path.chmod(0o700)
    assert again["bundle_sha256"] == winner["bundle_sha256"]
    assert write_bundle({**request, "bundle_folder": str(tmp_path)}, spec=spec)["bundle_sha256"] == winner["bundle_sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.tar"]


def test_nothing_of_the_machine_is_in_the_bundle(bundle: Path, request_and_spec: tuple[dict[str, Any], SearchSpec]) -> None:
    places = [str(Path(request_and_spec[0]["prepared"]).parent), request_and_spec[0]["inputs"]["teacher"]["path"]]
    for path in bundle.rglob("*"):
        if path.suffix in (".json", ".md"):
            text = path.read_text(encoding="utf-8")
            assert not any(place in text for place in places), path


def test_the_recipe_is_distilled_as_it_is(bundle: Path, tiny_sources: dict[str, Path], tmp_path: Path) -> None:
    recipe = Recipe.read(bundle / "recipe.json")
    assert recipe.tokens == 20480
    inputs = RecipeInputs.read(bundle / "recipe.json")
    corpus = check_corpus([tiny_sources["corpus"]])
    assert [(entry.name, entry.digest, entry.weight) for entry in inputs.corpora] == [("words", corpus.digest, 3.0)]
    summary = distil_fully(
        recipe,
        student=bundle,
        teacher=tiny_sources["teacher"],
        corpora=[(corpus, 3.0)],
        out=tmp_path / "out",
        device="cpu",
        expected_teacher=inputs.teacher,
    )
    assert summary["held_out_after"]["kl"] < summary["held_out_before"]["kl"]


def test_the_winner_is_a_teacher_to_cut_a_smaller_one_out_of_which_the_first_teacher_distils(
    bundle: Path, tiny_sources: dict[str, Path], tmp_path: Path, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]
) -> None:
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path / "data")})
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    register_teacher(str(bundle), name="half", store=store, settings=settings)
    submission = check_submission(parse_spec(json.dumps(tiny_spec(teacher="half", budget={"max_fraction": 0.8}))), store=store)
    store.close()
    assert submission.plan["space"]["count"] > 0

    smaller = replace(SHAPE, num_hidden_layers=1)
    prune_teacher(
        teacher=bundle, shape=smaller, corpus=[tiny_sources["corpus"]], out=tmp_path / "cut", device="cpu", sequence_length=32, calibration_tokens=512
    )
    recipe = Recipe(tokens=4096, batch_size=4, sequence_length=32, validation_tokens=128)
    summary = distil_fully(
        recipe,
        student=tmp_path / "cut",
        teacher=tiny_sources["teacher"],
        corpora=[(check_corpus([tiny_sources["corpus"]]), 1.0)],
        out=tmp_path / "out",
        device="cpu",
    )
    assert check_teacher(tmp_path / "out").architecture.shape == smaller
    assert summary["held_out_after"]["kl"] < summary["held_out_before"]["kl"]


def test_the_model_card_says_what_it_is_and_how_good(winner: dict[str, Any], bundle: Path) -> None:
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"# tiny, compressed to {winner['parameters']:,} parameters" in card
    assert "distilled 12,345 tokens in all" in card
    assert "| | this model | teacher |" in card
    assert "| choice | " in card
    assert "None" not in card


def test_a_corrected_teacher_comes_with_the_bundle_and_the_recipe_asks_for_it(
    tmp_path: Path, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]
) -> None:
    corrected = {"depth": "block_influence", "teacher_correction_tokens": 4096}
    request, spec = win(tmp_path, register_tiny, tiny_spec(corpus=CORPUS, rungs=RUNGS, compression=corrected))
    bundle = Path(write_bundle(request, spec=spec)["bundle"]).parent / "bundle"
    inputs, teacher = RecipeInputs.read(bundle / "recipe.json"), check_teacher(bundle / "teacher")
    assert (inputs.teacher_folder, inputs.teacher) == (bundle / "teacher", teacher.digest)
    provenance = json.loads((bundle / "provenance.json").read_text())
    assert provenance["teacher"]["digest"] == provenance["correction"]["original"] == request["inputs"]["teacher"]["digest"] != teacher.digest
    assert "first trained on the corpus for 4,096 tokens" in (bundle / "README.md").read_text()
    assert "--teacher" not in (bundle / "README.md").read_text()
