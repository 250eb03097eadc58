"""Shared prefixes change no probability, in any family."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from nas.evaluate.likelihoods import sequence_likelihoods
from nas.families import FAMILIES
from tests.compress.family_models import KINDS, PLAIN, random_model


def model_of(kind: str) -> PreTrainedModel:
    model = random_model(kind)
    model.set_attn_implementation(FAMILIES[KINDS[kind]["model_type"]].attention)  # as load_model does
    return model


def questions(*, num_tokens: int, seed: int = 1) -> tuple[list[np.ndarray], list[int]]:
    """Contexts with several choices each, one of them given twice, and single sequences."""
    generator = random.Random(seed)

    def draw(length: int) -> list[int]:
        return generator.choices(range(60), k=length)

    sequences, scored = [], []
    for _ in range(4):
        context, same = draw(generator.randint(2, num_tokens - 6)), draw(2)
        for choice in (draw(1), draw(3), [*same, *draw(2)], [*same, *draw(1)], same, same):
            sequences.append(np.asarray(context + choice))
            scored.append(len(choice))
    page = draw(num_tokens)
    return [*sequences, np.asarray(page)], [*scored, len(page) - 1]


@torch.no_grad()
def one_by_one(model: PreTrainedModel, sequences: list[np.ndarray], scored: list[int]) -> tuple[list[float], list[bool]]:
    nats, greedy = [], []
    for sequence, count in zip(sequences, scored, strict=True):
        tokens = torch.from_numpy(sequence)[None]
        log_probabilities = model(tokens[:, :-1]).logits.float().log_softmax(-1)[0, -count:]
        nats.append(float(log_probabilities.gather(1, tokens[0, -count:, None]).sum()))
        greedy.append(bool((log_probabilities.argmax(-1) == tokens[0, -count:]).all()))
    return nats, greedy


FEW = {(kind, 30) for kind in PLAIN}
"""What every change is tested on: each family once, with sequences longer than a window."""


@pytest.mark.parametrize(("kind", "num_tokens"), [pytest.param(*one, marks=() if one in FEW else pytest.mark.slow) for one in product(KINDS, (12, 30))])
def test_likelihoods_are_those_of_one_pass_per_sequence(kind: str, num_tokens: int) -> None:
    model = model_of(kind)
    sequences, scored = questions(num_tokens=num_tokens)
    found = sequence_likelihoods(model, sequences=sequences, num_scored=scored, batch_tokens=100)
    nats, greedy = one_by_one(model, sequences, scored)
    np.testing.assert_allclose(found.nats_Q, nats, atol=2e-4)
    assert found.is_greedy_Q.tolist() == greedy


def test_batches_change_nothing_but_rounding() -> None:
    model = model_of("llama")
    sequences, scored = questions(num_tokens=30)
    large, small = (sequence_likelihoods(model, sequences=sequences, num_scored=scored, batch_tokens=tokens).nats_Q for tokens in (10**6, 1))
    np.testing.assert_allclose(large, small, atol=1e-4)


def test_log_probabilities_of_a_bfloat16_model_are_float32() -> None:
    model = model_of("llama").to(torch.bfloat16)
    sequences, scored = questions(num_tokens=30)
    nats = sequence_likelihoods(model, sequences=sequences, num_scored=scored, batch_tokens=100).nats_Q
    assert (torch.tensor(nats).to(torch.bfloat16).double() != torch.tensor(nats)).any()
