"""Log-probabilities of the scored tokens of many sequences: a model's body over shared prefixes, its head where something is scored.

Knows no task. Equal to one forward pass per sequence up to the order of sums; log-softmax is float32 whatever the model's dtype.

Shape suffixes: Q sequences, B batch (one row of trees), T tokens, S scored positions, N distinct ones, D hidden, V vocabulary; H query heads, K key/value
heads or keys of a piece, E head_dim, G pieces of a group, L queries of a piece.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from nas.compress.losses import Head, head_of, token_chunks
from nas.evaluate.prefix_trees import Batch, Ints, plan_batches

_ATTENTION = "prefix_trees"
"""Under this name transformers finds `_attend`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Paths:
    """Which tokens see which, on the device: for each group its queries_GL, its keys_GK and what a query sees of a whole sequence by depth."""

    groups: tuple[tuple[Tensor, Tensor, Tensor], ...]
    """queries_GL, keys_GK, depths_GL1 of the queries."""
    places_T: Tensor


_paths: ContextVar[_Paths] = ContextVar("paths")
"""Of the batch in the model now: not every family hands further arguments down to its attention."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SequenceLikelihoods:
    """Of the scored tokens of each sequence."""

    nats_Q: npt.NDArray[np.float64]
    """Sum of their log-probabilities."""
    is_greedy_Q: npt.NDArray[np.bool_]
    """Whether each of them is the most probable one."""


@torch.no_grad()
def sequence_likelihoods(model: Any, *, sequences: Sequence[Ints], num_scored: Sequence[int], batch_tokens: int) -> SequenceLikelihoods:
    """Scores the last tokens of each sequence given all before them.

    Args:
        model: a transformers causal language model in evaluation mode, on its device.
        sequences: tokens, the context first; at least two each, and at most one more than the model's context.
        num_scored: how many tokens at the end of each sequence are scored; at least 1, fewer than it has.
        batch_tokens: tokens of a forward pass, padding counted; a longer sequence has a pass of its own.
    """
    batches = plan_batches(sequences, num_scored=num_scored, batch_tokens=batch_tokens)
    nats_Q, num_missed_Q = np.zeros(len(sequences)), np.zeros(len(sequences), np.int64)
    head = head_of(model)
    with _attending_to_paths(model.config):
        for batch in batches:
            nats_S, is_greedy_S = _score_batch(model, batch, head=head)
            nats_Q += np.bincount(batch.sequences_S, weights=nats_S, minlength=len(sequences))
            num_missed_Q += np.bincount(batch.sequences_S[~is_greedy_S], minlength=len(sequences))
    return SequenceLikelihoods(nats_Q=nats_Q, is_greedy_Q=num_missed_Q == 0)


@contextlib.contextmanager
def _attending_to_paths(config: Any) -> Iterator[None]:
    """The model attends by `_attend` for a while, whatever its attention implementation is."""
    AttentionInterface.register(_ATTENTION, _attend)
    implementation = config._attn_implementation
    try:
        config._attn_implementation = _ATTENTION
        yield
    finally:
        config._attn_implementation = implementation


def _score_batch(model: Any, batch: Batch, *, head: Head) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    device = head.weight_VD.device
    tokens_BT, depths_BT = (torch.from_numpy(values_T).to(device)[None] for values_T in (batch.tokens_T, batch.depths_T))
    groups = []
    for group in batch.groups:
        queries_GL, keys_GK = torch.from_numpy(group.queries_GL).to(device), torch.from_numpy(group.keys_GK).to(device)
        groups.append((queries_GL, keys_GK, depths_BT[0][queries_GL][..., None]))
    paths = _Paths(groups=tuple(groups), places_T=torch.from_numpy(batch.places_T).to(device))
    before = _paths.set(paths)
    try:
        hidden_BTD: Tensor = model.base_model(input_ids=tokens_BT, position_ids=depths_BT, use_cache=False).last_hidden_state
    finally:
        _paths.reset(before)
    nodes_N, of_S = np.unique(batch.nodes_S, return_inverse=True)
    hidden_ND = hidden_BTD.flatten(0, 1)[torch.from_numpy(nodes_N).to(device)]
    nats_S, is_greedy_S = np.empty(len(of_S)), np.empty(len(of_S), np.bool_)
    for chunk in token_chunks(len(hidden_ND), head=head, chunk_tokens=None):
        picked = np.flatnonzero((of_S >= chunk.start) & (of_S < chunk.stop))
        logits_NV = head.logits(hidden_ND[chunk]).float()
        rows_S = torch.from_numpy(of_S[picked] - chunk.start).to(device)
        targets_S = torch.from_numpy(batch.targets_S[picked]).to(device)
        nats_S[picked] = (logits_NV[rows_S, targets_S] - logits_NV.logsumexp(dim=-1)[rows_S]).double().cpu().numpy()
        is_greedy_S[picked] = (logits_NV.argmax(dim=-1)[rows_S] == targets_S).cpu().numpy()
    return nats_S, is_greedy_S


def _attend(
    _module: nn.Module,
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    _mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """What each token takes from those it sees; a transformers attention function (softcap and window as in its eager ones), for one row of trees."""
    paths = _paths.get()
    (query_HTE,), (key_KTE,), (value_KTE,) = query_BHTE, key_BKTE, value_BKTE
    num_heads, num_kv_heads = len(query_HTE), len(key_KTE)
    parts = []
    for queries_GL, keys_GK, depths_GL1 in paths.groups:
        (size, length), width = queries_GL.shape, keys_GK.shape[1]
        # Heads that share keys are more queries of these keys.
        query = query_HTE[:, queries_GL.flatten()].view(num_kv_heads, -1, size, length, query_HTE.shape[-1]).transpose(1, 2).flatten(2, 3)
        key, value = (tensor[:, keys_GK.flatten()].view(num_kv_heads, size, width, -1) for tensor in (key_KTE, value_KTE))
        scores = (query @ key.transpose(-1, -2)).mul_(scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        at_K = torch.arange(width, device=scores.device)
        hidden_GLK = at_K > depths_GL1
        if sliding_window is not None:
            hidden_GLK |= at_K <= depths_GL1 - sliding_window
        scores = scores.view(num_kv_heads, size, -1, length, width).masked_fill_(hidden_GLK[:, None], -math.inf).flatten(2, 3)
        taken = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value
        parts.append(taken.view(num_kv_heads, size, -1, length, taken.shape[-1]).transpose(1, 2).reshape(num_heads, size * length, -1))
    return torch.cat(parts, dim=1)[:, paths.places_T].transpose(0, 1)[None], None
