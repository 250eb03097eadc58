"""The demo's teacher: a small Llama (grouped query attention, tied embeddings), trained on the demo's corpus in about two minutes.

It uses the product's own packing, training loop and checkpoint writer; only the numbers are here, and they were found by trial: every skill that
the tasks ask for appears by 1.3 million tokens (three seeds), and half the parameters are too few for some shapes at 50,000 tokens of distillation.
Knows nothing of tasks and search. Keeping the result for the next run is its caller's business.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nas.compress.blocks import Part, build_blocks
from nas.compress.distillation import Progress, distil
from nas.compress.objective import NextToken
from nas.compress.teacher import write_checkpoint
from nas.compress.train_plan import TrainPlan
from nas.demo.language import build_tokenizer

SEED = 0
SEQUENCE_LENGTH = 128
TOKENS = 1_800_000
PLAN = TrainPlan(
    tokens=TOKENS,
    learning_rate=2e-3,
    batch_size=8,
    warmup_tokens=50_000,
    decay_tokens=450_000,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.98,
    seed=SEED,
)


def train_teacher(folder: Path, *, corpus: Path, report: Callable[[Progress], None] = lambda progress: None) -> Path:
    """Train on the jsonl file `corpus`, write a Hugging Face checkpoint with its tokenizer into `folder` and return it.

    The same corpus, CPU and number of torch threads give the same bits; torch's random state is left as it was.
    """
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    model = _random_model(vocab_size=len(tokenizer), end_token_id=tokenizer.eos_token_id)
    with tempfile.TemporaryDirectory() as scratch:
        blocks = build_blocks(
            [Part(name=corpus.stem, files=(corpus,))],
            tokenizer=tokenizer,
            sequence_length=SEQUENCE_LENGTH,
            train_tokens=TOKENS,
            calibration_tokens=SEQUENCE_LENGTH,
            validation_tokens=SEQUENCE_LENGTH,
            seed=SEED,
            folder=Path(scratch),
        )
        distil(model, objective=NextToken(), blocks_NT=blocks.train_NT, plan=PLAN, report=report)
    write_checkpoint(model.state_dict(), config=model.config.to_dict(), tokenizer_from=folder, folder=folder)
    return folder


def _random_model(*, vocab_size: int, end_token_id: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=12,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,  # 1 / sqrt(hidden_size): at 0.04 facts and people appeared up to twice as late
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        bos_token_id=end_token_id,
        eos_token_id=end_token_id,
        pad_token_id=end_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return LlamaForCausalLM(config)
