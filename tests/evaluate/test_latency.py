"""Latency is measured on the model as it is, and impossible measurements are refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nas.errors import InvalidSpec
from nas.evaluate.latency import Latency, measure_latency


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config)


def test_medians_lie_within_their_ranges(model: LlamaForCausalLM) -> None:
    latency = measure_latency(model, prompt_tokens=16, new_tokens=4, batch_size=2, repeats=3)
    for median, (low, high) in (
        (latency.prefill_seconds, latency.prefill_seconds_range),
        (latency.decode_seconds_per_token, latency.decode_seconds_per_token_range),
    ):
        assert 0 < low <= median <= high
    assert (latency.device, latency.peak_memory_bytes, latency.num_threads) == ("cpu", None, torch.get_num_threads())


def test_long_prompt_takes_longer_to_prefill(model: LlamaForCausalLM) -> None:
    short, long = (measure_latency(model, prompt_tokens=tokens, new_tokens=2, batch_size=4, repeats=3) for tokens in (8, 500))
    assert long.prefill_seconds_range[0] > short.prefill_seconds_range[0]


def test_decoding_with_the_cache_gives_the_tokens_of_decoding_without(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    forward = model.forward

    def recording_forward(**inputs: torch.Tensor) -> object:
        seen.append(inputs["input_ids"])
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", recording_forward)
    measure_latency(model, prompt_tokens=8, new_tokens=6, batch_size=2, repeats=1)
    monkeypatch.undo()
    ids = torch.cat(seen[-6:], dim=1)
    expected = model.generate(ids[:, :8], attention_mask=torch.ones(2, 8), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ids, expected)


def test_model_and_random_state_are_left_as_they_were(model: LlamaForCausalLM) -> None:
    model.train()
    state = torch.get_rng_state()
    measure_latency(model, prompt_tokens=4, new_tokens=2, batch_size=1, repeats=1)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    model.eval()


def test_latency_survives_json(model: LlamaForCausalLM) -> None:
    latency = measure_latency(model, prompt_tokens=4, new_tokens=2, batch_size=1, repeats=1)
    assert Latency.from_dict(json.loads(json.dumps(latency.as_dict()))) == latency


def test_impossible_measurement_names_every_number(model: LlamaForCausalLM) -> None:
    with pytest.raises(
        InvalidSpec, match=r"new_tokens: expected an integer of at least 2, got 1; repeats: .* got 0; prompt_tokens, new_tokens: .* 512, got 601"
    ):
        measure_latency(model, prompt_tokens=600, new_tokens=1, batch_size=1, repeats=0)
