from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nas.architecture import Architecture, read_architecture
from nas.compress.experts import by_file_names
from nas.compress.teacher import checkpoint_weights
from nas.cost import SignalChoice, Workload, choose_signals, count_costs, count_parameters, flops_per_token, signal_bytes_per_token, weight_bytes
from nas.errors import InvalidSpec
from nas.families import FAMILIES
from nas.shape import Shape

STORIES_260K = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}


def public(
    model_type: str, *, layers: int, hidden: int, mlp: int, heads: tuple[int, int], vocab: int, tied: bool = False, head_dim: int | None = None
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


LLAMA_31_8B = public("llama", layers=32, hidden=4096, mlp=14336, heads=(32, 8), vocab=128256)
PUBLISHED = {
    "stories260K": (STORIES_260K, 260_032),
    "Llama-3.1-8B": (LLAMA_31_8B, 8_030_261_248),
    "Mistral-7B-v0.1": (public("mistral", layers=32, hidden=4096, mlp=14336, heads=(32, 8), vocab=32000), 7_241_732_096),
    "Qwen2.5-0.5B": (public("qwen2", layers=24, hidden=896, mlp=4864, heads=(14, 2), vocab=151936, tied=True), 494_032_768),
    "Qwen2.5-7B": (public("qwen2", layers=28, hidden=3584, mlp=18944, heads=(28, 4), vocab=152064), 7_615_616_512),
    "Qwen3-8B": (public("qwen3", layers=36, hidden=4096, mlp=12288, heads=(32, 8), head_dim=128, vocab=151936), 8_190_735_360),
    "gemma-2-2b": (public("gemma2", layers=26, hidden=2304, mlp=9216, heads=(8, 4), head_dim=256, vocab=256000, tied=True), 2_614_341_888),
    "gemma-3-1b": (public("gemma3_text", layers=26, hidden=1152, mlp=6912, heads=(4, 1), head_dim=256, vocab=262144, tied=True), 999_885_952),
    "OLMo-2-1124-7B": (public("olmo2", layers=32, hidden=4096, mlp=11008, heads=(32, 32), vocab=100352), 7_298_617_344),
    "Phi-3-mini-4k": (public("phi3", layers=32, hidden=3072, mlp=8192, heads=(32, 32), vocab=32064), 3_821_079_552),
    "SmolLM3-3B": (public("smollm3", layers=36, hidden=2048, mlp=11008, heads=(16, 4), vocab=128256, tied=True), 3_075_098_624),
    "Mixtral-8x7B-v0.1": (
        {**public("mixtral", layers=32, hidden=4096, mlp=14336, heads=(32, 8), vocab=32000), "num_local_experts": 8, "num_experts_per_tok": 2},
        46_702_792_704,
    ),
    "Qwen3-30B-A3B": (
        {
            **public("qwen3_moe", layers=48, hidden=2048, mlp=6144, heads=(32, 4), head_dim=128, vocab=151936),
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
        30_532_122_624,
    ),
    "granite-3.0-2b": (public("granite", layers=40, hidden=2048, mlp=8192, heads=(32, 8), vocab=49155, tied=True), 2_533_531_648),
}


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    groups = draw(st.integers(1, 4))
    heads = groups * draw(st.integers(1, 4))
    shape = Shape(
        num_hidden_layers=draw(st.integers(1, 3)),
        hidden_size=heads * draw(st.integers(1, 6)),
        intermediate_size=draw(st.integers(1, 70)),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=2 * draw(st.integers(1, 8)),
    )
    model_type = draw(st.sampled_from(sorted(FAMILIES)))
    experts = draw(st.integers(1, 5)) if FAMILIES[model_type].expert_keys else None
    return Architecture(
        model_type=model_type,
        shape=dataclasses.replace(shape, num_experts=experts),
        num_experts_per_tok=experts and draw(st.integers(1, experts)),
        vocab_size=draw(st.integers(1, 300)),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


def build(architecture: Architecture) -> PreTrainedModel:
    config = AutoConfig.for_model(
        architecture.model_type,
        **architecture.config_values(architecture.shape),
        vocab_size=architecture.vocab_size,
        tie_word_embeddings=architecture.tie_word_embeddings,
        attention_bias=architecture.attention_bias,
        mlp_bias=architecture.mlp_bias,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


@settings(max_examples=40, deadline=None)
@given(architectures())
def test_the_closed_form_equals_numel_of_the_model(architecture):
    model = build(architecture)
    embedding = {id(weight): weight.numel() for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}

    count = count_parameters(architecture, architecture.shape)

    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.embedding == sum(embedding.values())
    assert count.non_embedding == count.total - count.embedding


@settings(max_examples=40, deadline=None)
@given(architectures())
def test_the_table_names_the_tensors_of_the_model(architecture):
    sides = {
        name: weight.lengths(architecture.sizes(architecture.shape))
        for name, weight, _, _ in checkpoint_weights(architecture, num_hidden_layers=architecture.shape.num_hidden_layers)
    }
    parameters = by_file_names(dict(build(architecture).named_parameters()), architecture=architecture)

    assert sides == {name: tuple(parameter.shape) for name, parameter in parameters.items()}


@pytest.mark.parametrize(("config", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_the_parameters_of_public_models_are_what_their_cards_say(config, expected):
    architecture = read_architecture(config)

    assert count_parameters(architecture, architecture.shape).total == expected


def test_a_token_passes_through_its_own_experts_only():
    mixtral, qwen = (read_architecture(PUBLISHED[name][0]) for name in ("Mixtral-8x7B-v0.1", "Qwen3-30B-A3B"))

    # 12.9B of 46.7B (arXiv 2401.04088, table 1: 13B); 3.35B of 30.5B (the card of Qwen3-30B-A3B: 3.3B).
    assert round(count_parameters(mixtral, mixtral.shape).active / 1e9, 1) == 12.9
    assert round(count_parameters(qwen, qwen.shape).active / 1e9, 1) == 3.4
    expert = 3 * 4096 * 14336 * 32
    assert count_parameters(mixtral, mixtral.shape).active == 46_702_792_704 - 6 * expert
    one_less = dataclasses.replace(mixtral.shape, num_experts=7)
    assert count_parameters(mixtral, mixtral.shape).active - count_parameters(mixtral, one_less).active == 4096 * 32
    assert flops_per_token(mixtral, mixtral.shape, context_length=0) == 2 * (46_702_792_704 - 6 * expert - 32000 * 4096)


def test_tied_embeddings_are_counted_once():
    tied, untied = (read_architecture({**STORIES_260K, "tie_word_embeddings": tie}) for tie in (True, False))

    assert count_parameters(untied, untied.shape).total - count_parameters(tied, tied.shape).total == 512 * 64
    assert count_parameters(tied, tied.shape).non_embedding == count_parameters(untied, untied.shape).non_embedding


def test_bytes_follow_from_the_numbers():
    architecture = read_architecture(LLAMA_31_8B)

    def memory(**load: int) -> int:
        workload = Workload(**{"batch_size": 1, "context_length": 1, "weight_bytes": 2, "cache_bytes": 2} | load)
        return count_costs(architecture, architecture.shape, workload=workload)["memory_bytes"]

    # Keys and values of 32 layers with 8 heads of 128, two bytes each: 128 KiB per token, the figure of the Llama 3 paper.
    assert memory() == 2 * 8_030_261_248 + 131_072
    assert memory(batch_size=3, context_length=5, cache_bytes=1) == 2 * 8_030_261_248 + 15 * 65_536
    assert weight_bytes(architecture, architecture.shape, bytes_per_element=2) == 2 * 8_030_261_248


def test_flops_are_two_per_multiplied_weight_plus_attention():
    architecture = read_architecture(LLAMA_31_8B)
    without_look_up = 8_030_261_248 - 128256 * 4096

    assert flops_per_token(architecture, architecture.shape, context_length=0) == 2 * without_look_up
    assert flops_per_token(architecture, architecture.shape, context_length=1000) == 2 * without_look_up + 4 * 1000 * 4096 * 32


@pytest.mark.reference
def test_the_closed_form_equals_numel_of_the_published_file():
    if not os.environ.get("NAS_REFERENCE"):
        pytest.skip("NAS_REFERENCE is not set: no reference models")
    from safetensors import safe_open

    folder = Path(os.environ["NAS_REFERENCE"]) / "models" / "stories260K"
    architecture = read_architecture(json.loads((folder / "config.json").read_text()))
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        numel = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118 (safe_open is not a mapping)

    assert count_parameters(architecture, architecture.shape).total == numel


LLAMA_8B = {"hidden_size": 4096, "vocab_size": 128_256, "bytes_per_element": 2, "top_k": 512}


def choose(wanted: str, *, max_bytes: int, free_bytes: int = 2**60) -> SignalChoice:
    return choose_signals(wanted, train_tokens=10**8, validation_tokens=10**6, max_bytes=max_bytes, free_bytes=free_bytes, **LLAMA_8B)  # type: ignore[arg-type]


def test_signals_take_the_bytes_that_are_promised() -> None:
    assert signal_bytes_per_token("exact", hidden_size=4096, bytes_per_element=2, top_k=512) == 8192
    assert signal_bytes_per_token("top_k", hidden_size=4096, bytes_per_element=2, top_k=512) == 3076
    validation_and_head = 8192 * (10**6 + 128_256)
    assert choose("exact", max_bytes=2**60).bytes == 8192 * 10**8 + validation_and_head
    assert choose("top_k", max_bytes=2**60).bytes == 3076 * 10**8 + validation_and_head


@pytest.mark.parametrize(("gigabytes", "kind"), [(900, "exact"), (500, "top_k"), (300, None)])
def test_auto_takes_the_first_kind_that_fits_both_budget_and_disk(gigabytes: int, kind: str | None) -> None:
    assert choose("auto", max_bytes=gigabytes * 10**9).kind == kind
    assert choose("auto", max_bytes=10**18, free_bytes=gigabytes * 10**9).kind == kind
    assert "teacher runs beside" in choose("auto", max_bytes=300 * 10**9).reason


def test_a_kind_that_is_asked_for_is_refused_where_it_does_not_fit() -> None:
    with pytest.raises(
        InvalidSpec, match=r"distillation.signals: expected top_k 316,842,673,152 bytes for 100,000,000 training tokens, got 7 \(free on disk\)"
    ):
        choose("top_k", max_bytes=10**12, free_bytes=7)
    assert choose("off", max_bytes=0).kind is None
