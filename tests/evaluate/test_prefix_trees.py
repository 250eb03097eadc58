"""A row that is a tree holds every sequence that went into it, each token once, and nothing sees what it would not see alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.evaluate import prefix_trees
from nas.evaluate.prefix_trees import Batch, plan_batches

sequences = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=12)


def planned(tokens: list[list[int]], *, batch_tokens: int, num_scored: list[int] | None = None) -> list[Batch]:
    arrays = [np.asarray(one, np.int64) for one in tokens]
    return plan_batches(arrays, num_scored=num_scored or [len(one) - 1 for one in tokens], batch_tokens=batch_tokens)


def seen_by(batch: Batch, node: int) -> list[int]:
    """Tokens that a node sees, itself last."""
    place = int(batch.places_T[node])
    for group in batch.groups:
        if place < group.queries_GL.size:
            row, column = divmod(place, group.queries_GL.shape[1])
            assert group.queries_GL[row, column] == node
            seen = group.keys_GK[row, : batch.depths_T[node] + 1]
            assert seen[-1] == node
            assert batch.depths_T[seen].tolist() == list(range(len(seen)))
            return [int(token) for token in batch.tokens_T[seen]]
        place -= group.queries_GL.size
    raise AssertionError(f"node {node} is no query")


@given(sequences, st.integers(1, 40), st.sampled_from([2, 64]))
@settings(max_examples=200, deadline=None)
def test_every_scored_token_is_predicted_from_exactly_what_stands_before_it(tokens: list[list[int]], batch_tokens: int, max_queries: int) -> None:
    found: dict[int, list[tuple[list[int], int]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_trees, "MAX_QUERIES", max_queries)
        batches = planned(tokens, batch_tokens=batch_tokens)
    for batch in batches:
        for node, target, sequence in zip(batch.nodes_S, batch.targets_S, batch.sequences_S, strict=True):
            found.setdefault(int(sequence), []).append((seen_by(batch, int(node)), int(target)))
    for index, one in enumerate(tokens):
        assert sorted(found[index]) == sorted((one[:place], one[place]) for place in range(1, len(one)))


@given(sequences, st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_a_batch_is_no_larger_than_asked_unless_one_sequence_is(tokens: list[list[int]], batch_tokens: int) -> None:
    longest = max(map(len, tokens)) - 1
    assert all(len(batch.tokens_T) <= max(batch_tokens, longest) for batch in planned(tokens, batch_tokens=batch_tokens))


def test_choices_share_their_context_and_equal_sequences_everything() -> None:
    context = [5] * 50
    tokens = [[*context, choice, 1] for choice in (1, 2, 3, 3)]
    (batch,) = planned(tokens, batch_tokens=1000, num_scored=[2] * 4)
    assert len(batch.tokens_T) == 53


def test_only_the_asked_tokens_are_scored() -> None:
    (batch,) = planned([[4, 5, 6, 7]], batch_tokens=10, num_scored=[1])
    assert (batch.nodes_S.tolist(), batch.targets_S.tolist()) == ([2], [7])
