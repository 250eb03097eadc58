"""Random Llamas in which nothing is zero, and the way from one of them to a sorted teacher on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from nas.compress.depth import layer_damage, select_layers
from nas.compress.importance import Method, measure_importance
from nas.compress.sorting import Order, Sorting, load_sorting, make_order, save_sorted, sort_teacher
from nas.compress.teacher import check_teacher

VOCAB_SIZE = 61
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "grouped, tied": {"num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "grouped, biased": {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "one query per group": {"num_attention_heads": 3, "num_key_value_heads": 3, "mlp_bias": True},
    "one group, odd sizes": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 27, "intermediate_size": 19, "head_dim": 10},
}


def random_tokens(*, rows: int, seed: int = 0, length: int = 24) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_llama(*, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Every weight, gain and bias is far from zero, so that whatever is cut by mistake is seen in the logits."""
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 36,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-3,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        **changes,
    }
    model = LlamaForCausalLM(LlamaConfig(**values)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.25, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    return model


def save_teacher(model: PreTrainedModel, *, folder: Path, max_shard_size: str = "1GB") -> Path:
    """What a user would bring: the files that transformers itself writes."""
    vocabulary = {f"w{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def sort_on_disk(model: PreTrainedModel, *, folder: Path, depths: tuple[int, ...] = (), method: Method = "energy", as_it_is: bool = False) -> Sorting:
    """All steps from a model to its sorted teacher; without `depths`, every depth is selected. `as_it_is`: what comes last is cut first."""
    teacher = check_teacher(save_teacher(model, folder=folder / "teacher"))
    shape = teacher.architecture.shape
    blocks_BT = random_tokens(rows=16, seed=1)
    importance = measure_importance(model, blocks_BT=blocks_BT, method=method, batch_size=8)
    order = make_order(importance, shape)
    if as_it_is:
        orders = {name: getattr(order, name) for name in Order.__slots__}
        order = Order(**{name: None if one is None else torch.arange(one.shape[-1]).expand_as(one) for name, one in orders.items()})
    layers = select_layers(
        num_hidden_layers=shape.num_hidden_layers,
        depths=depths or range(1, shape.num_hidden_layers + 1),
        damage=layer_damage(model, blocks_BT=blocks_BT[:8], batch_size=8),
    )
    state = sort_teacher(model, order=order, architecture=teacher.architecture)
    save_sorted(folder / "sorted", state=state, order=order, importance=importance, config=teacher.config, layers=layers, tokenizer_from=teacher.path)
    return load_sorting(folder / "sorted")


def max_difference(first: PreTrainedModel, second: PreTrainedModel, *, tokens_BT: Tensor | None = None) -> float:
    tokens_BT = random_tokens(rows=4, seed=2) if tokens_BT is None else tokens_BT
    with torch.no_grad():
        return float((first(tokens_BT).logits - second(tokens_BT).logits).abs().max())


@pytest.fixture(name="random_tokens", scope="session")
def _random_tokens() -> Callable[..., Tensor]:
    return random_tokens


@pytest.fixture(name="random_llama", scope="session")
def _random_llama() -> Callable[..., LlamaForCausalLM]:
    return random_llama


@pytest.fixture(name="save_teacher", scope="session")
def _save_teacher() -> Callable[..., Path]:
    return save_teacher


@pytest.fixture(name="sort_on_disk", scope="session")
def _sort_on_disk() -> Callable[..., Sorting]:
    return sort_on_disk


@pytest.fixture(name="max_difference", scope="session")
def _max_difference() -> Callable[..., float]:
    return max_difference


@pytest.fixture(scope="session", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    """A random Llama of each kind in ARCHITECTURES."""
    return random_llama(**ARCHITECTURES[request.param])


@pytest.fixture(scope="session")
def sorting(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Sorting:
    """`model`, sorted, on disk, with layers selected for every depth."""
    return sort_on_disk(model, folder=tmp_path_factory.mktemp("sorting"))
