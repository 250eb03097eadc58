"""The catalogue of lm-eval tasks: each is resolved once into a folder of its own, and read from there without network or cache.

A folder holds the task's YAML (includes merged), the Python files that its `!function`s name, the rows of its splits
as parquet, and `card.json`; its name ends in the digest of the rest. Task YAML is code (Jinja, `!function`): operators
add tasks, users only name them. This module does not score (`scoring.py`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import jinja2
import pyarrow.parquet
from datasets.table import InMemoryTable
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks import TaskManager

from nas.errors import CorruptFile, InvalidSpec, Problem, TaskUnavailable
from nas.evaluate import harness
from nas.evaluate.task_yaml import TaskSource, find_stock_tasks, read_task_folder, read_yaml, write_yaml

logger = logging.getLogger(__name__)

_YAML = "task.yaml"
_CARD = "card.json"
_PREFERRED_METRICS = ("acc_norm", "acc", "exact_match", "bits_per_byte")
_FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow")
"""Values of `dataset_path` that name a reader of `datasets`, never a folder."""
_TRIED_DOCUMENTS = 16
"""On which a new task is tried out."""
_TASK_FAULTS = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, ImportError, OSError, RuntimeError, AssertionError, jinja2.TemplateError)
"""What foreign YAML, its functions and its dataset raise in practice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricCard:
    """A metric that a task reports, and its direction."""

    name: str
    """Without lm-eval's filter suffix: `acc`, `bits_per_byte`."""
    higher_is_better: bool
    paired: bool = True
    """A mean, ratio or perplexity over documents, so that it can rank by paired differences; f1 and bleu cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCard:
    """One task of the catalogue."""

    name: str
    folder: Path
    digest: str
    """sha256 over the folder's files, the card itself left out."""
    output_type: str
    """lm-eval's: multiple_choice, loglikelihood, loglikelihood_rolling or generate_until."""
    metrics: tuple[MetricCard, ...]
    default_metric: str
    """`acc_norm`, `acc`, `exact_match`, `bits_per_byte`: the first that the task has, else its first metric."""
    num_documents: int
    max_fewshot: int = 0
    """Most examples in a prompt; 0 where the task has no split of its own for them."""
    bytes_per_document: float = 0.0
    """UTF-8 bytes that a model reads for one document, all choices together, without examples; a mean over the first documents. For estimates."""

    def metric(self, name: str) -> MetricCard:
        """One metric by name.

        Raises:
            TaskUnavailable: the task does not report it; the message lists what it reports.
        """
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise TaskUnavailable(f"metric of task {self.name}: expected one of {', '.join(metric.name for metric in self.metrics)}, got {name!r}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskCard:
        return cls(**{**values, "folder": Path(values["folder"]), "metrics": tuple(MetricCard(**metric) for metric in values["metrics"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentSplit:
    """Ids of the documents that the search scores on, and of those kept for the finalists. Sorted, disjoint, together all."""

    search: tuple[int, ...]
    held_out: tuple[int, ...]


# ---------------------------------------------------------------- adding


def add_task(name_or_folder: str, *, destination: Path, dataset_path: Path | None = None) -> tuple[TaskCard, ...]:
    """Copies a task, every task of a group or tag, or every task of a folder into `destination`, one folder each; runs each once.

    Args:
        name_or_folder: a name of lm-eval's stock catalogue, or a folder with task YAML files.
        destination: the catalogue's folder; a task that is there already with the same content is left as it is.
        dataset_path: a folder in the layout of the task's Hugging Face dataset, to be read instead of it.
    Raises:
        TaskUnavailable: no such task, its dataset cannot be read, or it does not run; the message says what to do.
    """
    folder = Path(name_or_folder)
    sources = read_task_folder(folder) if folder.is_dir() else find_stock_tasks(name_or_folder)
    destination.mkdir(parents=True, exist_ok=True)
    return tuple(_add_source(source, destination=destination, dataset_path=dataset_path) for source in sources)


def _add_source(source: TaskSource, *, destination: Path, dataset_path: Path | None) -> TaskCard:
    _refuse_unsupported(source)
    rows = _load_dataset(source, dataset_path=dataset_path)
    with tempfile.TemporaryDirectory(dir=destination, prefix=".adding-") as temporary:
        folder = Path(temporary) / "task"
        _write_folder(source, rows=rows, folder=folder)
        digest = _digest(folder)
        card = _try_out(source.name, folder=folder, digest=digest)
        safe_name = re.sub(r"[^\w.-]", "_", source.name)
        final_folder = destination / f"{safe_name}-{digest[:12]}"
        card = TaskCard.from_dict(card.as_dict() | {"folder": final_folder})
        (folder / _CARD).write_text(json.dumps(card.as_dict() | {"folder": "."}, indent=1), encoding="utf-8")
        if not final_folder.exists():
            folder.rename(final_folder)
    logger.info("task added", extra={"action": "add_task", "task": card.name, "digest": digest, "documents": card.num_documents})
    return card


def _refuse_unsupported(source: TaskSource) -> None:
    reasons = {
        "class": "it is a Python class, not a YAML task",
        "custom_dataset": "it makes its documents by code (custom_dataset)",
        "unsafe_code": "it runs code that the model wrote (unsafe_code)",
        "doc_to_image": "it needs images",
        "doc_to_audio": "it needs audio",
    }
    for key, reason in reasons.items():
        if source.config.get(key):
            raise TaskUnavailable(f"task {source.name} cannot be used: {reason}")


def _try_out(name: str, *, folder: Path, digest: str) -> TaskCard:
    """Builds the copied task and runs a stand-in for a model over a few documents: what it reports becomes the card."""
    try:
        task = _build_task(name, folder=folder, num_fewshot=None)
        num_documents = len(task.eval_docs)
        tried = range(min(_TRIED_DOCUMENTS, num_documents))
        result = harness.run(DummyLM(), task=task, documents=tried)
        read = sum(len(text.encode()) for request in task.instances for text in request.args if isinstance(text, str))
    except _TASK_FAULTS as fault:
        raise TaskUnavailable(f"task {name} does not run: {type(fault).__name__}: {fault}") from fault
    directions = result["higher_is_better"][name]
    metrics = []
    for key in result["results"][name]:
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(directions.get(metric), bool):
            our_name = harness.metric_name(metric, filter_name=filter_name, task=task)
            paired = task.aggregation().get(metric) in harness.PAIRED_AGGREGATIONS
            metrics.append(MetricCard(name=our_name, higher_is_better=directions[metric], paired=paired))
    if not metrics:
        raise TaskUnavailable(f"task {name}: expected a metric with higher_is_better in its metric_list, got none")
    names = [metric.name for metric in metrics]
    return TaskCard(
        name=name,
        folder=folder,
        digest=digest,
        output_type=task.OUTPUT_TYPE,
        metrics=tuple(metrics),
        default_metric=next((metric for metric in _PREFERRED_METRICS if metric in names), names[0]),
        num_documents=num_documents,
        max_fewshot=_max_fewshot(name, folder=folder),
        bytes_per_document=read / len(tried),
    )


def _max_fewshot(name: str, *, folder: Path) -> int:
    if not _has_own_examples(read_yaml(folder / _YAML)):
        return 0
    return max(0, len(list(_build_task(name, folder=folder, num_fewshot=1).fewshot_docs())) - 1)


# ---------------------------------------------------------------- copying


def _load_dataset(source: TaskSource, *, dataset_path: Path | None) -> dict[str, Any]:
    """The splits that the task names, in memory."""
    config = source.config
    options = {key: value for key, value in (config.get("dataset_kwargs") or {}).items() if key != "trust_remote_code"}
    path = str(config.get("dataset_path"))
    if dataset_path is not None:
        path, options = str(dataset_path.resolve()), {}
    elif path not in _FILE_FORMATS and (source.folder / path).is_dir():
        path = str(source.folder / path)
    if "data_files" in options:
        options["data_files"] = _resolve_paths(options["data_files"], folder=source.folder)
    is_local = path in _FILE_FORMATS or Path(path).is_dir()
    try:
        with tempfile.TemporaryDirectory() as cache, harness.isolated():
            dataset = datasets.load_dataset(path, config.get("dataset_name"), cache_dir=cache if is_local else None, keep_in_memory=True, **options)
    except _TASK_FAULTS as fault:
        name = f"{path} ({config['dataset_name']})" if config.get("dataset_name") else path
        raise TaskUnavailable(
            f"task {source.name}: its dataset {name} cannot be read: {fault}. Without network, give a copy in the dataset's "
            f"own layout: `nas tasks add {source.name} --dataset-path FOLDER`"
        ) from fault
    eval_split = config.get("test_split") or config.get("validation_split")
    if eval_split not in dataset:
        raise TaskUnavailable(f"task {source.name}: expected the split {eval_split!r} in {path}, got {', '.join(map(str, dataset))}")
    return {split: dataset[split] for split in _named_splits(config) if split in dataset}


def _resolve_paths(files: Any, *, folder: Path) -> Any:
    if isinstance(files, str):
        return files if "://" in files else str(folder / files)
    if isinstance(files, Mapping):
        return {split: _resolve_paths(value, folder=folder) for split, value in files.items()}
    return [_resolve_paths(value, folder=folder) for value in files]


def _named_splits(config: Mapping[str, Any]) -> list[str]:
    """The splits that lm-eval may read, the evaluation split first."""
    fewshot = config.get("fewshot_config") or {}
    keys = ("test_split", "validation_split", "training_split", "fewshot_split")
    return list(dict.fromkeys(split for split in [*(config.get(key) for key in keys), fewshot.get("split")] if split))


def _write_folder(source: TaskSource, *, rows: Mapping[str, Any], folder: Path) -> None:
    (folder / "rows").mkdir(parents=True)
    for split, dataset in rows.items():
        pyarrow.parquet.write_table(dataset.with_format("arrow")[:], folder / "rows" / f"{split}.parquet")
    config = {key: value for key, value in source.config.items() if key not in ("dataset_name", "tag", "task_list")}
    for key in ("validation_split", "training_split", "fewshot_split"):
        if config.get(key) and config[key] not in rows:
            level = logging.INFO if key == "validation_split" else logging.WARNING  # few-shot examples would come from elsewhere
            logger.log(level, "task %s: the dataset has no split %r; %s is left out", source.name, config[key], key)
            del config[key]
    config |= {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {split: f"rows/{split}.parquet" for split in rows}}}
    write_yaml(config, path=folder / _YAML)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _CARD and path.suffix != ".pyc"):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- reading


def read_card(folder: Path) -> TaskCard:
    """The card of a task's folder.

    Raises:
        TaskUnavailable: it is not a folder that `add_task` made.
        CorruptFile: a file is not what it was when the task was added.
    """
    try:
        card = TaskCard.from_dict(json.loads((folder / _CARD).read_text(encoding="utf-8")) | {"folder": folder})
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise TaskUnavailable(f"{folder}: expected a task folder made by `nas tasks add`, got {type(fault).__name__}: {fault}") from fault
    if (digest := _digest(folder)) != card.digest:
        raise CorruptFile(f"{folder}: expected the digest {card.digest}, got {digest}; add the task {card.name} again")
    return card


def load_tasks(folders: Sequence[Path], *, num_fewshot: Mapping[str, int]) -> dict[str, Any]:
    """lm-eval's task objects by name, ready for `scoring.score` any number of times; reads the folders only.

    Args:
        folders: made by `add_task`.
        num_fewshot: examples in the prompt, by task; a task without an entry keeps its YAML's number.
    Raises:
        InvalidSpec: `num_fewshot` names no loaded task, or asks for more examples than there are.
        TaskUnavailable, CorruptFile: as `read_card`; also two folders with the same task.
    """
    cards = [read_card(folder) for folder in folders]
    names = [card.name for card in cards]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise TaskUnavailable(f"tasks: expected each task once, got {', '.join(duplicates)} from several folders")
    problems = [
        Problem(field=f"num_fewshot.{name}", expected="a loaded task: " + ", ".join(names), got=repr(name)) for name in num_fewshot if name not in names
    ] + [Problem(field=f"num_fewshot.{name}", expected="an integer of at least 0", got=repr(shots)) for name, shots in num_fewshot.items() if shots < 0]
    if problems:
        raise InvalidSpec(*problems)
    return {card.name: _build_task(card.name, folder=card.folder, num_fewshot=num_fewshot.get(card.name)) for card in cards}


def _build_task(name: str, *, folder: Path, num_fewshot: int | None) -> Any:
    config = read_yaml(folder / _YAML)
    shots = int(config.get("num_fewshot") or 0) if num_fewshot is None else num_fewshot
    # lm-eval overrides a task's keys by `num_fewshot` and the like only for the members of a group.
    overrides = {"task": name, "num_fewshot": shots, "dataset_kwargs": {}, "custom_dataset": _row_reader(folder, config=config, needs_examples=shots > 0)}
    with harness.isolated():
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        task = manager.load([{"group": "nas", "task": [overrides]}])["tasks"][name]
        if task.config.process_docs is not None:
            # lm-eval processes all documents again on every look at them, five times in one evaluation.
            task.config.process_docs = functools.cache(task.config.process_docs)
            task.eval_docs  # noqa: B018 (processed here, once and silently)
        harness.remember(task)
        if shots and not _has_own_examples(config):
            expected = "0: the task has no split of its own for examples, so they would be documents that are scored"
            raise InvalidSpec(Problem(field=f"num_fewshot.{name}", expected=expected, got=str(shots)))
        if shots and (pool := len(list(task.fewshot_docs()))) <= shots:
            raise InvalidSpec(Problem(field=f"num_fewshot.{name}", expected=f"at most {pool - 1}, one less than the examples there are", got=str(shots)))
    return task


def _has_own_examples(config: Mapping[str, Any]) -> bool:
    """Whether lm-eval would draw few-shot examples from elsewhere than the documents that it scores."""
    fewshot = config.get("fewshot_config") or {}
    if fewshot.get("samples") is not None:
        return True
    examples = config.get("fewshot_split") or fewshot.get("split") or config.get("training_split") or config.get("validation_split")
    return examples is not None and examples != (config.get("test_split") or config.get("validation_split"))


def _row_reader(folder: Path, *, config: Mapping[str, Any], needs_examples: bool) -> Callable[..., Any]:
    eval_split = config.get("test_split") or config.get("validation_split")

    def read_rows(**_metadata: Any) -> dict[str, Any]:
        rows = {}
        for split in _named_splits(config):
            # In memory, so that neither a builder nor a cache folder nor its locks come into it.
            dataset = datasets.Dataset(InMemoryTable(pyarrow.parquet.read_table(folder / "rows" / f"{split}.parquet")))
            # lm-eval renders the pool of examples even for a prompt without any: 40,000 rows of hellaswag.
            rows[split] = dataset if needs_examples or split == eval_split else dataset.select(range(min(1, len(dataset))))
        return rows

    return read_rows


def split_documents(task: Any, *, documents_per_task: int, seed: int) -> DocumentSplit:
    """Chooses the search's documents by hash of their content and the seed: up to `documents_per_task`, never more than half of all.

    The order of the rows does not matter, and equal documents fall on the same side.

    Raises:
        TaskUnavailable: the task has too few different documents to keep some apart.
    """
    by_hash: dict[str, list[int]] = {}
    for document_id, document in enumerate(task.eval_docs):
        content = json.dumps(document, sort_keys=True, ensure_ascii=False, default=str)
        by_hash.setdefault(hashlib.sha256(f"{seed}\n{content}".encode()).hexdigest(), []).append(document_id)
    num_documents = sum(map(len, by_hash.values()))
    limit = min(documents_per_task, num_documents // 2)
    search: list[int] = []
    for _, document_ids in sorted(by_hash.items()):
        if len(search) + len(document_ids) <= limit:
            search += document_ids
    if not search:
        raise TaskUnavailable(
            f"task {harness.task_name(task)}: expected at least two different documents and documents_per_task of at least 1, "
            f"got {num_documents} documents and documents_per_task={documents_per_task}"
        )
    return DocumentSplit(search=tuple(sorted(search)), held_out=tuple(sorted(set(range(num_documents)) - set(search))))
