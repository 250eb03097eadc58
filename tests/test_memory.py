"""The memory estimate: what autograd keeps, what fits and what is refused. Measured peaks are in tests/benchmarks/memory.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nas.architecture import Architecture, read_architecture
from nas.cost import count_parameters
from nas.errors import DoesNotFit
from nas.families import FAMILIES
from nas.memory import Capacity, TeacherMemory, Training, fit_training, kept_per_token, least_training_memory, training_memory
from nas.shape import Shape
from tests.test_cost import LLAMA_31_8B

GIB = 2**30
LLAMA = read_architecture(LLAMA_31_8B)
HALF = Shape(num_hidden_layers=32, hidden_size=3072, intermediate_size=9216, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
"""Minitron's width-pruned 4B, arXiv 2408.11796 table 3."""
TEACHER = TeacherMemory(architecture=LLAMA, dtype="bfloat16")
WANTED = Training(sequence_length=4096, batch_size=16, micro_batch_size=16, dtype="bfloat16", device="cuda")


def card(gib: int, *, host_gib: int = 256) -> Capacity:
    return Capacity(device="cuda", device_bytes=gib * GIB, host_bytes=host_gib * GIB)


def kept_by_autograd(architecture: Architecture, *, config: dict[str, Any], layers: int, dtype: str, tokens_BT: torch.Tensor) -> int:
    """Bytes of all tensors that the backward pass of the layers holds, each storage once, weights and their low-precision copies left out."""
    values = {**config, "num_hidden_layers": layers}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), attn_implementation=architecture.family.attention).eval()
    weights = {tuple(weight.shape) for weight in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in weights and tuple(tensor.shape)[::-1] not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != "float32"):
        _ = model.base_model(input_ids=tokens_BT, use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_layer_keeps_what_autograd_keeps(model_type, dtype):
    sizes = {"hidden_size": 96, "intermediate_size": 250, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12, "vocab_size": 61}
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if FAMILIES[model_type].expert_keys:
        sizes |= {"intermediate_size": 248, "moe_intermediate_size": 248, "num_local_experts": 6, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(model_type, **sizes, **tokens, num_hidden_layers=4, max_position_embeddings=256).to_dict()
    config = {key: value for key, value in config.items() if key not in ("layer_types", "no_rope_layers")}
    architecture = read_architecture(config)
    tokens_BT = torch.randint(0, 61, (3, 128))

    less, more = (kept_by_autograd(architecture, config=config, layers=layers, dtype=dtype, tokens_BT=tokens_BT) for layers in (2, 4))
    found = kept_per_token(architecture, architecture.shape, dtype=dtype, sequence_length=128)

    assert found == pytest.approx((more - less) / 2 / tokens_BT.numel(), rel=0.15)


def test_an_8b_teacher_with_a_4b_student_on_one_80_gb_card_is_a_plan():
    assert 4.4e9 < count_parameters(LLAMA, HALF).total < 4.6e9
    plain = training_memory(LLAMA, HALF, training=WANTED, teacher=TEACHER)
    assert plain.device_bytes > 80 * GIB

    fitting, estimate = fit_training(LLAMA, HALF, wanted=WANTED, teacher=TEACHER, capacity=card(80))

    assert estimate.device_bytes <= 0.95 * 80 * GIB
    assert fitting.moments == "offloaded"
    assert estimate.host_bytes == 8 * count_parameters(LLAMA, HALF).total


def test_without_host_memory_the_moments_become_bfloat16_and_signals_replace_the_teacher():
    stored = replace(TEACHER, stored=True)
    fitting, _ = fit_training(LLAMA, HALF, wanted=WANTED, teacher=stored, capacity=card(80, host_gib=16))
    assert (fitting.moments, fitting.checkpoint_activations) == ("bfloat16", True)
    with pytest.raises(DoesNotFit):
        fit_training(LLAMA, HALF, wanted=WANTED, teacher=TEACHER, capacity=card(80, host_gib=16))


def test_a_roomy_device_changes_nothing():
    fitting, _ = fit_training(LLAMA, HALF, wanted=WANTED, teacher=TEACHER, capacity=card(4000))
    assert fitting == WANTED


def test_the_refusal_names_every_component_and_its_bytes():
    with pytest.raises(DoesNotFit) as refused:
        fit_training(LLAMA, HALF, wanted=WANTED, teacher=TEACHER, capacity=card(24))
    text = str(refused.value)
    for component in ("student weights (float32)", "gradients", "teacher weights (bfloat16)", "24.481 GB on the cuda device"):
        assert component in text
    assert f"{4 * count_parameters(LLAMA, HALF).total / 1e9:,.3f} GB" in text


def test_smaller_passes_come_before_checkpointing_and_that_before_parked_moments():
    seen = []
    for gib in range(400, 20, -2):
        try:
            fitting, estimate = fit_training(LLAMA, HALF, wanted=WANTED, teacher=TEACHER, capacity=card(gib))
        except DoesNotFit:
            break
        assert estimate == training_memory(LLAMA, HALF, training=fitting, teacher=TEACHER)
        step = (fitting.moments, fitting.checkpoint_activations)
        if step not in seen:
            seen.append(step)
    assert seen[:2] == [("float32", False), ("float32", True)]
    assert seen[-1] == ("offloaded", True)


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch_size": 8},
        {"checkpoint_activations": True},
        {"moments": "bfloat16"},
        {"moments": "offloaded"},
        {"num_shards": 4},
        {"dtype": "bfloat16"},
        {"optimizer": "muon"},
    ],
)
def test_every_setting_that_saves_memory_saves_some(change):
    wanted = Training(sequence_length=2048, batch_size=16, micro_batch_size=16, device="cuda")
    less = training_memory(LLAMA, HALF, training=replace(wanted, **change), teacher=None)
    assert less.device_bytes < training_memory(LLAMA, HALF, training=wanted, teacher=None).device_bytes


def test_the_least_is_what_the_smallest_card_that_fits_has():
    least = least_training_memory(LLAMA, HALF, wanted=WANTED, teacher=TEACHER)
    room = Capacity(device="cuda", device_bytes=int(least.device_bytes / 0.95) + 1, host_bytes=10**12)
    fit_training(LLAMA, HALF, wanted=WANTED, teacher=TEACHER, capacity=room)
    with pytest.raises(DoesNotFit):
        fit_training(LLAMA, HALF, wanted=WANTED, teacher=TEACHER, capacity=replace(room, device_bytes=room.device_bytes - 10**6))
