"""Documents become blocks: nothing is lost, nothing depends on file order, and what is wrong is named."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nas.compress.blocks import Blocks, Part, build_blocks, load_blocks, split_of
from nas.errors import CorpusUnavailable, CorruptFile
from tests.compress.text_files import stories, write_jsonl

BOS, EOS = 256, 257


def byte_tokenizer(*, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, so that token counts can be told from the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={**{char: index for index, char in enumerate(alphabet)}, "<s>": BOS, "</s>": EOS}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>" if adds_bos else None, eos_token="</s>")


def build(folder: Path, *parts: Part, train: int = 2000, calibration: int = 200, validation: int = 200, seed: int = 0, adds_bos: bool = True) -> Blocks:
    return build_blocks(
        parts,
        tokenizer=byte_tokenizer(adds_bos=adds_bos),
        sequence_length=32,
        train_tokens=train,
        calibration_tokens=calibration,
        validation_tokens=validation,
        seed=seed,
        folder=folder,
    )


def test_the_splits_share_no_document(tmp_path: Path) -> None:
    documents = stories(400) * 2  # duplicates, too, must stay on one side
    blocks = build(tmp_path / "b", Part(name="a", files=(write_jsonl(tmp_path / "a.jsonl", documents),)), train=10**6, calibration=999, validation=999)
    ids = {
        split: {int(number) for text in [byte_tokenizer().decode(row.tolist()) for row in rows_NT] for number in _story_numbers(text)}
        for split, rows_NT in (("train", blocks.train_NT), ("calibration", blocks.calibration_NT), ("validation", blocks.validation_NT))
    }
    assert len(ids["train"]) > 300
    for split, numbers in ids.items():
        assert numbers
        assert {split_of(documents[number]) for number in numbers} == {split}


def _story_numbers(text: str) -> list[str]:
    return [part.split(" ")[0].removeprefix("0.") for part in text.split("<s>")[1:] if part.startswith("0.") and " " in part]


def test_the_splits_are_near_90_5_5() -> None:
    splits = [split_of(str(number)) for number in range(4000)]
    assert splits.count("train") == pytest.approx(3600, abs=80)
    assert splits.count("validation") == pytest.approx(200, abs=60)


def test_blocks_do_not_depend_on_the_order_of_documents_or_files(tmp_path: Path) -> None:
    documents = stories(300)
    whole = write_jsonl(tmp_path / "whole.jsonl", documents)
    random.Random(1).shuffle(documents)
    halves = (write_jsonl(tmp_path / "y.jsonl", documents[:100]), write_jsonl(tmp_path / "x.jsonl", documents[100:]))
    one = build(tmp_path / "one", Part(name="a", files=(whole,)))
    two = build(tmp_path / "two", Part(name="a", files=halves))
    for name in ("train_NT", "calibration_NT", "validation_NT"):
        assert torch.equal(getattr(one, name), getattr(two, name))


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    part = Part(name="a", files=(write_jsonl(tmp_path / "a.jsonl", stories(300)),))
    first, again, other = (build(tmp_path / str(index), part, seed=seed) for index, seed in enumerate((0, 0, 1)))
    assert torch.equal(first.train_NT, again.train_NT)
    assert not torch.equal(first.train_NT, other.train_NT)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_packing_keeps_every_token_and_one_separator_per_document(tmp_path: Path, adds_bos: bool) -> None:
    documents = stories(300)
    blocks = build(tmp_path / "b", Part(name="a", files=(write_jsonl(tmp_path / "a.jsonl", documents),)), train=10**6, adds_bos=adds_bos)
    train = [document for document in documents if split_of(document) == "train"]
    lost = sum(len(document) + 1 for document in train) - blocks.train_NT.numel()
    assert 0 <= lost < 32  # what does not fill a block
    separator = BOS if adds_bos else EOS
    assert len(train) - 2 <= int((blocks.train_NT == separator).sum()) <= len(train)
    assert set(blocks.train_NT.unique().tolist()) <= set(range(258))


def test_tokens_are_whole_blocks_of_what_was_asked(tmp_path: Path) -> None:
    blocks = build(tmp_path / "b", Part(name="a", files=(write_jsonl(tmp_path / "a.jsonl", stories(300)),)), train=2000, calibration=33, validation=64)
    assert (blocks.train_NT.shape, blocks.calibration_NT.shape, blocks.validation_NT.shape) == ((63, 32), (2, 32), (2, 32))
    assert blocks.train_NT.dtype == torch.int32


def test_validation_bytes_are_those_of_its_text(tmp_path: Path) -> None:
    blocks = build(tmp_path / "b", Part(name="a", files=(write_jsonl(tmp_path / "a.jsonl", stories(300)),)))
    text_tokens = int((blocks.validation_NT != BOS).sum())
    assert blocks.validation_bytes == pytest.approx(text_tokens, abs=2)


def test_a_short_training_split_is_kept_whole_and_not_repeated(tmp_path: Path) -> None:
    blocks = build(tmp_path / "b", Part(name="a", files=(write_jsonl(tmp_path / "a.jsonl", stories(200)),)), train=10**6)
    assert blocks.facts["parts"][0]["train"]["repeats"] == 1.0
    assert blocks.facts["train_tokens"] == blocks.train_NT.numel() < 10**6
    assert len(blocks.train_NT.unique(dim=0)) == len(blocks.train_NT)


def test_a_mixture_keeps_its_weights_even_when_one_part_is_short(tmp_path: Path) -> None:
    large = Part(name="large", files=(write_jsonl(tmp_path / "a.jsonl", [text.upper() for text in stories(900)]),), weight=3)
    small = Part(name="small", files=(write_jsonl(tmp_path / "b.jsonl", stories(100, seed=7)),), weight=1)
    blocks = build(tmp_path / "b", large, small, train=10**6, calibration=320, validation=320)
    upper = sum(any(65 <= byte <= 90 for byte in byte_tokenizer().decode(row.tolist()).encode()) for row in blocks.train_NT)
    assert upper / len(blocks.train_NT) == pytest.approx(0.75, abs=0.01)
    large_facts, small_facts = (part["train"] for part in blocks.facts["parts"])
    assert large_facts["repeats"] == pytest.approx(1.0, abs=0.01)
    assert small_facts["repeats"] > 1.5
    assert blocks.facts["parts"][1]["validation"]["repeats"] <= 1.0


def test_too_few_tokens_say_how_many_each_split_has(tmp_path: Path) -> None:
    part = Part(name="tiny", files=(write_jsonl(tmp_path / "a.jsonl", stories(40)),))
    with pytest.raises(CorpusUnavailable, match=r"corpus 'tiny': expected .* validation 5024; got: train \d+, calibration \d+, validation \d+"):
        build(tmp_path / "b", part, validation=5000)


def test_blocks_are_read_back_and_a_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    built = build(folder, Part(name="a", files=(write_jsonl(tmp_path / "a.jsonl", stories(300)),)))
    loaded = load_blocks(folder)
    assert torch.equal(built.train_NT, loaded.train_NT)
    assert built.facts == loaded.facts
    weights = next(folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-9] ^= 4
    weights.write_bytes(content)
    with pytest.raises(CorruptFile):
        load_blocks(folder)


@pytest.mark.reference
def test_a_real_corpus_packs_into_real_text(tmp_path: Path) -> None:
    if "NAS_REFERENCE" not in os.environ:
        pytest.skip("needs the reference material: set NAS_REFERENCE")
    reference = Path(os.environ["NAS_REFERENCE"])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference / "models" / "stories260K")
    part = Part(name="tinystories", files=(reference / "data" / "text" / "tinystories" / "train.jsonl",))
    blocks = build_blocks(
        [part], tokenizer=tokenizer, sequence_length=256, train_tokens=50_000, calibration_tokens=10_000, validation_tokens=10_000, seed=0, folder=tmp_path
    )
    assert blocks.train_NT.shape == (196, 256)
    assert 1.5 < blocks.validation_bytes / blocks.validation_NT.numel() < 3.0
