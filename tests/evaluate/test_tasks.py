"""The catalogue: what `add_task` copies is enough, the split keeps documents apart, and errors say what to do."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.errors import CorruptFile, InvalidSpec, TaskUnavailable
from nas.evaluate.tasks import TaskCard, add_task, load_tasks, read_card, split_documents

REFERENCE = os.environ.get("NAS_REFERENCE")
needs_reference = pytest.mark.skipif(not REFERENCE, reason="NAS_REFERENCE is not set: no reference material here")

CHOICE = """
include: _template
task: colours
training_split: train
process_docs: !function helpers.process_docs
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TEMPLATE = """
dataset_path: json
dataset_kwargs: {data_files: {train: train.jsonl, test: rows/test.jsonl}}
output_type: multiple_choice
test_split: test
"""
HELPERS = "def process_docs(docs):\n    return docs.map(lambda doc: {'question': doc['question'].upper()})\n"


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def colour_rows(count: int, *, word: str = "sky") -> list[dict[str, object]]:
    return [{"question": f"the {word} {number} is", "choices": ["red", "blue"], "gold": number % 2} for number in range(count)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    write_rows(folder / "rows" / "test.jsonl", colour_rows(12))
    write_rows(folder / "train.jsonl", colour_rows(4, word="sea"))
    (folder / "_template").write_text(TEMPLATE)
    (folder / "colours.yaml").write_text(CHOICE)
    (folder / "helpers.py").write_text(HELPERS)
    return folder


def test_card_says_what_the_task_reports(source: Path, tmp_path: Path) -> None:
    (card,) = add_task(str(source), destination=tmp_path / "catalogue")
    assert (card.name, card.output_type, card.num_documents) == ("colours", "multiple_choice", 12)
    assert {metric.name: metric.higher_is_better for metric in card.metrics} == {"acc": True, "acc_norm": True}
    assert card.default_metric == "acc_norm"
    assert card.folder.name == f"colours-{card.digest[:12]}"


def test_card_survives_json(source: Path, tmp_path: Path) -> None:
    (card,) = add_task(str(source), destination=tmp_path / "catalogue")
    assert TaskCard.from_dict(json.loads(json.dumps(card.as_dict()))) == card
    assert read_card(card.folder) == card


def test_added_task_needs_neither_its_source_nor_a_network(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (card,) = add_task(str(source), destination=tmp_path / "catalogue")
    shutil.rmtree(source)
    moved = card.folder.rename(tmp_path / "moved")

    def refuse(*_: object) -> None:
        raise AssertionError("a network attempt")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    task = load_tasks([moved], num_fewshot={})["colours"]
    assert task.doc_to_text(task.eval_docs[3]) == "THE SKY 3 IS"


def test_adding_again_changes_nothing(source: Path, tmp_path: Path) -> None:
    first, second = (add_task(str(source), destination=tmp_path / "catalogue")[0] for _ in range(2))
    assert first == second
    assert [path.name for path in (tmp_path / "catalogue").iterdir()] == [first.folder.name]


def test_digest_follows_the_rows(source: Path, tmp_path: Path) -> None:
    (before,) = add_task(str(source), destination=tmp_path / "catalogue")
    write_rows(source / "rows" / "test.jsonl", colour_rows(12, word="sun"))
    (after,) = add_task(str(source), destination=tmp_path / "catalogue")
    assert before.digest != after.digest


def test_changed_file_is_corrupt(source: Path, tmp_path: Path) -> None:
    (card,) = add_task(str(source), destination=tmp_path / "catalogue")
    (card.folder / "code" / "helpers.py").write_text(HELPERS.replace("upper", "lower"))
    with pytest.raises(CorruptFile, match="add the task colours again"):
        load_tasks([card.folder], num_fewshot={})


def test_loading_leaves_the_random_state_alone(source: Path, tmp_path: Path) -> None:
    (card,) = add_task(str(source), destination=tmp_path / "catalogue")
    state = random.getstate()
    task = load_tasks([card.folder], num_fewshot={})["colours"]
    split_documents(task, documents_per_task=3, seed=0)
    assert random.getstate() == state


def test_fewshot_examples_come_from_the_training_rows(source: Path, tmp_path: Path) -> None:
    (card,) = add_task(str(source), destination=tmp_path / "catalogue")
    task = load_tasks([card.folder], num_fewshot={"colours": 2})["colours"]
    task.set_fewshot_seed(1)
    prompt = task.fewshot_context(task.eval_docs[0], 2)
    assert prompt.count("THE SEA") == 2
    assert prompt.endswith("THE SKY 0 IS")


@pytest.mark.parametrize(
    ("num_fewshot", "message"),
    [
        ({"colors": 1}, "num_fewshot.colors: expected a loaded task: colours"),
        ({"colours": -1}, "num_fewshot.colours: expected an integer of at least 0, got -1"),
        ({"colours": 4}, "num_fewshot.colours: expected at most 3"),
    ],
)
def test_impossible_fewshot_is_refused(source: Path, tmp_path: Path, num_fewshot: dict[str, int], message: str) -> None:
    (card,) = add_task(str(source), destination=tmp_path / "catalogue")
    with pytest.raises(InvalidSpec, match=message):
        load_tasks([card.folder], num_fewshot=num_fewshot)


def test_examples_that_would_be_scored_documents_are_refused(source: Path, tmp_path: Path) -> None:
    (source / "colours.yaml").write_text(CHOICE.replace("training_split: train\n", ""))
    (card,) = add_task(str(source), destination=tmp_path / "catalogue")
    assert card.max_fewshot == 0
    with pytest.raises(InvalidSpec, match="no split of its own"):
        load_tasks([card.folder], num_fewshot={"colours": 1})


def test_a_metric_over_the_whole_set_is_no_paired_one(source: Path, tmp_path: Path) -> None:
    (source / "colours.yaml").write_text(CHOICE + "  - {metric: f1, aggregation: f1, higher_is_better: true}\n")
    (card,) = add_task(str(source), destination=tmp_path / "catalogue")
    assert {metric.name: metric.paired for metric in card.metrics} == {"acc": True, "acc_norm": True, "f1": False}


def test_unknown_metric_lists_the_known(source: Path, tmp_path: Path) -> None:
    (card,) = add_task(str(source), destination=tmp_path / "catalogue")
    assert card.metric("acc").higher_is_better
    with pytest.raises(TaskUnavailable, match="metric of task colours: expected one of acc, acc_norm, got 'f1'"):
        card.metric("f1")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("colours.yaml", "task: [", "colours.yaml: expected a readable YAML file"),
        ("colours.yaml", "include: nowhere.yaml\ntask: colours", "nowhere.yaml: expected a readable YAML file"),
        ("colours.yaml", CHOICE.replace("choices", "colors"), "task colours does not run"),
        ("colours.yaml", CHOICE + "unsafe_code: true\n", "it runs code that the model wrote"),
        ("helpers.py", "", "has no function 'process_docs'"),
        ("_template", TEMPLATE.replace("rows/", "gone/"), "nas tasks add colours --dataset-path FOLDER"),
        ("_template", TEMPLATE.replace("test_split: test", "test_split: quiz"), "expected the split 'quiz' in json, got train, test"),
    ],
)
def test_unusable_task_says_why_and_leaves_nothing(source: Path, tmp_path: Path, file: str, content: str, message: str) -> None:
    (source / file).write_text(content)
    with pytest.raises(TaskUnavailable, match=message):
        add_task(str(source), destination=tmp_path / "catalogue")
    assert not any((tmp_path / "catalogue").glob("*"))


def test_folder_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskUnavailable, match=r"expected a \*\.yaml file with a `task:` name, got none"):
        add_task(str(tmp_path), destination=tmp_path / "catalogue")


def test_folder_that_is_no_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskUnavailable, match="expected a task folder made by `nas tasks add`"):
        read_card(tmp_path)


class Documents:
    """As much of an lm-eval task as splitting needs."""

    config = SimpleNamespace(task="documents")

    def __init__(self, contents: list[int]) -> None:
        self.eval_docs = [{"text": content} for content in contents]


@settings(max_examples=40, deadline=None)
@given(contents=st.lists(st.integers(0, 30), min_size=2, max_size=40), wanted=st.integers(1, 20), seed=st.integers(0, 5), shuffle=st.randoms())
def test_split_is_disjoint_complete_and_blind_to_row_order(contents: list[int], wanted: int, seed: int, shuffle: object) -> None:
    try:
        split = split_documents(Documents(contents), documents_per_task=wanted, seed=seed)
    except TaskUnavailable:
        assert all(contents.count(content) > min(wanted, len(contents) // 2) for content in contents)
        return
    assert sorted(split.search + split.held_out) == list(range(len(contents)))
    assert 1 <= len(split.search) <= min(wanted, len(contents) // 2)
    chosen = {contents[index] for index in split.search}
    assert not chosen & {contents[index] for index in split.held_out}
    shuffled = list(contents)
    shuffle.shuffle(shuffled)  # type: ignore[attr-defined]
    again = split_documents(Documents(shuffled), documents_per_task=wanted, seed=seed)
    assert {shuffled[index] for index in again.search} == chosen


def test_split_follows_the_seed() -> None:
    splits = {split_documents(Documents(list(range(50))), documents_per_task=20, seed=seed) for seed in range(3)}
    assert len(splits) == 3


@pytest.mark.reference
@needs_reference
@pytest.mark.parametrize(
    ("name", "dataset", "metrics", "num_documents"),
    [
        ("arc_easy", "ai2_arc", {"acc", "acc_norm"}, 2376),
        ("blimp_adjunct_island", "blimp", {"acc"}, 200),
        ("wikitext", "wikitext_document_level", {"word_perplexity", "byte_perplexity", "bits_per_byte"}, 62),
        ("lambada_openai", "lambada_openai", {"acc", "perplexity"}, 5153),
        ("hellaswag", "hellaswag", {"acc", "acc_norm"}, 2009),
        ("gsm8k", "gsm8k", {"exact_match", "exact_match,flexible-extract"}, 1319),
    ],
)
def test_stock_task_is_added_from_a_local_dataset(tmp_path: Path, name: str, dataset: str, metrics: set[str], num_documents: int) -> None:
    assert REFERENCE is not None
    (card,) = add_task(name, destination=tmp_path, dataset_path=Path(REFERENCE) / "data" / "eval" / dataset)
    assert {metric.name for metric in card.metrics} == metrics
    assert card.num_documents == num_documents


@pytest.mark.slow
@pytest.mark.reference
@needs_reference
def test_stock_group_becomes_its_leaf_tasks(tmp_path: Path) -> None:
    assert REFERENCE is not None
    cards = add_task("mmlu_stem", destination=tmp_path, dataset_path=Path(REFERENCE) / "data" / "eval" / "mmlu")
    assert len(cards) == 19
    assert all(card.name.startswith("mmlu_") for card in cards)


@pytest.mark.slow
def test_unknown_stock_task_offers_close_names(tmp_path: Path) -> None:
    with pytest.raises(TaskUnavailable, match="got 'arc_eazy'; did you mean arc_easy"):
        add_task("arc_eazy", destination=tmp_path)
