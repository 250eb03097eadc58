from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nas.search.costs import closed_costs, measured_costs
from nas.spec import LatencySpec, WorkloadSpec


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def test_closed_costs_are_those_of_the_tensors_there_are(model: LlamaForCausalLM) -> None:
    """Weights by their bytes, the cache by the bytes that transformers holds, at the context of the model where none is named."""
    with torch.no_grad():
        cache = model(torch.zeros(3, 32, dtype=torch.int64), use_cache=True).past_key_values
    cached = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    parameters = sum(parameter.numel() for parameter in model.parameters())

    costs = closed_costs(model, workload=WorkloadSpec(batch_size=3, dtype="float32"))

    assert costs["parameters"] == parameters
    assert costs["memory_bytes"] == 4 * parameters + cached
    assert 2 * (parameters - 64 * 16) < costs["flops_per_token"] < 2 * parameters + 4 * 32 * 16 * 2 + 1


def test_every_named_workload_is_timed(model: LlamaForCausalLM) -> None:
    short, long = LatencySpec(name="short", prompt_tokens=1, new_tokens=2), LatencySpec(name="long", prompt_tokens=16, new_tokens=4, batch_size=64)

    costs = measured_costs(model, workloads=(short, long), dtype="float32")

    assert costs.keys() == {"prefill_ms:short", "decode_ms:short", "prefill_ms:long", "decode_ms:long"}
    assert costs["prefill_ms:long"] > costs["prefill_ms:short"] > 0
