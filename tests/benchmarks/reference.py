"""The reference material as the benchmarks use it: a real teacher, real text, lm-eval tasks that carry signal at its size."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

_MULTIPLE_CHOICE = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
_PAIRS = {
    "output_type": "multiple_choice",
    "validation_split": "train",
    "doc_to_text": "",
    "doc_to_target": 0,
    "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
PAIR_CONFIGS = ("agreement", "determiner", "pronoun_gender", "verb_form", "word_swap")


def reference_folder() -> Path:
    """The folder of NAS_REFERENCE; ends the program with what to do where there is none."""
    value = os.environ.get("NAS_REFERENCE")
    if not value or not (Path(value) / "models").is_dir():
        sys.exit("NAS_REFERENCE must name the folder with the reference material (models/, data/); it is not set or has none")
    return Path(value)


def write_tasks(folder: Path, *, reference: Path) -> Path:
    """The TinyStories tasks as YAML (JSON is YAML), reading the reference rows where they lie."""
    folder.mkdir(parents=True, exist_ok=True)
    stories = {"dataset_path": str(reference / "data" / "eval" / "tinystories")}
    pairs = {"dataset_path": str(reference / "data" / "eval" / "tinystories_minpairs")}
    tasks = {
        "tinystories_ending": {
            **stories,
            **_MULTIPLE_CHOICE,
            "dataset_name": "ending",
            "validation_split": "validation",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
        },
        "tinystories_lastword": {
            **stories,
            "dataset_name": "lastword",
            "test_split": "test",
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [{"metric": "acc"}],
        },
        "tinystories_bits": {
            **stories,
            "dataset_name": "pages",
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        **{f"minpairs_{name}": {**pairs, **_PAIRS, "dataset_name": name} for name in PAIR_CONFIGS},
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **task}), encoding="utf-8")
    return folder
