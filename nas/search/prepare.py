"""The prepare step: all that is computed once per (teacher, corpus, tasks, method) and reused by every trial and later search.

corpus -> packed blocks; teacher -> importance -> sorted teacher and kept layers per depth; tasks -> the documents of the
rungs and the held-out ones; teacher and random weights scored on both. Knows no store; trial.py reads the folder it leaves.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nas.compress.corpus import Part, build_blocks
from nas.compress.importance import Importance, measure_importance
from nas.compress.manifest import write_json
from nas.compress.sorting import layer_damage, make_order, save_sorted, select_layers, sort_teacher
from nas.compress.teacher import load_model, load_tokenizer
from nas.evaluate.tasks import load_tasks, split_documents
from nas.families import Architecture, read_architecture
from nas.search.trial import BLOCKS, SORTED, SPLITS, load_shared, measure, teacher_dtype
from nas.space import build_space
from nas.spec import SearchSpec, dump_spec, objective_metrics

PREPARED = "prepared.json"
FORMAT = 1
"""Raise it when the content of a prepared folder changes meaning, so that old ones are not reused."""


def prepared_key(spec: SearchSpec, *, inputs: Mapping[str, Any]) -> str:
    """Digest of all that the prepare step depends on; equal keys share one folder."""
    values = dump_spec(spec)
    depends = {
        "format": FORMAT,
        "teacher": inputs["teacher"]["digest"],
        "corpora": [corpus["digest"] for corpus in inputs["corpora"]],
        "tasks": [[task["digest"], task["name"]] for task in inputs["tasks"]],
        "metrics": objective_metrics(spec, inputs=inputs),
        "depths": _depths(spec, inputs=inputs),
        "tokens": spec.rungs.tokens(spec.rungs.num_trained),
        "seed": spec.seed,
        **{name: values[name] for name in ("corpus", "compression")},
        "fewshot": [task.num_fewshot for task in spec.tasks],
        "documents": [spec.evaluation.documents_per_task, spec.evaluation.held_out_documents],
        "dtype": spec.distillation.dtype,
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]


def prepare(
    spec: SearchSpec, *, inputs: Mapping[str, Any], folder: Path, device: str, report: Callable[[dict[str, Any]], None], should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """Fill `folder`, or find it filled; returns what the leaderboard needs of it.

    Raises:
        TeacherUnavailable, CorpusUnavailable, TaskUnavailable: what the search refers to cannot be used; the message says why.
    """
    if (folder / PREPARED).exists():
        facts = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
        assert isinstance(facts, dict)
        return facts
    folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    teacher_folder = Path(inputs["teacher"]["path"])

    @contextmanager
    def step(name: str) -> Iterator[None]:
        if should_stop():
            raise StoppedEarly(name)
        report({"step": name})
        started = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - started

    with step("load"):
        teacher = load_model(teacher_folder, dtype=teacher_dtype(spec, device=device), device=device)
        tokenizer = load_tokenizer(teacher_folder)
        architecture = read_architecture(inputs["teacher"]["config"])
    with step("corpus"):
        blocks = build_blocks(
            [
                Part(name=part.name, files=tuple(Path(file) for file in corpus["files"]), weight=part.weight)
                for part, corpus in zip(spec.corpus.parts, inputs["corpora"], strict=True)
            ],
            tokenizer=tokenizer,
            sequence_length=spec.corpus.sequence_length,
            train_tokens=spec.rungs.tokens(spec.rungs.num_trained),
            calibration_tokens=spec.corpus.calibration_tokens,
            # One half compares the rungs, the other is kept for the confirmation.
            validation_tokens=2 * spec.corpus.validation_tokens,
            seed=spec.seed,
            folder=folder / BLOCKS,
        )
    with step("importance"):
        batch_size = spec.distillation.micro_batch_size or spec.distillation.batch_size
        importance = measure_importance(teacher, blocks_BT=blocks.calibration_NT, method=spec.compression.importance, batch_size=batch_size)
        order = make_order(importance, architecture.shape)
    with step("depth"):
        layers = _select_depths(spec, inputs=inputs, teacher=teacher, importance=importance, blocks_BT=blocks.calibration_NT, batch_size=batch_size)
    with step("sort"):
        save_sorted(
            folder / SORTED,
            state=sort_teacher(teacher, order=order, architecture=architecture),
            order=order,
            importance=importance,
            config=inputs["teacher"]["config"],
            layers=layers,
            tokenizer_from=teacher_folder,
        )
    with step("tasks"):
        tasks = load_tasks([Path(task["folder"]) for task in inputs["tasks"]], num_fewshot={task.name: task.num_fewshot for task in spec.tasks})
        documents: dict[str, dict[str, list[int]]] = {}
        for task in spec.tasks:
            split = split_documents(tasks[task.name], documents_per_task=spec.evaluation.documents_per_task, seed=spec.seed)
            documents[task.name] = {"search": list(split.search), "held_out": _held_out(split.held_out, spec=spec)}
        write_json(documents, target=folder / SPLITS)
    facts = {
        "layers": {str(depth): list(kept) for depth, kept in layers.items()},
        "documents": {name: {part: len(ids) for part, ids in split.items()} for name, split in documents.items()},
        "blocks": blocks.facts,
    }
    del teacher  # the trials' own copy takes its place
    with step("baselines"):
        shared = load_shared(spec, inputs=inputs, prepared=folder, device=device)
        random = random_model(architecture, config=inputs["teacher"]["config"], seed=spec.seed, device=device)
        for name, model in (("teacher", shared.teacher), ("random", random)):
            for held_out in (False, True):
                result = measure(spec, inputs=inputs, prepared=folder, model=model, device=device, rung=0, tokens=0, held_out=held_out, with_tasks=True)
                facts[f"{name}_held_out" if held_out else name] = result.as_dict()
    facts["seconds"] = seconds
    write_json(facts, target=folder / PREPARED)
    return facts


class StoppedEarly(Exception):
    """The prepare step was asked to stop between two of its parts."""


def random_model(architecture: Architecture, *, config: Mapping[str, Any], seed: int, device: str) -> PreTrainedModel:
    """The architecture with freshly initialised weights, float32; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version", "dtype", "torch_dtype")}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture.model_type, **values), dtype=torch.float32)
    return model.to(device).eval()


def _held_out(documents: Sequence[int], *, spec: SearchSpec) -> list[int]:
    """The held-out documents that are scored: all, or as many as the spec asks for, drawn by its seed."""
    limit = spec.evaluation.held_out_documents
    return list(documents) if limit is None or limit >= len(documents) else sorted(Random(spec.seed).sample(documents, limit))


def _depths(spec: SearchSpec, *, inputs: Mapping[str, Any]) -> list[int]:
    space = build_space(spec, inputs=inputs)
    depths = {*space.axes["num_hidden_layers"], *(shape.num_hidden_layers for shape in spec.shapes)}
    if spec.controls.anchors:
        depths |= {shape.num_hidden_layers for shape in space.anchors().values()}
    return sorted(depths)


def _select_depths(
    spec: SearchSpec, *, inputs: Mapping[str, Any], teacher: PreTrainedModel, importance: Importance, blocks_BT: Tensor, batch_size: int
) -> dict[int, tuple[int, ...]]:
    """For every depth of the space the layers that stay."""
    num_hidden_layers = inputs["teacher"]["config"]["num_hidden_layers"]
    depths = _depths(spec, inputs=inputs)
    if spec.compression.depth == "block_influence":
        ranked = torch.argsort(importance.block_influence_L, descending=True, stable=True).tolist()
        return {depth: tuple(sorted(ranked[:depth])) for depth in depths}
    # A quarter of the calibration text is enough to order layer sets, and there are many of them.
    few_BT = blocks_BT[: max(1, len(blocks_BT) // 4)]
    return select_layers(num_hidden_layers=num_hidden_layers, depths=depths, damage=layer_damage(teacher, blocks_BT=few_BT, batch_size=batch_size))
