"""Where the steps of a search leave what the next ones read, and under which key a prepared folder is shared. Light: no torch."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.architecture import read_architecture
from nas.space import build_spaces
from nas.spec import SearchSpec, dump_spec, objective_metrics

PREPARED, BLOCKS, SORTED, SPLITS, PACKS = "prepared.json", "blocks", "sorted", "splits.json", "packs"
SIGNALS, CORRECTED, MOMENTS = "signals", "teacher", "moments"
"""Names inside a prepared folder."""
STUDENT, PROBE, RECONSTRUCTION = "student", "probe", "reconstruction.json"
"""Names inside a trial's folder: the model of the last rung, its logits, which a fresh process must reproduce, and how the trial's start was reconstructed."""
BUNDLE = "bundle"
"""The folder of a winner's bundle; its tar lies beside it."""
FORMAT = 2
"""Raise it when the content of a prepared folder changes meaning, so that old ones are not reused."""


def trial_folder(search: Path, *, number: int) -> Path:
    """Everything of one trial, in its search's folder."""
    return search / "trials" / str(number)


def rung_folder(trial: Path, *, rung: int) -> Path:
    """The training checkpoint of one trained rung."""
    return trial / f"rung{rung}"


def clear_below(trial: Path, *, rung: int) -> None:
    """Drop the checkpoints that no later step of the trial needs, once the rung's result is safe."""
    for lower in range(1, rung):
        shutil.rmtree(rung_folder(trial, rung=lower), ignore_errors=True)


def searched_depths(spec: SearchSpec, *, inputs: Mapping[str, Any]) -> list[int]:
    """Every number of layers that a trial may have, ascending: the prepare step selects layers for each."""
    depths = {shape.num_hidden_layers for shape in spec.shapes}
    for space in build_spaces(spec, architecture=read_architecture(inputs["teacher"]["config"])):
        depths |= {*space.axes["num_hidden_layers"], *(shape.num_hidden_layers for shape in space.anchors().values() if spec.controls.anchors)}
    return sorted(depths)


def prepared_key(spec: SearchSpec, *, inputs: Mapping[str, Any]) -> str:
    """Digest of all that the prepare step depends on; equal keys share one folder."""
    values = dump_spec(spec)
    metrics = objective_metrics(spec, inputs=inputs)
    depends = {
        "format": FORMAT,
        "teacher": inputs["teacher"]["digest"],
        "corpora": [[corpus["digest"], part.weight] for part, corpus in zip(spec.corpus.parts, inputs["corpora"], strict=True)],
        "corpus": {name: value for name, value in values["corpus"].items() if name != "parts"},
        "tasks": [[task.name, entry["digest"], metrics[task.name], task.num_fewshot] for task, entry in zip(spec.tasks, inputs["tasks"], strict=True)],
        "depths": searched_depths(spec, inputs=inputs),
        "tokens": spec.rungs.tokens(spec.rungs.num_trained),
        "seed": spec.seed,
        "compression": values["compression"],
        "weights": [task.weight for task in spec.tasks] if spec.compression.depth == "task" else None,
        "documents": [spec.evaluation.documents_per_task, spec.evaluation.held_out_documents],
        "dtype": spec.distillation.dtype,
        "signals": [spec.distillation.signals, spec.distillation.top_k, spec.distillation.max_signal_bytes, spec.distillation.hidden_states == "all"],
        "correction": _correction(values) if spec.compression.teacher_correction_tokens else None,
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]


def prepared_lease(key: str) -> str:
    """Name of the lease under which a prepared folder is filled, or deleted."""
    return f"prepared/{key}"


def _correction(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of the teacher's correction, which is that of the students: without a correction it changes nothing that is prepared."""
    return {name: value for name, value in values["distillation"].items() if name not in ("signals", "top_k", "max_signal_bytes", "hidden_states")}
