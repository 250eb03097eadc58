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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from nas.compress.linear import fast_linear_layers
from nas.compress.losses import Head, head_of, token_chunks
from nas.evaluate.prefix_trees import Batch, Ints, plan_batches

_ATTENTION = "prefix_trees"
"""Under this name transformers finds `_attend`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Group:
    """A group of pieces on the device."""

    queries: Tensor
    """[G * L]"""
    keys: Tensor
    """[G * K]"""
    depths_GL1: Tensor
    """Of the queries."""
    num_keys: int

    @property
    def shape_GL(self) -> tuple[int, int]:
        return self.depths_GL1.shape[0], self.depths_GL1.shape[1]

    def mask(self, window: int | None, *, dtype: torch.dtype) -> Tensor:
        """What is added to the scores: [G, 1, L, K], 0 where a query sees a key."""
        at_K = torch.arange(self.num_keys, device=self.keys.device)
        hidden_GLK = at_K > self.depths_GL1
        if window is not None:
            hidden_GLK |= at_K <= self.depths_GL1 - window
        return torch.zeros(hidden_GLK.shape, dtype=dtype, device=hidden_GLK.device).masked_fill_(hidden_GLK, -math.inf)[:, None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Paths:
    """Which tokens see which, on the device."""

    groups: tuple[_Group, ...]
    places_T: Tensor
    _masks: dict[tuple[int | None, torch.dtype], list[Tensor]] = field(default_factory=dict)

    def masks(self, window: int | None, *, dtype: torch.dtype) -> list[Tensor]:
        """Of each group; the same for every layer with this window."""
        if (window, dtype) not in self._masks:
            self._masks[window, dtype] = [group.mask(window, dtype=dtype) for group in self.groups]
        return self._masks[window, dtype]


_paths: ContextVar[_Paths] = ContextVar("paths")
"""Of the batch in the model now: not every family hands further arguments down to its attention."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SequenceLikelihoods:
    """Of the scored tokens of each sequence."""

    nats_Q: npt.NDArray[np.float64]
    """Sum of their log-probabilities."""
    is_greedy_Q: npt.NDArray[np.bool_]
    """Whether each of them is the most probable one."""


@torch.inference_mode()
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
    with _attending_to_paths(model.config), fast_linear_layers(model):
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
        depths_GL1 = depths_BT[0][queries_GL][..., None]
        groups.append(_Group(queries=queries_GL.flatten(), keys=keys_GK.flatten(), depths_GL1=depths_GL1, num_keys=keys_GK.shape[1]))
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
    # Token by token, so that a piece is gathered by whole rows.
    query_TD, key_TD, value_TD = (tensor[0].transpose(0, 1).flatten(1) for tensor in (query_BHTE, key_BKTE, value_BKTE))
    (num_heads, head_dim), num_kv_heads = (query_BHTE.shape[1], query_BHTE.shape[3]), key_BKTE.shape[1]
    parts = []
    for group, mask in zip(paths.groups, paths.masks(sliding_window, dtype=query_TD.dtype), strict=True):
        (size, length), width = group.shape_GL, group.num_keys
        query = query_TD.index_select(0, group.queries).view(size, length, num_heads, head_dim).transpose(1, 2)
        key, value = (tensor.index_select(0, group.keys).view(size, width, num_kv_heads, -1).transpose(1, 2) for tensor in (key_TD, value_TD))
        if softcap is None:
            taken = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
        else:
            taken = _capped_attention(query, key, value, mask=mask, scaling=scaling, softcap=softcap)
        parts.append(taken.transpose(1, 2).reshape(size * length, -1))
    return torch.cat(parts).index_select(0, paths.places_T).view(1, len(paths.places_T), num_heads, -1), None


def _capped_attention(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor, scaling: float, softcap: float) -> Tensor:
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = torch.tanh((query @ key.transpose(-1, -2)).mul_(scaling / softcap)).mul_(softcap)
    return torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(query.dtype) @ value
