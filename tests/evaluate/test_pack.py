"""A pack asks what lm-eval asks, and its scores are lm-eval's: the same accuracies, the same log-probabilities."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nas.errors import CorruptFile, NotFound, TaskUnavailable
from nas.evaluate import pack as pack_module
from nas.evaluate.pack import Pack, build_pack, can_pack, find_pack, load_pack, pack_key, save_pack
from nas.evaluate.scores import TaskScore
from nas.evaluate.scoring import open_pack, score_packed, score_stock
from nas.evaluate.tasks import TaskCard, add_task, load_tasks
from tests.evaluate.tiny_tasks import DATA, NUM_DOCUMENTS, TASKS, tiny_model, tiny_tokenizer, write_tasks

REFERENCE = os.environ.get("NAS_REFERENCE")
PACKED = [name for name in TASKS if name != "answer"]
FAMILIES = ["llama", "gemma2", "qwen3"]


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TaskCard]:
    source = write_tasks(tmp_path_factory.mktemp("source"))
    return {card.name: card for card in add_task(str(source), destination=tmp_path_factory.mktemp("catalogue"))}


@pytest.fixture(scope="module")
def tasks(cards: dict[str, TaskCard]) -> dict[str, Any]:
    return load_tasks([card.folder for card in cards.values()], num_fewshot={})


def packed(task: Any, *, documents: Any = range(1, NUM_DOCUMENTS), max_length: int = 64) -> Pack:
    return build_pack(task, tokenizer=tiny_tokenizer(), config=tiny_model().config, documents=documents, max_length=max_length, key="key")


def assert_equal(ours: TaskScore, stock: TaskScore) -> None:
    """Accuracies to the last digit, log-probabilities to 1e-3, everything that a pair of trials is compared by among them."""
    assert (ours.document_ids, ours.forms, ours.metrics.keys()) == (stock.document_ids, stock.forms, stock.metrics.keys())
    for name, value in stock.metrics.items():
        found = ours.metrics[name]
        assert found.higher_is_better == value.higher_is_better
        if name.startswith(("acc", "exact")):
            assert (found.value, found.standard_error) == pytest.approx((value.value, value.standard_error), rel=1e-12)
        else:
            assert found.value == pytest.approx(value.value, rel=1e-4, abs=1e-4)
    assert ours.documents.keys() == stock.documents.keys()
    for name, values in stock.documents.items():
        np.testing.assert_allclose(ours.documents[name].numerators, values.numerators, rtol=1e-6, atol=1e-3)
        assert ours.documents[name].denominators == values.denominators


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("max_length", [64, 9])
def test_scores_through_packs_are_those_of_lm_eval(tasks: dict[str, Any], model_type: str, max_length: int) -> None:
    model, documents = tiny_model(model_type=model_type), dict.fromkeys(PACKED, range(1, NUM_DOCUMENTS))
    stock = score_stock(model, tokenizer=tiny_tokenizer(), tasks=tasks, documents=documents, batch_size=4, max_length=max_length)
    opened = {name: open_pack(packed(tasks[name], max_length=max_length), task=tasks[name]) for name in PACKED}
    ours = score_packed(model, opened, batch_tokens=100)
    for name in PACKED:
        assert_equal(ours.tasks[name], stock.tasks[name])


def test_worked_examples_are_those_that_lm_eval_draws(cards: dict[str, TaskCard], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_tasks(source)
    shots = DATA.replace("{test: rows.jsonl}", "{test: rows.jsonl, train: rows.jsonl}") + "training_split: train\n"
    (source / "choice.yaml").write_text(f"task: choice\n{shots}{TASKS['choice']}")
    card = next(card for card in add_task(str(source), destination=tmp_path / "catalogue") if card.name == "choice")
    task = load_tasks([card.folder], num_fewshot={"choice": 2})["choice"]
    model, documents = tiny_model(), {"choice": range(NUM_DOCUMENTS)}
    stock = score_stock(model, tokenizer=tiny_tokenizer(), tasks={"choice": task}, documents=documents, batch_size=4, max_length=64)
    ours = score_packed(model, {"choice": open_pack(packed(task, documents=range(NUM_DOCUMENTS)), task=task)}, batch_tokens=300)
    assert_equal(ours.tasks["choice"], stock.tasks["choice"])


def test_a_model_is_left_as_it_was_and_a_pack_can_be_scored_again(tasks: dict[str, Any]) -> None:
    opened = {"choice": open_pack(packed(tasks["choice"]), task=tasks["choice"])}
    model = tiny_model().train()
    first = score_packed(model, opened, batch_tokens=50).tasks["choice"]
    score_packed(tiny_model(seed=1), opened, batch_tokens=50)
    assert all(module.training for module in model.modules())
    assert replace(score_packed(model, opened, batch_tokens=50).tasks["choice"], seconds=first.seconds) == first


def test_a_diverged_model_is_not_scored(tasks: dict[str, Any]) -> None:
    model = tiny_model()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="task pair: the log-likelihood is not finite on 14 of 14 documents"):
        score_packed(model, {"pair": open_pack(packed(tasks["pair"]), task=tasks["pair"])}, batch_tokens=50)


def test_a_target_without_tokens_is_explained(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_tasks(source)
    (source / "last_word.yaml").write_text(f"task: last_word\n{DATA}{TASKS['last_word']}".replace("' ' + ", ""))
    card = next(card for card in add_task(str(source), destination=tmp_path / "catalogue") if card.name == "last_word")
    with pytest.raises(TaskUnavailable, match="task last_word: expected targets of 1 to 64 tokens"):
        packed(load_tasks([card.folder], num_fewshot={})["last_word"])


def test_only_tasks_that_generate_or_filter_have_no_pack(tasks: dict[str, Any]) -> None:
    assert [name for name, task in tasks.items() if not can_pack(task)] == ["answer"]


def same(left: Pack, right: Pack) -> bool:
    arrays = ("tokens_S", "starts_Q", "num_scored_Q", "requests_Q", "documents_R", "bytes_R")
    return left.document_ids == right.document_ids and all(np.array_equal(getattr(left, name), getattr(right, name)) for name in arrays)


@pytest.mark.parametrize("name", PACKED)
def test_a_pack_of_some_documents_is_that_part_of_a_larger_one(tasks: dict[str, Any], name: str) -> None:
    whole = packed(tasks[name], documents=range(NUM_DOCUMENTS), max_length=9)
    assert same(whole.select([3, 5, 11]), packed(tasks[name], documents=[11, 3, 5], max_length=9))
    with pytest.raises(ValueError, match=r"at least one of the 15 in the pack, got \[99\]"):
        whole.select([1, 99])


def test_a_pack_survives_the_disk_and_shows_what_changed(tasks: dict[str, Any], tmp_path: Path) -> None:
    pack = packed(tasks["page"], max_length=9)
    save_pack(pack, folder=tmp_path)
    assert same(load_pack(tmp_path, name="page", key="key"), pack)
    with pytest.raises(CorruptFile, match="expected a pack with the key other, got key"):
        load_pack(tmp_path, name="page", key="other")
    with pytest.raises(NotFound):
        load_pack(tmp_path, name="choice", key="key")
    (file,) = tmp_path.glob("page-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptFile, match="expected sha256"):
        load_pack(tmp_path, name="page", key="key")


def test_a_pack_is_made_once_and_again_where_it_is_damaged(tasks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(pack_module, "build_pack", lambda task, **arguments: built.append(arguments["key"]) or build_pack(task, **arguments))

    def find(documents: range = range(3)) -> Pack:
        config, tokenizer = tiny_model().config, tiny_tokenizer()
        return find_pack(tmp_path, task=tasks["choice"], digest="d", num_fewshot=0, tokenizer=tokenizer, config=config, documents=documents, max_length=64)

    first = find()
    assert same(find(), first)
    assert len(built) == 1
    next(tmp_path.glob("choice-*.safetensors")).write_bytes(b"")
    assert same(find(), first)
    assert find(range(4)).document_ids == (0, 1, 2, 3)
    assert len(built) == 3


def test_a_key_follows_everything_that_the_prompts_depend_on() -> None:
    base: dict[str, Any] = {"num_fewshot": 0, "tokenizer": tiny_tokenizer(), "max_length": 64, "documents": [1, 2]}
    other = tiny_tokenizer()
    other.add_tokens(["moon"])
    changes = [{}, {"num_fewshot": 1}, {"tokenizer": other}, {"max_length": 32}, {"documents": [1, 3]}]
    keys = [pack_key("digest", **{**base, **change}) for change in changes] + [pack_key("other", **base)]
    assert len(set(keys)) == len(keys)
    assert pack_key("digest", **{**base, "documents": [2, 1, 1]}) == keys[0]


@pytest.mark.reference
@pytest.mark.skipif(not REFERENCE, reason="NAS_REFERENCE is not set: no reference material here")
@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        ("hellaswag", "hellaswag"),
        ("arc_easy", "ai2_arc"),
        ("blimp_adjunct_island", "blimp"),
        ("winogrande", "winogrande"),
        ("lambada_openai", "lambada_openai"),
        ("wikitext", "wikitext_document_level"),
    ],
)
@pytest.mark.parametrize("model_type", ["stories260K", "gemma2", "qwen3"])
def test_stock_tasks_score_as_in_lm_eval(tmp_path: Path, name: str, dataset: str, model_type: str) -> None:
    assert REFERENCE is not None
    folder = Path(REFERENCE) / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if model_type == "stories260K":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        config = tiny_model(model_type=model_type).config
        config.vocab_size = len(tokenizer)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    (card,) = add_task(name, destination=tmp_path, dataset_path=Path(REFERENCE) / "data" / "eval" / dataset)
    task = load_tasks([card.folder], num_fewshot={})[name]
    documents = range(2) if name == "wikitext" else range(12)
    stock = score_stock(model, tokenizer=tokenizer, tasks={name: task}, documents={name: documents}, batch_size=8, max_length=256)
    pack = build_pack(task, tokenizer=tokenizer, config=model.config, documents=documents, max_length=256, key="key")
    ours = score_packed(model, {name: open_pack(pack, task=task)}, batch_tokens=2048)
    assert_equal(ours.tasks[name], stock.tasks[name])
