"""The teacher's outputs on packed blocks, computed once and read by any number of trials at once, so that training needs no teacher.

Two kinds. `exact` keeps the final hidden state (after the last norm) in the dtype of the teacher's arithmetic, and its head once: the loss is the one
with the teacher in the loop, on a CPU to the same bits. `top_k` keeps the K largest log-probabilities (float16), their tokens (int32) and the log of
the mass of all others (float32): the loss compares K + 1 outcomes, so within the others the student is left as it is, not pushed to zero.

A part (train, validation) is a row of shards of bounded size, each a file with its sha256 that is renamed into place when it is whole: a build that was
killed goes on with the first shard that is missing or damaged. Shards are memory-mapped, and compared with their digests once, where first read.

Shape suffixes: N blocks, B blocks of a batch, T tokens of a block, M tokens of a batch (B x T), C tokens of a chunk, D hidden, K kept tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.compress.losses import Head, chunked_loss, final_hidden, head_of, token_chunks
from nas.compress.manifest import load_tensors, save_tensors
from nas.cost import SignalKind, signal_bytes_per_token
from nas.errors import CorruptFile, NotFound
from nas.files import withdraw

SHARD_BYTES = 2**28
"""Most bytes of one shard (one block, where that is larger): what a kill or a flipped bit costs, and what is hashed before its first row is read."""
_SMALLEST_LOG = -1e4
"""Stands for the log of nothing: its exponential is zero, and zero times it is no NaN."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalFormat:
    """What is kept of each token."""

    kind: SignalKind
    top_k: int
    """Tokens kept by `top_k`: at most the vocabulary."""
    rows_per_shard: int

    @classmethod
    def of(cls, kind: SignalKind, *, model: nn.Module, sequence_length: int, top_k: int) -> SignalFormat:
        """The format for a teacher, with as many blocks in a shard as `SHARD_BYTES` has room for."""
        weight_VD = head_of(model).weight_VD
        top_k = min(top_k, len(weight_VD))
        per_token = signal_bytes_per_token(kind, hidden_size=weight_VD.shape[1], bytes_per_element=weight_VD.element_size(), top_k=top_k)
        return cls(kind=kind, top_k=top_k, rows_per_shard=max(1, SHARD_BYTES // (per_token * sequence_length)))


def build_signals(
    teacher: nn.Module,
    *,
    blocks_NT: Tensor,
    part: str,
    kind: SignalKind,
    top_k: int,
    folder: Path,
    teacher_digest: str,
    batch_size: int,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Write the shards of one part, then its facts and the head; whole shards of the same teacher, blocks and kind stay as they are.

    On a CPU the stored hidden state has the bits that training with the teacher in the loop would see, whatever the batches, where a block's length is
    a multiple of 16 (matrix products of another number of rows may end in another kernel).

    Args:
        teacher: in evaluation mode, in the dtype and on the device it is to run.
        blocks_NT: integer tokens, on the CPU.
        part: name of these blocks: train or validation.
        top_k: of the kind `top_k`; at most the vocabulary counts.
        report: told (blocks done, all blocks) after every batch; may raise to stop: whole shards stay.
    """
    form = SignalFormat.of(kind, model=teacher, sequence_length=blocks_NT.shape[1], top_k=top_k)
    head = head_of(teacher)
    shards = torch.split(blocks_NT, form.rows_per_shard)
    for index, shard_NT in enumerate(shards):
        facts = {
            "kind": kind,
            "top_k": form.top_k if kind == "top_k" else None,
            "dtype": str(head.weight_VD.dtype),
            "teacher": teacher_digest,
            "tokens_sha256": hashlib.sha256(shard_NT.contiguous().numpy().tobytes()).hexdigest(),
        }
        first = index * form.rows_per_shard
        if not _is_whole(folder, name=_shard_name(part, index), facts=facts):
            told = partial(_report_shard, report, first=first, of=len(blocks_NT))
            tensors = _make_shard(teacher, shard_NT=shard_NT, form=form, batch_size=batch_size, report=told)
            save_tensors(folder, name=_shard_name(part, index), tensors=tensors, facts=facts)
        report(first + len(shard_NT), len(blocks_NT))
    _drop_shards(folder, part=part, first=len(shards))  # of another kind
    whole = {"kind": kind, "num_blocks": len(blocks_NT), "rows_per_shard": form.rows_per_shard, "scale": head.scale, "softcap": head.softcap}
    save_tensors(folder, name=part, tensors=_head_tensors(head) if kind == "exact" else {}, facts=whole)


class StoredSignals:
    """One part of the signals of a folder, read by the rows of its blocks. Keeps open what it has read."""

    def __init__(self, folder: Path, *, part: str, device: str = "cpu", repair: Callable[[], None] | None = None) -> None:
        """
        Args:
            device: where the tensors are wanted.
            repair: makes shards that are missing or damaged again (`build_signals`, with the teacher); None: their reading raises.
        Raises:
            NotFound, CorruptFile: as `load_tensors`, of the part's facts.
        """
        self._folder, self._part, self._device, self._repair = folder, part, device, repair
        self._shards: dict[int, Mapping[str, Tensor]] = {}
        self._head, facts = self._load(part)
        self.kind: SignalKind = facts["kind"]
        self._num_blocks: int = facts["num_blocks"]
        self._rows_per_shard: int = facts["rows_per_shard"]
        self._scale, self._softcap = facts["scale"], facts["softcap"]

    def __len__(self) -> int:
        return self._num_blocks

    def read(self, rows_B: Tensor) -> dict[str, Tensor]:
        """The stored tensors of these blocks, each (M, ...), on the device.

        Raises:
            CorruptFile: a shard that is missing or damaged and could not be repaired.
        """
        places = [divmod(row, self._rows_per_shard) for row in rows_B.tolist()]
        shards = [self._shard(index) for index, _ in places]
        gathered = {name: torch.stack([shard[name][row] for shard, (_, row) in zip(shards, places, strict=True)]) for name in shards[0]}
        return {name: tensor.flatten(0, 1).to(self._device) for name, tensor in gathered.items()}

    def read_head(self) -> Head:
        """The teacher's head, on the device; only the kind `exact` has it."""
        tensors = {name: tensor.to(self._device) for name, tensor in self._head.items()}
        return Head(weight_VD=tensors["weight_VD"], bias_V=tensors.get("bias_V"), scale=self._scale, softcap=self._softcap)

    def _shard(self, index: int) -> Mapping[str, Tensor]:
        if index not in self._shards:
            self._shards[index], _ = self._load(_shard_name(self._part, index))
        return self._shards[index]

    def _load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            return load_tensors(self._folder, name=name)
        except (NotFound, CorruptFile) as damaged:
            if self._repair is None:
                raise
            logger.warning("signals are made again", extra={"action": "repair_signals", "reason": str(damaged)})
            self._repair()
            return load_tensors(self._folder, name=name)


def _head_tensors(head: Head) -> dict[str, Tensor]:
    tensors = {"weight_VD": head.weight_VD} if head.bias_V is None else {"weight_VD": head.weight_VD, "bias_V": head.bias_V}
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _report_shard(report: Callable[[int, int], None], done: int, *, first: int, of: int) -> None:
    report(first + done, of)


def _shard_name(part: str, index: int) -> str:
    return f"{part}-{index:05d}"


def _drop_shards(folder: Path, *, part: str, first: int) -> None:
    for file in folder.glob(f"{part}-*"):
        number = re.match(r"(\d{5})[-.]", file.name.removeprefix(f"{part}-"))
        if number is not None and int(number[1]) >= first:
            withdraw(file)


def _is_whole(folder: Path, *, name: str, facts: Mapping[str, Any]) -> bool:
    try:
        _, found = load_tensors(folder, name=name)
    except NotFound:
        return False
    except CorruptFile as damaged:
        logger.warning("%s is damaged and made again", name, extra={"action": "rebuild_shard", "reason": str(damaged)})
        return False
    return found == facts


@torch.inference_mode()
def _make_shard(teacher: nn.Module, *, shard_NT: Tensor, form: SignalFormat, batch_size: int, report: Callable[[int], None]) -> dict[str, Tensor]:
    """The tensors of one shard, on the CPU, each (N, T, ...)."""
    device = next(teacher.parameters()).device
    made: list[dict[str, Tensor]] = []
    done = 0
    for batch_BT in torch.split(shard_NT, batch_size):
        hidden_MD = final_hidden(teacher, batch_BT.to(device, torch.int64))
        tensors = {"hidden": hidden_MD} if form.kind == "exact" else _top_k(hidden_MD, head=head_of(teacher), top_k=form.top_k)
        made.append({name: tensor.view(*batch_BT.shape, *tensor.shape[1:]).cpu() for name, tensor in tensors.items()})
        done += len(batch_BT)
        report(done)
    return {name: torch.cat([tensors[name] for tensors in made]) for name in made[0]}


def _top_k(hidden_MD: Tensor, *, head: Head, top_k: int) -> dict[str, Tensor]:
    chunks = []
    for chunk in token_chunks(len(hidden_MD), head=head, chunk_tokens=None):
        log_CV = torch.log_softmax(head.logits(hidden_MD[chunk]).float(), dim=-1)
        log_CK, indices_CK = log_CV.topk(top_k, dim=-1)
        # Not 1 - sum of the kept: near 1 that is rounding error only.
        rest_C = log_CV.scatter_(1, indices_CK, -torch.inf).logsumexp(dim=-1).clamp_min(_SMALLEST_LOG)
        chunks.append((log_CK.half(), indices_CK.to(torch.int32), rest_C))
    log_probs, indices, log_rest = (torch.cat(tensors) for tensors in zip(*chunks, strict=True))
    return {"log_probs": log_probs, "indices": indices, "log_rest": log_rest}


def top_k_kl_loss(hidden_MD: Tensor, head: Head, *, log_probs_MK: Tensor, indices_MK: Tensor, log_rest_M: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Mean over the tokens of KL(teacher || student) over K + 1 outcomes: the kept tokens, and all others as one.

    It is a lower bound of the whole KL, and zero where it is. The derivative by a logit is q - p for a kept token and q (1 - p_rest / q_rest) for
    another: as if the teacher spread its remaining mass as the student does. The kept probabilities are scaled to the mass that is not the rest's,
    which their rounding to float16 changes.

    Args:
        hidden_MD: the student's final hidden states. head: the student's.
        log_probs_MK, indices_MK, log_rest_M: as stored.
    """

    def criterion(chunk: slice, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        indices_CK = indices_MK[chunk].long()
        p_rest_C = log_rest_M[chunk].exp()
        p_CK = torch.softmax(log_probs_MK[chunk].float(), dim=-1) * (1.0 - p_rest_C).unsqueeze(1)
        student_CV = torch.log_softmax(logits_CV, dim=-1)
        log_q_CK = student_CV.gather(1, indices_CK)
        grad_CV = student_CV.exp_().scatter_(1, indices_CK, 0.0)
        q_rest_C = grad_CV.sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        total = torch.special.xlogy(p_CK, p_CK).sum() - torch.dot(p_CK.flatten(), log_q_CK.flatten())
        total += torch.dot(p_rest_C, log_rest_M[chunk] - q_rest_C.log())
        grad_CV *= (1.0 - p_rest_C / q_rest_C).unsqueeze(1)
        return total, grad_CV.scatter_(1, indices_CK, log_q_CK.exp_().sub_(p_CK))

    return chunked_loss(hidden_MD, head, criterion=criterion, chunk_tokens=chunk_tokens)


class StoredTeacher:
    """A teacher's outputs from the kind `exact`: `TeacherOutputs`, for training and for held-out KL."""

    def __init__(self, signals: StoredSignals, *, first_row: int = 0) -> None:
        """
        Args:
            first_row: the row of the signals that is row 0 here.
        """
        assert signals.kind == "exact", f"a hidden state is kept by the kind exact, not {signals.kind}"
        self._signals, self._first_row = signals, first_row
        self.head = signals.read_head()

    def hidden(self, tokens_BT: Tensor, *, rows_B: Tensor) -> Tensor:
        return self._signals.read(rows_B + self._first_row)["hidden"]


class StoredTopK:
    """An objective: forward KL to the K likeliest tokens of a teacher and the rest, from the kind `top_k`."""

    def __init__(self, signals: StoredSignals) -> None:
        assert signals.kind == "top_k", f"log-probabilities are kept by the kind top_k, not {signals.kind}"
        self._signals = signals
        self.facts = {"loss": "top_k_forward_kl"}

    def weights(self) -> dict[str, nn.Parameter]:
        return {}

    def loss(self, student: nn.Module, tokens_BT: Tensor, *, rows_B: Tensor) -> Tensor:
        stored = self._signals.read(rows_B)
        return top_k_kl_loss(
            final_hidden(student, tokens_BT),
            head_of(student),
            log_probs_MK=stored["log_probs"],
            indices_MK=stored["indices"],
            log_rest_M=stored["log_rest"],
        )
