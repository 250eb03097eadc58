"""Documents -> packed blocks of tokens, split into train, calibration and validation.

Deterministic: a document's split follows from its text alone, its place in the order from its text and the seed; neither
from file names, file order or the other documents. Equal documents therefore never lie in two splits.
Documents are packed back to back without padding, so attention reaches over their borders, as in pretraining.

Shape suffixes: N blocks, T tokens.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas.compress.corpus import read_documents
from nas.compress.manifest import load_tensors, save_tensors
from nas.errors import CorpusUnavailable

logger = logging.getLogger(__name__)

SPLITS = ("train", "calibration", "validation")
_PERCENT = {"train": 90, "calibration": 5, "validation": 5}
_BATCH_DOCUMENTS = 256
"""Tokenised at once."""
_NAME = "blocks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One corpus of a mixture."""

    name: str
    files: tuple[Path, ...]
    weight: float = 1.0
    """Its share of the blocks is weight / sum of weights."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blocks:
    """Packed tokens, memory-mapped, int32."""

    train_NT: torch.Tensor
    """May hold fewer tokens than were asked for: training then goes over them again, in another order."""
    calibration_NT: torch.Tensor
    validation_NT: torch.Tensor
    validation_bytes: int
    """UTF-8 bytes of the text in validation_NT: bits per byte = nats per token * tokens / bytes / ln 2."""
    facts: dict[str, Any]
    """What they were made from, and per part and split: documents read, tokens, blocks, times a block is repeated."""


def build_blocks(
    parts: Sequence[Part],
    *,
    tokenizer: Any,
    sequence_length: int,
    train_tokens: int,
    calibration_tokens: int,
    validation_tokens: int,
    seed: int,
    folder: Path,
) -> Blocks:
    """Tokenise, split, shuffle and pack the parts into `folder`; only about as many documents are tokenised as the blocks need.

    Each split has whole blocks, in shares by weight. A part whose train split is too short for its share is repeated, as often as it takes to keep
    the shares next to the part that reaches furthest; a single part is never repeated, and `train_NT` is then shorter than `train_tokens`.

    Args:
        tokenizer: a transformers tokenizer. Its special tokens stay as it adds them; one that adds none at either end gets its EOS after each document.
        train_tokens: rounded up to whole blocks, like the other two.
        seed: of the order of documents and blocks.
    Raises:
        CorpusUnavailable: too few tokens for calibration or validation, or not one block to train on; the message says how many each split has.
    """
    if sequence_length < 2 or min(train_tokens, calibration_tokens, validation_tokens) < 1 or not parts or not all(p.weight > 0 for p in parts):
        raise ValueError("build_blocks: expected sequence_length >= 2, at least 1 token per split and parts with weights above 0")
    wanted = {"train": train_tokens, "calibration": calibration_tokens, "validation": validation_tokens}
    weights = [part.weight for part in parts]
    shares = {split: _share_out(-(-tokens // sequence_length), weights=weights) for split, tokens in wanted.items()}
    packed: dict[str, list[_Packed]] = {split: [] for split in SPLITS}
    for index, part in enumerate(parts):
        selected = _select_documents(part, tokenizer=tokenizer, wanted={s: shares[s][index] * sequence_length for s in SPLITS}, seed=seed)
        for split in SPLITS:
            packed[split].append(_pack(selected[split], num_blocks=shares[split][index], sequence_length=sequence_length))
    _check_enough(parts, packed=packed, shares=shares, sequence_length=sequence_length)
    furthest = max(len(part.blocks_NT) / weight for part, weight in zip(packed["train"], weights, strict=True))
    num_train = min(sum(shares["train"]), int(furthest * sum(weights) + 0.5))
    shares["train"] = _share_out(num_train, weights=weights)
    tensors = {f"{split}_NT": _mix(packed[split], shares=shares[split], seed=f"{seed}/{split}") for split in SPLITS}
    facts = {
        "sequence_length": sequence_length,
        "seed": seed,
        "requested_tokens": wanted,
        "train_tokens": tensors["train_NT"].numel(),
        "validation_bytes": round(sum(part.num_bytes for part in packed["validation"])),
        "parts": [
            {
                "name": part.name,
                "weight": part.weight,
                "files": [file.name for file in part.files],
                **{
                    split: {
                        "documents": packed[split][index].num_documents,
                        "tokens": packed[split][index].blocks_NT.size,
                        "blocks": shares[split][index],
                        "repeats": round(shares[split][index] / max(1, len(packed[split][index].blocks_NT)), 3),
                    }
                    for split in SPLITS
                },
            }
            for index, part in enumerate(parts)
        ],
    }
    save_tensors(folder, name=_NAME, tensors=tensors, facts=facts)
    logger.info("packed %d training tokens", facts["train_tokens"], extra={"action": "build_blocks"})
    return load_blocks(folder)


def load_blocks(folder: Path) -> Blocks:
    """The blocks that `build_blocks` wrote.

    Raises:
        NotFound, CorruptFile: as `load_tensors`.
    """
    tensors, facts = load_tensors(folder, name=_NAME)
    return Blocks(**tensors, validation_bytes=facts["validation_bytes"], facts=facts)


def split_of(text: str) -> str:
    """The split that a document belongs to: train 90 %, calibration 5 %, validation 5 %."""
    return _place(text, seed=0)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Document:
    """A tokenised document and its place in the seed's order."""

    place: float
    ids: np.ndarray[Any, np.dtype[np.int32]]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packed:
    """One part's blocks of one split."""

    blocks_NT: np.ndarray[Any, np.dtype[np.int32]]
    num_documents: int
    num_bytes: float
    num_tokens: int
    """Before cutting to whole blocks."""


def _place(text: str, *, seed: int) -> tuple[str, float]:
    """The document's split, and its place in [0, 1) in the order of `seed`."""
    digest = hashlib.sha256(text.encode()).digest()
    percent = int.from_bytes(digest[:8], "big") % 100
    place = int.from_bytes(hashlib.sha256(digest + str(seed).encode()).digest()[:6], "big") / 2**48
    for split in SPLITS:
        percent -= _PERCENT[split]
        if percent < 0:
            return split, place
    raise AssertionError("the splits' shares do not add up to 100")


def _select_documents(part: Part, *, tokenizer: Any, wanted: dict[str, int], seed: int) -> dict[str, list[_Document]]:
    """Tokenised documents per split, in the seed's order, of at least `wanted` tokens where the part has them.

    Documents are taken whose place lies below a limit; the limit is doubled until every split has enough. Each is tokenised once.
    """
    selected: dict[str, list[_Document]] = {split: [] for split in SPLITS}
    lower = dict.fromkeys(SPLITS, 0.0)
    # Four bytes per token is typical of large vocabularies; a wrong guess only costs another pass over the text.
    total_bytes = sum(file.stat().st_size for file in part.files)
    upper = {s: min(1.0, 1.1 * wanted[s] * 4 / (total_bytes * _PERCENT[s] / 100)) for s in SPLITS}
    while any(lower[s] < upper[s] for s in SPLITS):
        batch: list[tuple[str, str, float]] = []
        for text in read_documents(part.files):
            split, place = _place(text, seed=seed)
            if lower[split] <= place < upper[split]:
                batch.append((text, split, place))
                if len(batch) == _BATCH_DOCUMENTS:
                    _tokenize_into(selected, batch, tokenizer=tokenizer)
                    batch = []
        _tokenize_into(selected, batch, tokenizer=tokenizer)
        for split in SPLITS:
            lower[split] = upper[split]
            if sum(document.ids.size for document in selected[split]) < wanted[split]:
                upper[split] = min(1.0, 2 * upper[split])
    for documents in selected.values():
        documents.sort(key=lambda document: document.place)
    return selected


def _tokenize_into(selected: dict[str, list[_Document]], batch: Sequence[tuple[str, str, float]], *, tokenizer: Any) -> None:
    if not batch:
        return
    encoded = tokenizer([text for text, _, _ in batch], return_attention_mask=False, verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for (text, split, place), ids in zip(batch, encoded, strict=True):
        separated = ids and ((bos is not None and ids[0] == bos) or (eos is not None and ids[-1] == eos))
        whole = ids if separated or eos is None else [*ids, eos]
        selected[split].append(_Document(place=place, ids=np.asarray(whole, dtype=np.int32), num_bytes=len(text.encode())))


def _pack(documents: Sequence[_Document], *, num_blocks: int, sequence_length: int) -> _Packed:
    """Whole blocks, at most `num_blocks`; the bytes of the document that the last block cuts count in proportion."""
    num_tokens = sum(document.ids.size for document in documents)
    room = min(num_blocks, num_tokens // sequence_length) * sequence_length
    taken: list[np.ndarray[Any, np.dtype[np.int32]]] = [np.empty(0, dtype=np.int32)]
    num_bytes = 0.0
    for document in documents:
        if room <= 0:
            break
        ids = document.ids[:room]
        taken.append(ids)
        room -= ids.size
        num_bytes += document.num_bytes * ids.size / document.ids.size
    blocks_NT = np.concatenate(taken).reshape(-1, sequence_length)
    return _Packed(blocks_NT=blocks_NT, num_documents=len(taken) - 1, num_bytes=num_bytes, num_tokens=num_tokens)


def _check_enough(parts: Sequence[Part], *, packed: dict[str, list[_Packed]], shares: dict[str, list[int]], sequence_length: int) -> None:
    for index, part in enumerate(parts):
        needed = {split: shares[split][index] if split != "train" else min(1, shares[split][index]) for split in SPLITS}
        if any(len(packed[split][index].blocks_NT) < needed[split] for split in SPLITS):
            expected = ", ".join(f"{split} {needed[split] * sequence_length}" for split in SPLITS)
            got = ", ".join(f"{split} {packed[split][index].num_tokens}" for split in SPLITS)
            raise CorpusUnavailable(f"corpus {part.name!r}: expected at least this many tokens: {expected}; got: {got} (split of documents 90:5:5)")


def _share_out(total: int, *, weights: Sequence[float]) -> list[int]:
    """`total` in whole shares proportional to the weights (largest remainder; the earlier part wins a tie)."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def _mix(packed: Sequence[_Packed], *, shares: Sequence[int], seed: str) -> torch.Tensor:
    """The parts' blocks, each repeated to its share, shuffled together."""
    repeated = [part.blocks_NT[np.arange(share) % max(1, len(part.blocks_NT))] for part, share in zip(packed, shares, strict=True)]
    blocks_NT = torch.from_numpy(np.concatenate(repeated))
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    return blocks_NT[torch.randperm(len(blocks_NT), generator=generator)]
