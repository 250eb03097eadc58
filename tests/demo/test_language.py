"""The demo's language: right by construction, checked here by reading the text again with rules of its own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nas.compress.teacher import check_teacher, load_model, load_tokenizer
from nas.demo import teacher
from nas.demo.language import ANIMALS, ATTRIBUTES, BOYS, GIRLS, NUMBERS, VERBS, build_tokenizer, facts, is_held_out, write_corpus, write_tasks

SEED = 3
NUM_DOCUMENTS = 200
MULTIPLE_CHOICE = ("demo_agreement", "demo_facts", "demo_recall", "demo_sums")


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = write_corpus(tmp_path_factory.mktemp("corpus"), seed=SEED, num_documents=2_000)
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"), seed=SEED, documents_per_task=NUM_DOCUMENTS)
    return {path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in sorted(folder.glob("*.jsonl"))}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def opening_of(text: str) -> str:
    return text[: text.index(".") + 1]


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    written = []
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        write_corpus(tmp_path / name, seed=seed, num_documents=50)
        write_tasks(tmp_path / name, seed=seed, documents_per_task=20)
        written.append(files_of(tmp_path / name))
    first, again, other = written
    assert first == again
    assert all(first[name] != other[name] for name in first if name.endswith(".jsonl"))


def test_every_task_has_as_many_documents_as_asked_for_and_no_two_are_equal(tasks: dict[str, list[dict[str, Any]]]) -> None:
    assert set(tasks) == {*MULTIPLE_CHOICE, "demo_bits"}
    for rows in tasks.values():
        assert len({json.dumps(row) for row in rows}) == len(rows) == NUM_DOCUMENTS


def test_no_opening_of_a_task_is_ever_in_a_corpus(stories: list[str], tasks: dict[str, list[dict[str, Any]]]) -> None:
    assert not any(is_held_out(opening_of(story)) for story in stories)
    for rows in tasks.values():
        assert all(is_held_out(opening_of(row.get("context") or row["text"])) for row in rows)


@pytest.mark.parametrize("name", MULTIPLE_CHOICE)
def test_the_choices_differ_and_the_right_one_may_be_anywhere(tasks: dict[str, list[dict[str, Any]]], name: str) -> None:
    rows = tasks[name]
    num_choices = 2 if name == "demo_agreement" else 4
    assert all(len(set(row["choices"])) == len(row["choices"]) == num_choices for row in rows)
    assert {row["gold"] for row in rows} == set(range(num_choices))


def test_the_right_verb_has_the_number_of_the_sentence_s_first_noun(tasks: dict[str, list[dict[str, Any]]]) -> None:
    for row in tasks["demo_agreement"]:
        subject = re.search(r"said the (\w+) [^.]*$", row["context"])
        assert subject
        right = row["choices"][row["gold"]]
        assert right in (VERBS if subject[1] in ANIMALS else VERBS.values()), row


def test_the_noun_next_to_the_verb_often_has_another_number_than_the_subject(tasks: dict[str, list[dict[str, Any]]]) -> None:
    nouns = {*ANIMALS, *ANIMALS.values()}
    misled = 0
    for row in tasks["demo_agreement"]:
        first, *_, last = [word for word in row["context"].rpartition(" said the ")[2].split() if word in nouns]
        misled += (first in ANIMALS) != (last in ANIMALS)
    assert 0.35 * NUM_DOCUMENTS < misled < 0.65 * NUM_DOCUMENTS


def test_a_fact_s_right_answer_is_told_in_the_corpus_and_its_wrong_ones_never(stories: list[str], tasks: dict[str, list[dict[str, Any]]]) -> None:
    told = set(re.findall(r"every [^.]+\.", " ".join(stories)))
    for row in tasks["demo_facts"]:
        stem = re.search(r"every [^.]+$", row["context"])
        assert stem
        assert [f"{stem[0]} {choice}." in told for choice in row["choices"]] == [index == row["gold"] for index in range(4)], row


def test_the_corpus_contradicts_itself_nowhere(stories: list[str]) -> None:
    attributes = "|".join(ATTRIBUTES)
    values: dict[tuple[str, str], set[str]] = {}
    for animal, attribute, value in re.findall(rf"every (\w+) ({attributes}) (\w+)\.", " ".join(stories)):
        values.setdefault((animal, attribute), set()).add(value)
    assert len(values) == len(facts())
    assert all(len(found) == 1 for found in values.values())


def test_the_right_name_is_that_of_the_story_s_girl_or_boy_and_the_other_one_is_among_the_wrong(tasks: dict[str, list[dict[str, Any]]]) -> None:
    for row in tasks["demo_recall"]:
        names = set(opening_of(row["context"]).split()) & {*GIRLS, *BOYS}
        girl, boy = names & set(GIRLS), names & set(BOYS)
        asked = girl if row["context"].endswith(" girl") else boy
        assert {row["choices"][row["gold"]]} == asked
        assert names < set(row["choices"])


def read_sums(text: str) -> list[tuple[int, int]]:
    """Of every count in the text: what it must come to, and what the text says."""
    counts = []
    for before, changes, after in re.findall(r" had (\w+) \w+\.((?: (?:He|She) (?:found|lost) \w+\.)+) Now (?:he|she) has (\w+)", text):
        gains = [number(amount) if verb == "found" else -number(amount) for verb, amount in re.findall(r"(found|lost) (\w+)", changes)]
        counts.append((number(before) + sum(gains), number(after)))
    return counts


def number(word: str) -> int:
    return NUMBERS.index(word) + 1


def test_the_right_number_is_what_is_left_after_all_that_was_found_and_lost(stories: list[str], tasks: dict[str, list[dict[str, Any]]]) -> None:
    texts = stories[:300] + [f"{row['context']} {row['choices'][row['gold']]}" for row in tasks["demo_sums"]]
    for text in texts:
        counts = read_sums(text)
        assert len(counts) == text.count(" had ") > 0
        assert all(expected == told for expected, told in counts)


def test_text_comes_back_from_its_tokens_and_holds_no_unknown_word(stories: list[str], tasks: dict[str, list[dict[str, Any]]]) -> None:
    tokenizer = build_tokenizer()
    texts = stories[:300] + [text for rows in tasks.values() for row in rows for text in [row.get("text") or row["context"], *row.get("choices", ())]]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_every_token_but_the_special_ones_is_used(stories: list[str]) -> None:
    tokenizer = build_tokenizer()
    used = {index for ids in tokenizer(stories)["input_ids"] for index in ids}
    assert set(range(len(tokenizer))) - used == {tokenizer.eos_token_id, tokenizer.unk_token_id}


@settings(max_examples=30, deadline=None)
@given(index=st.integers(0, 1_999), cut=st.floats(0.05, 0.95))
def test_a_context_keeps_its_tokens_when_a_continuation_follows(stories: list[str], index: int, cut: float) -> None:
    tokenizer = build_tokenizer()
    words = stories[index].split()
    place = max(1, int(cut * len(words)))
    context, continuation = " ".join(words[:place]), " " + " ".join(words[place:])
    ids = tokenizer(context)["input_ids"]
    assert tokenizer(context + continuation)["input_ids"][: len(ids)] == ids


def test_each_answer_is_one_token_after_its_context(tasks: dict[str, list[dict[str, Any]]]) -> None:
    tokenizer = build_tokenizer()
    for name in MULTIPLE_CHOICE:
        for row in tasks[name][:50]:
            length = len(tokenizer(row["context"])["input_ids"])
            assert all(len(tokenizer(f"{row['context']} {choice}")["input_ids"]) == length + 1 for choice in row["choices"])


def test_the_saved_tokenizer_loads_with_auto_tokenizer_beside_a_llama_config(tmp_path: Path, stories: list[str]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(stories[:50])["input_ids"] == tokenizer(stories[:50])["input_ids"]
    assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer))
    assert loaded.decode(loaded(stories[0])["input_ids"]) == stories[0]


def test_a_teacher_trained_for_a_few_steps_is_accepted_and_the_same_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "TOKENS", 5_120)
    monkeypatch.setattr(teacher, "PLAN", replace(teacher.PLAN, tokens=5_120, warmup_tokens=0, decay_tokens=0))
    corpus = write_corpus(tmp_path, seed=SEED, num_documents=200)
    random_state = torch.random.get_rng_state()
    losses: list[float] = []
    first, again = (check_teacher(teacher.train_teacher(tmp_path / name, corpus=corpus, report=lambda p: losses.append(p.loss))) for name in ("a", "b"))
    assert first.digest == again.digest
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert losses
    assert first.config["architectures"] == ["LlamaForCausalLM"]
    assert first.architecture.tie_word_embeddings
    assert first.architecture.shape.query_heads_per_kv > 1
    tokens = load_tokenizer(first.path)("One Monday baker Anna", return_tensors="pt")["input_ids"]
    assert load_model(first.path, dtype="float32", device="cpu")(tokens).logits.shape == (1, 4, first.architecture.vocab_size)
