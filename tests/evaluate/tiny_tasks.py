"""Tasks of every kind over a vocabulary of fifteen words, and a tokenizer and random models that read it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.word_tokenizer import word_tokenizer

WORDS = ["the", "cat", "dog", "sun", "sat", "ran", "shone", "on", "a", "mat", "hill", "day", "red", "big", "old"]
NUM_DOCUMENTS = 15
DATA = "dataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
TASKS = {
    "choice": 'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_choice: choices\ndoc_to_target: gold\n'
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    # As BLiMP: two sentences without a context.
    "pair": 'output_type: multiple_choice\ndoc_to_text: ""\ntarget_delimiter: ""\ndoc_to_choice: "{{[choices[2], choices[1]]}}"\ndoc_to_target: 0\n'
    "metric_list: [{metric: acc}]\n",
    # As Winogrande: the choices stand in the context, and doc_to_text says which is right.
    "fill": "output_type: multiple_choice\ndoc_to_text: \"{{gold}}\"\ndoc_to_choice: \"{{[text, choices[0] + ' ' + text, text + ' ' + choices[1]]}}\"\n"
    'doc_to_target: "{{choices[2]}}"\nmetric_list: [{metric: acc}]\n',
    "surprise": 'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_choice: choices\ndoc_to_target: gold\n'
    "metric_list: [{metric: acc_mutual_info}, {metric: exact_match}]\n",
    "last_word": 'output_type: loglikelihood\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{\' \' + choices[0]}}"\n'
    "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc}]\n",
    "page": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n",
    "answer": 'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{choices[0]}}"\n'
    "generation_kwargs: {until: [mat], max_gen_toks: 4}\nmetric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
}


def tiny_model(*, seed: int = 0, model_type: str = "llama") -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(WORDS) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager" if model_type == "gemma2" else "sdpa").eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(WORDS)


def write_tasks(folder: Path) -> Path:
    """The YAML of all TASKS, and their rows."""
    generator = random.Random(3)
    rows = [
        {
            "text": " ".join(generator.choices(WORDS, k=generator.randint(3, 20))),
            "choices": [" ".join(generator.choices(WORDS, k=length)) for length in (1, 2, 3)],
            "gold": generator.randrange(3),
        }
        for _ in range(NUM_DOCUMENTS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{DATA}{body}")
    return folder
