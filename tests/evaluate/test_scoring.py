"""Scores are lm-eval's own numbers, and scoring leaves the process as it was."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from nas.errors import InvalidSpec, TaskUnavailable
from nas.evaluate.scores import DocumentValues, Scores
from nas.evaluate.scoring import score_stock
from nas.evaluate.tasks import add_task, load_tasks
from tests.evaluate.tiny_tasks import DATA, NUM_DOCUMENTS, TASKS, tiny_model, tiny_tokenizer, write_tasks

REFERENCE = os.environ.get("NAS_REFERENCE")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def tasks(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cards = add_task(str(source), destination=tmp_path_factory.mktemp("catalogue"))
    return load_tasks([card.folder for card in cards], num_fewshot={})


def score_all(tasks: dict[str, Any], *, model: Any = None, batch_size: int = 4, names: tuple[str, ...] = tuple(TASKS)) -> Scores:
    documents = {name: range(1, NUM_DOCUMENTS) for name in names}
    return score_stock(model or tiny_model(), tokenizer=tiny_tokenizer(), tasks=tasks, documents=documents, batch_size=batch_size, max_length=None)


@pytest.fixture(scope="module")
def scores(tasks: dict[str, Any]) -> Scores:
    return score_all(tasks)


def test_scores_are_those_of_lm_eval_itself(
    scores: Scores, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(source)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    manager = TaskManager(include_path=str(source), include_defaults=False)
    stock = {}
    for name in TASKS:  # one by one: batches that mix tasks pad otherwise, which shows in the seventh digit
        lm = HFLM(pretrained=tiny_model(), tokenizer=tiny_tokenizer(), batch_size=4)
        samples = {name: list(range(1, NUM_DOCUMENTS))}
        stock |= lm_eval.simple_evaluate(model=lm, tasks=[name], task_manager=manager, samples=samples, bootstrap_iters=20)["results"]
    capfd.readouterr()
    ours = {(name, metric): value for name, task in scores.tasks.items() for metric, value in task.metrics.items()}
    theirs = {(name, key.split(",")[0]): value for name in TASKS for key, value in stock[name].items() if key.endswith(",none") and "_stderr" not in key}
    assert {(name, metric): value.value for (name, metric), value in ours.items() if (name, metric) in theirs} == theirs
    assert {metric for name, metric in ours.keys() - theirs.keys()} <= {"logprob_per_byte", "margin", "bits_per_byte"}
    for (name, metric), value in ours.items():
        if metric.startswith(("acc", "exact")):
            assert value.standard_error == stock[name][f"{metric}_stderr,none"]


def test_document_values_make_up_every_metric(scores: Scores) -> None:
    for task in scores.tasks.values():
        assert task.documents.keys() == task.metrics.keys()
        for name, values in task.documents.items():
            assert values.value == pytest.approx(task.metrics[name].value, rel=1e-9)
            assert values.standard_error == pytest.approx(task.metrics[name].standard_error, rel=1e-6)
            assert len(values.numerators) == len(values.denominators) == task.num_documents == NUM_DOCUMENTS - 1


def test_standard_error_of_a_ratio_is_that_of_a_bootstrap() -> None:
    generator = numpy.random.default_rng(0)
    weights = generator.integers(50, 500, size=400)
    bits = weights * generator.normal(1.0, 0.2, size=400)
    values = DocumentValues(numerators=tuple(bits), denominators=tuple(map(float, weights)), exponential=False)
    draws = generator.integers(400, size=(2000, 400))
    bootstrap = (bits[draws].sum(axis=1) / weights[draws].sum(axis=1)).std()
    assert values.standard_error == pytest.approx(bootstrap, rel=0.06)


def test_likelihood_forms_are_those_of_the_right_answer_per_byte(scores: Scores, tasks: dict[str, Any]) -> None:
    page = scores.tasks["page"]
    bits, sizes = page.documents["bits_per_byte"].numerators, page.documents["bits_per_byte"].denominators
    assert page.documents["logprob_per_byte"].numerators == pytest.approx([-bit * math.log(2) / size for bit, size in zip(bits, sizes, strict=True)])
    word, document = scores.tasks["last_word"], tasks["last_word"].eval_docs[1]
    nats = -word.documents["perplexity"].numerators[0]
    assert word.documents["logprob_per_byte"].numerators[0] == pytest.approx(nats / len(" " + document["choices"][0]))
    assert scores.tasks["choice"].forms == ("logprob_per_byte", "bits_per_byte", "margin")
    assert max(scores.tasks["choice"].documents["logprob_per_byte"].numerators) < 0
    assert scores.tasks["answer"].forms == ()


def test_scores_survive_json(scores: Scores) -> None:
    assert Scores.from_dict(json.loads(json.dumps(scores.as_dict()))) == scores


def test_batch_size_does_not_change_the_numbers(scores: Scores, tasks: dict[str, Any]) -> None:
    for name, task in score_all(tasks, batch_size=7).tasks.items():
        for metric, value in task.metrics.items():
            assert value.value == pytest.approx(scores.tasks[name].metrics[metric].value, rel=1e-4)


def test_built_tasks_can_be_scored_again(scores: Scores, tasks: dict[str, Any]) -> None:
    score_all(tasks, model=tiny_model(seed=1))
    again = score_all(tasks)
    assert {name: task.documents for name, task in again.tasks.items()} == {name: task.documents for name, task in scores.tasks.items()}


def test_scoring_leaves_no_trace(tasks: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.train()
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    score_stock(model, tokenizer=tokenizer, tasks=tasks, documents={name: [0, 5] for name in TASKS}, batch_size=4, max_length=None)
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert all(module.training for module in model.modules())
    assert tokenizer.pad_token is None
    assert capfd.readouterr() == ("", "")


def test_diverged_model_is_not_scored(tasks: dict[str, Any]) -> None:
    model = tiny_model()
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(FloatingPointError, match="task choice: the log-likelihood is not finite on 14 of 14 documents"):
        score_all(tasks, model=model, names=("choice",))


def test_target_without_tokens_is_explained(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes((source / "rows.jsonl").read_bytes())
    (folder / "glued.yaml").write_text(f"task: glued\n{DATA}{TASKS['last_word']}".replace("' ' + ", ""))
    (card,) = add_task(str(folder), destination=tmp_path / "catalogue")
    with pytest.raises(TaskUnavailable, match="task glued: expected targets of 1 to 64 tokens"):
        score_all(load_tasks([card.folder], num_fewshot={}), names=("glued",))


def test_unknown_task_and_batch_size_are_named_together(tasks: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec, match=r"documents\.chioce: expected a task of .*choice.*; batch_size: expected an integer of at least 1, got 0"):
        score_stock(tiny_model(), tokenizer=tiny_tokenizer(), tasks=tasks, documents={"chioce": [1]}, batch_size=0, max_length=None)


@pytest.mark.parametrize("documents", [[], [NUM_DOCUMENTS], [-1, 2]])
def test_documents_outside_the_task_are_refused(tasks: dict[str, Any], documents: list[int]) -> None:
    with pytest.raises(ValueError, match=r"documents of page: expected ids in 0\.\.14, at least one"):
        score_stock(tiny_model(), tokenizer=tiny_tokenizer(), tasks=tasks, documents={"page": documents}, batch_size=2, max_length=None)


def test_unknown_metric_lists_the_known(scores: Scores) -> None:
    with pytest.raises(TaskUnavailable, match=r"metric of task choice: expected one of acc, acc_norm, .*, got 'f1'"):
        scores.tasks["choice"].metric("f1")


@pytest.mark.reference
@pytest.mark.skipif(not REFERENCE, reason="NAS_REFERENCE is not set: no reference material here")
@pytest.mark.parametrize(
    ("name", "dataset"),
    [("arc_easy", "ai2_arc"), ("blimp_adjunct_island", "blimp"), ("wikitext", "wikitext_document_level"), ("lambada_openai", "lambada_openai")],
)
def test_stock_task_is_scored_on_a_real_model(tmp_path: Path, name: str, dataset: str) -> None:
    assert REFERENCE is not None
    (card,) = add_task(name, destination=tmp_path, dataset_path=Path(REFERENCE) / "data" / "eval" / dataset)
    folder = Path(REFERENCE) / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    tasks = load_tasks([card.folder], num_fewshot={})
    task = score_stock(model, tokenizer=tokenizer, tasks=tasks, documents={name: range(4)}, batch_size=8, max_length=128).tasks[name]
    assert task.metrics.keys() == {metric.name for metric in card.metrics} | set(task.forms)
    assert all(-20 < rate < 0 for rate in task.documents["logprob_per_byte"].numerators)
