"""Token sequences that begin alike, laid out so that a model reads what they share once: trees, one behind the other in a flat row. Pure.

A token sees its ancestors and itself and stands at its depth, so a causal model computes for it exactly what it would in a row of its own.
The choices of a question share its context this way, sentences of a minimal pair their first words, questions of a subject their worked
examples, and equal sequences everything. Everything but attention is token by token and needs no padding; attention runs over groups of
pieces: some tokens of one sequence, and all that they see.

Shape suffixes: T tokens of a batch, S scored positions, G pieces of a group, L queries of a piece, K keys of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

MIN_SHARED = 0.1
"""A sequence joins a tree that has this share of it already."""
MAX_QUERIES = 64
"""Tokens of a piece: of long sequences the half that causality hides is not computed for nothing."""
MAX_PAIRS = 2**20
"""Pairs of tokens of a group, padding counted; for each head one number is in memory."""
_MAX_PADDING = 1.25
"""Pairs of a group over those that are no padding."""
KEY_BLOCK = 16
"""A group's keys are a multiple of it: a vector register of float32. 112 keys take a quarter less time than 109 (LOG.md)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Pieces of similar size, padded with token 0. Key k of a piece stands at depth k, so a query at depth d sees its keys 0 to d."""

    queries_GL: Ints
    keys_GK: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Some trees. Scored position s reads the hidden state of token `nodes_S[s]`, whose next token should be `targets_S[s]`."""

    tokens_T: Ints
    depths_T: Ints
    """Position of each token in its own sequence, from 0."""
    groups: tuple[Group, ...]
    places_T: Ints
    """Where each token stands among the queries of all groups, flattened and joined."""
    nodes_S: Ints
    targets_S: Ints
    sequences_S: Ints
    """Index of the sequence that asked."""


def plan_batches(sequences: Sequence[Ints], *, num_scored: Sequence[int], batch_tokens: int) -> list[Batch]:
    """Batches of at most `batch_tokens` tokens that score every sequence; a longer sequence has a batch of its own.

    Args:
        sequences: tokens that the model reads and, last, the one that only has to be predicted; at least two.
        num_scored: how many tokens at the end of each sequence are predicted.
    """
    trees = _grow(sequences, num_scored=num_scored, batch_tokens=batch_tokens)
    trees.sort(key=lambda tree: tree.longest)
    batches: list[Batch] = []
    taken: list[_Tree] = []
    for tree in trees:
        if taken and sum(one.size for one in taken) + tree.size > batch_tokens:
            batches.append(_join(taken))
            taken = []
        taken.append(tree)
    return [*batches, _join(taken)] if taken else batches


def _grow(sequences: Sequence[Ints], *, num_scored: Sequence[int], batch_tokens: int) -> list[_Tree]:
    # Big-endian bytes of numbers that are not negative sort as the numbers do.
    order = sorted(range(len(sequences)), key=lambda index: sequences[index][:-1].astype(">u4").tobytes())
    trees: list[_Tree] = []
    for index in order:
        sequence = sequences[index]
        inputs = sequence[:-1]
        shared = _common_prefix(trees[-1].last, inputs) if trees else 0
        if not trees or shared < MIN_SHARED * len(inputs) or trees[-1].size + len(inputs) - shared > batch_tokens:
            trees.append(_Tree())
            shared = 0
        trees[-1].add(sequence, shared=shared, num_scored=num_scored[index], index=index)
    return trees


def _common_prefix(left: Ints, right: Ints) -> int:
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if len(different) else length


class _Tree:
    """Grows by one sequence at a time, in sorted order, so that only the last path is open."""

    def __init__(self) -> None:
        self.size = 0
        self.longest = 0
        self.last: Ints = np.empty(0, np.int64)
        """The newest sequence, without the token that is only predicted."""
        self._path: Ints = np.empty(0, np.int64)
        """Its nodes."""
        self.tokens: list[Ints] = []
        self.depths: list[Ints] = []
        self.pieces: list[tuple[Ints, Ints]] = []
        """(queries, keys), as nodes of the tree."""
        self.nodes: list[Ints] = []
        self.targets: list[Ints] = []
        self.sequences: list[Ints] = []

    def add(self, sequence: Ints, *, shared: int, num_scored: int, index: int) -> None:
        inputs = sequence[:-1]
        new = len(inputs) - shared
        self._path = np.concatenate([self._path[:shared], np.arange(self.size, self.size + new)])
        self.tokens.append(inputs[shared:])
        self.depths.append(np.arange(shared, len(inputs)))
        for first in range(shared, len(inputs), MAX_QUERIES):
            end = min(first + MAX_QUERIES, len(inputs))
            self.pieces.append((self._path[first:end], self._path[:end]))
        self.nodes.append(self._path[len(inputs) - num_scored :])
        self.targets.append(sequence[len(sequence) - num_scored :])
        self.sequences.append(np.full(num_scored, index))
        self.size += new
        self.longest = max(self.longest, len(inputs))
        self.last = inputs


def _join(trees: Sequence[_Tree]) -> Batch:
    starts = np.cumsum([0, *(tree.size for tree in trees)])
    pieces = [(queries + start, keys + start) for tree, start in zip(trees, starts, strict=False) for queries, keys in tree.pieces]
    groups, places_T, offset = [], np.empty(int(starts[-1]), np.int64), 0
    for members in _group(pieces):
        group = _pad(members)
        width = group.queries_GL.shape[1]
        for row, (queries, _) in enumerate(members):
            places_T[queries] = offset + row * width + np.arange(len(queries))
        groups.append(group)
        offset += group.queries_GL.size
    return Batch(
        tokens_T=np.concatenate([part for tree in trees for part in tree.tokens]),
        depths_T=np.concatenate([part for tree in trees for part in tree.depths]),
        groups=tuple(groups),
        places_T=places_T,
        nodes_S=np.concatenate([part + start for tree, start in zip(trees, starts, strict=False) for part in tree.nodes]),
        targets_S=np.concatenate([part for tree in trees for part in tree.targets]),
        sequences_S=np.concatenate([part for tree in trees for part in tree.sequences]),
    )


def _group(pieces: Sequence[tuple[Ints, Ints]]) -> Iterator[list[tuple[Ints, Ints]]]:
    """Pieces of similar size together."""
    members: list[tuple[Ints, Ints]] = []
    pairs = num_queries = 0
    for queries, keys in sorted(pieces, key=lambda piece: (len(piece[0]) // 8, len(piece[1]))):
        widest, longest = max(num_queries, len(queries)), max(len(keys), *(len(other) for _, other in members), 0) if members else len(keys)
        padded = (len(members) + 1) * widest * longest
        if members and (padded > MAX_PAIRS or padded > _MAX_PADDING * (pairs + len(queries) * len(keys))):
            yield members
            members, pairs, widest = [], 0, len(queries)
        members.append((queries, keys))
        pairs, num_queries = pairs + len(queries) * len(keys), widest
    if members:
        yield members


def _pad(members: Sequence[tuple[Ints, Ints]]) -> Group:
    queries_GL = np.zeros((len(members), max(len(queries) for queries, _ in members)), np.int64)
    longest = max(len(keys) for _, keys in members)
    keys_GK = np.zeros((len(members), -(-longest // KEY_BLOCK) * KEY_BLOCK), np.int64)
    for row, (queries, keys) in enumerate(members):
        queries_GL[row, : len(queries)] = queries
        keys_GK[row, : len(keys)] = keys
    return Group(queries_GL=queries_GL, keys_GK=keys_GK)
