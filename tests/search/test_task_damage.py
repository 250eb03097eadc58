"""A task can pick other layers than the likelihood; what it loses is told as a share of the teacher's metric."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nas.compress.sorting import load_sorting
from nas.evaluate.scores import MetricValue, Scores, TaskScore
from nas.registration import register_corpus, register_tasks, register_teacher
from nas.search import task_damage as task_damage_module
from nas.search.layout import PREPARED, SORTED
from nas.search.prepare import WHOLE, prepare
from nas.search.task_damage import TIE_WEIGHT, task_damage
from nas.search.task_scoring import TaskScorer
from nas.settings import Settings
from nas.spec import SearchSpec, parse_spec
from nas.store.store import Store
from nas.submission import check_submission


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A folder prepared with the layers chosen by the tiny teacher's task."""

    spec: SearchSpec
    inputs: dict[str, Any]
    folder: Path

    def damage(self, *, kl: Callable[[tuple[int, ...]], float] = lambda kept: 0.0) -> Callable[[tuple[int, ...]], float]:
        return task_damage(self.spec, inputs=self.inputs, prepared=self.folder, sorting=load_sorting(self.folder / SORTED), kl=kl, device="cpu")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, register_tiny: Callable[..., None], tiny_spec: Callable[..., dict[str, Any]]) -> Case:
    folder = tmp_path_factory.mktemp("task-damage")
    settings = Settings.from_environment({"NAS_DATA": str(folder)})
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    spec = parse_spec(json.dumps(tiny_spec(compression={"depth": "task"})))
    inputs = check_submission(spec, store=store).inputs
    store.close()
    prepare(spec, inputs=inputs, folder=folder / "prepared", device="cpu", report=lambda line: None, should_stop=lambda: False)
    return Case(spec=spec, inputs=inputs, folder=folder / "prepared")


def test_the_chosen_layers_lose_least_of_the_task(case: Case) -> None:
    num_layers = case.inputs["teacher"]["config"]["num_hidden_layers"]
    layers = {int(depth): tuple(kept) for depth, kept in json.loads((case.folder / PREPARED).read_text())["layers"].items()}
    damage = case.damage()
    for kept in combinations(range(num_layers), num_layers - 1):
        assert damage(layers[num_layers - 1]) <= damage(kept)
    assert damage(tuple(range(num_layers))) == 0
    assert not (case.folder / WHOLE).exists()


def scores(accuracy: float, bits: float) -> Scores:
    values = {
        "acc": MetricValue(value=accuracy, standard_error=None, higher_is_better=True),
        "bits": MetricValue(value=bits, standard_error=None, higher_is_better=False),
    }
    return Scores(tasks={"choice": TaskScore(name="choice", metrics=values, document_ids=(), documents={})})


@pytest.mark.parametrize(("metric", "expected"), [("acc", (0.8 - 0.6) / 0.8), ("bits", (3.0 - 2.0) / 2.0)])
def test_what_is_lost_is_a_share_of_the_teachers_metric_whichever_its_direction(
    case: Case, monkeypatch: pytest.MonkeyPatch, metric: str, expected: float
) -> None:
    answers = iter([scores(0.8, 2.0), scores(0.6, 3.0)])
    monkeypatch.setattr(TaskScorer, "score", lambda *_: next(answers))
    monkeypatch.setattr(task_damage_module, "objective_metrics", lambda *_, **__: {"choice": metric})
    assert case.damage()((0,)) == pytest.approx(expected)


def test_the_likelihood_decides_ties_and_nothing_else(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = {(0, 1): 0.5, (0, 2): 0.5, (1, 2): 0.51}
    asked = [*accuracies]
    answers = iter([scores(0.8, 2.0), *(scores(accuracy, 2.0) for accuracy in accuracies.values())])
    monkeypatch.setattr(TaskScorer, "score", lambda *_: next(answers))
    damage = case.damage(kl={(0, 1): 3.0, (0, 2): 1.0, (1, 2): 100.0}.__getitem__)
    first, second, better = (damage(kept) for kept in asked)
    assert better < second < first
    assert first - second == pytest.approx(2 * TIE_WEIGHT)


def test_a_cut_whose_scores_are_not_finite_is_not_a_number(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    damage = case.damage()

    def diverged(*_: Any, **__: Any) -> Scores:
        raise FloatingPointError

    monkeypatch.setattr(TaskScorer, "score", diverged)
    assert math.isnan(damage((0,)))


TEXT = tuple(f"text{number}" for number in range(8))
QUESTIONS = tuple(f"question{number}" for number in range(4))
CHOICES = ("left", "right")
TEXT_LAYER, TASK_LAYER = 0, 1


def planted_teacher(folder: Path) -> None:
    """Two layers of pointwise rules, attention silent: one predicts the next word of the text, the other answers questions, which the text has none of."""
    vocabulary = {word: index for index, word in enumerate(("<unk>", "<s>", "</s>", *TEXT, *QUESTIONS, *CHOICES))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64).save_pretrained(folder)
    size = len(vocabulary)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=2 * size,  # what was read, then what will be said
        intermediate_size=size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    following = {word: TEXT[(number + 1) % len(TEXT)] for number, word in enumerate(TEXT)}
    answers = {question: CHOICES[number % 2] for number, question in enumerate(QUESTIONS)}
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size, 2 * size))
        model.lm_head.weight.copy_(torch.eye(2 * size)[size:])
        for number, rules in ((TEXT_LAYER, following), (TASK_LAYER, answers)):
            layer = model.model.layers[number]
            layer.self_attn.o_proj.weight.zero_()
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight.copy_(torch.eye(size, 2 * size))
            layer.mlp.down_proj.weight.zero_()
            for word, said in rules.items():
                layer.mlp.down_proj.weight[size + vocabulary[said], vocabulary[word]] = 1.0
    model.save_pretrained(folder)


def write_questions(folder: Path) -> None:
    """32 questions, whose answers lie in the word that they end with."""
    folder.mkdir()
    rows = [
        {"text": f"{TEXT[number % 8]} {QUESTIONS[number % 4]}", "choices": [f" {choice}" for choice in CHOICES], "gold": number % 2} for number in range(32)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "choice.yaml").write_text(
        "task: choice\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\noutput_type: multiple_choice\n"
        'target_delimiter: ""\ndoc_to_text: "{{text}}"\ndoc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n',
        encoding="utf-8",
    )


@pytest.mark.parametrize(("method", "kept"), [("task", TASK_LAYER), ("damage", TEXT_LAYER)])
def test_the_layer_that_only_the_task_needs_is_kept_by_the_task_and_by_no_likelihood(
    tmp_path: Path, tiny_spec: Callable[..., dict[str, Any]], method: str, kept: int
) -> None:
    planted_teacher(tmp_path / "teacher")
    write_questions(tmp_path / "tasks")
    stories = (" ".join(TEXT[(first + step) % len(TEXT)] for step in range(30)) for first in range(1200))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": f"{story} {number}"}) + "\n" for number, story in enumerate(stories)), encoding="utf-8")
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path / "data")})
    store = Store.open(settings.database_url, migrate=True)
    register_teacher(str(tmp_path / "teacher"), name="tiny", store=store, settings=settings)
    register_corpus([str(tmp_path / "corpus.jsonl")], name="words", store=store, settings=settings)
    register_tasks(str(tmp_path / "tasks"), dataset_path=None, store=store, settings=settings)
    spec = parse_spec(json.dumps(tiny_spec(compression={"depth": method})))
    inputs = check_submission(spec, store=store).inputs
    store.close()
    facts = prepare(spec, inputs=inputs, folder=tmp_path / "prepared", device="cpu", report=lambda line: None, should_stop=lambda: False)
    assert facts["layers"]["1"] == [kept]
