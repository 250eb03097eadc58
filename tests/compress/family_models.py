"""Small random models of each kind of each family. A family that someone adds is one entry more in KINDS; the first of a family is its plain one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nas.architecture import read_architecture
from nas.compress.experts import by_file_names

VOCAB_SIZE = 61

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LOCAL_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, tied, one KV head, odd sizes": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "hidden_size": 27,
        "intermediate_size": 19,
        "head_dim": 10,
    },
    "llama, biases, as many KV heads as heads": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "llama 3.1, scaled rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral, odd width, sliding window": {"model_type": "mistral", "hidden_size": 23, "sliding_window": 6},
    "qwen2, padded vocabulary": {"model_type": "qwen2", "vocab_size": 64},
    "qwen2, sliding from a layer on": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3, biases": {"model_type": "qwen3", "attention_bias": True, "num_key_value_heads": 1},
    "gemma2": {"model_type": "gemma2", "layer_types": _LOCAL_GLOBAL, "sliding_window": 6, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 5.0},
    "gemma3": {"model_type": "gemma3_text", "layer_types": _LOCAL_GLOBAL, "sliding_window": 6, "query_pre_attn_scalar": 11},
    "gemma3, untied, one KV head": {"model_type": "gemma3_text", "tie_word_embeddings": False, "num_key_value_heads": 1, "sliding_window_pattern": 2},
    "olmo2": {"model_type": "olmo2"},
    "olmo2, biases, tied": {"model_type": "olmo2", "attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "phi3": {"model_type": "phi3"},
    "phi3, a part of each head rotated, tied": {
        "model_type": "phi3",
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "phi3, long rope": {
        "model_type": "phi3",
        "hidden_size": 32,
        "original_max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]},
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6},
    "smollm3, biases, untied": {
        "model_type": "smollm3",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "no_rope_layers": [1, 1, 0, 1],
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.5,
        "tie_word_embeddings": True,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 24},
    "mixtral, tied, one expert each, sliding window": {
        "model_type": "mixtral",
        "num_local_experts": 3,
        "intermediate_size": 16,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "sliding_window": 6,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "qwen3_moe, probabilities as they are, biases, tied": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": False,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "nemotron": {"model_type": "nemotron"},
    "nemotron, biases, tied": {"model_type": "nemotron", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_size": 23},
}


PLAIN = list({values["model_type"]: kind for kind, values in reversed(KINDS.items())}.values())[::-1]
"""The first kind of each family."""


def random_model(kind: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Every weight, gain and bias is far from zero, so that whatever is cut by mistake is seen in the logits."""
    config = AutoConfig.for_model(**{**SIZES, **KINDS[kind], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.25, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def file_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's own weights under the checkpoint's names: what is written into them is written into the model."""
    return by_file_names(model.state_dict(), architecture=read_architecture(model.config.to_dict()))
