"""`nas teachers`, `nas corpora`, `nas tasks`: what changes the registry works on the store and the data folder, never over HTTP; lists come from either."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nas.cli.options import Json, Url
from nas.cli.searches import make_client
from nas.errors import InvalidSpec, Problem, StoreUnavailable
from nas.settings import Settings
from nas.terminal import print_rows

if TYPE_CHECKING:
    from nas.store.store import Store

teachers = typer.Typer(help="Teachers that searches may name.", no_args_is_help=True)
corpora = typer.Typer(help="Corpora that searches may name.", no_args_is_help=True)
tasks = typer.Typer(help="lm-eval tasks that searches may name.", no_args_is_help=True)


@contextmanager
def open_store() -> Iterator[tuple[Store, Settings]]:
    """The store of this deployment and its settings. A new database gets its schema; an older one is never changed here: a service may run on it."""
    from nas.store.store import Store

    settings = Settings.from_environment(os.environ)
    settings.data_folder.mkdir(parents=True, exist_ok=True)
    try:
        store = Store.open(settings.database_url)
        if store.schema_revisions()[0] is None:
            store.migrate()
        store.check_schema()
    except StoreUnavailable as error:
        # To the operator at the terminal the driver's own words are the answer.
        raise InvalidSpec(Problem(field="NAS_DATABASE_URL", expected="a database that can be opened", got=str(error.__cause__).splitlines()[0])) from error
    try:
        yield store, settings
    finally:
        store.close()


@teachers.command("add")
def add_teacher(
    source: Annotated[str, typer.Argument(help="Folder, or Hugging Face id.")],
    name: Annotated[str | None, typer.Option(help="Name for searches; default: the last part of SOURCE.")] = None,
    as_json: Json = False,
) -> None:
    """Register a teacher: a causal language model with safetensors, of a family in nas/families.py."""
    from nas.registration import register_teacher

    with open_store() as (store, settings):
        record = register_teacher(source, name=name, store=store, settings=settings)
    print_rows([{"name": record.name, "parameters": record.parameters, "digest": record.digest, "path": record.path}], as_json=as_json)


@teachers.command("list")
def list_teachers(url: Url = None, as_json: Json = False) -> None:
    """Registered teachers: on this machine, or with --url those of a service."""
    found = _list("teachers", url=url)
    rows = [{"name": t["name"], "model_type": t["config"]["model_type"], "parameters": t["parameters"], "digest": t["digest"]} for t in found]
    print_rows(rows, as_json=as_json)


@corpora.command("add")
def add_corpus(
    sources: Annotated[list[str], typer.Argument(help="Text, jsonl or parquet files, folders of them, or a Hugging Face dataset id.")],
    name: Annotated[str | None, typer.Option(help="Name for searches; default: the last part of the first source.")] = None,
    as_json: Json = False,
) -> None:
    """Register a corpus."""
    from nas.registration import register_corpus

    with open_store() as (store, settings):
        record = register_corpus(sources, name=name, store=store, settings=settings)
    print_rows([{"name": record.name, "documents": record.num_documents, "bytes": record.num_bytes, "digest": record.digest}], as_json=as_json)


@corpora.command("list")
def list_corpora(url: Url = None, as_json: Json = False) -> None:
    """Registered corpora: on this machine, or with --url those of a service."""
    found = _list("corpora", url=url)
    rows = [{"name": c["name"], "documents": c["num_documents"], "bytes": c["num_bytes"], "digest": c["digest"]} for c in found]
    print_rows(rows, as_json=as_json)


@tasks.command("add")
def add_tasks(
    source: Annotated[str, typer.Argument(help="Stock lm-eval task or group, or a folder of task YAML (YAML is code: only from people you trust).")],
    dataset_path: Annotated[Path | None, typer.Option(help="Folder in the layout of the task's Hugging Face dataset, read instead of it.")] = None,
    as_json: Json = False,
) -> None:
    """Register tasks; their rows and YAML are copied, later runs need no network."""
    from nas.registration import register_tasks

    with open_store() as (store, settings):
        records = register_tasks(source, dataset_path=dataset_path, store=store, settings=settings)
    print_rows([_task_row(record.name, record.card, record.digest) for record in records], as_json=as_json)


@tasks.command("list")
def list_tasks(url: Url = None, as_json: Json = False) -> None:
    """Registered tasks and their metrics: on this machine, or with --url those of a service."""
    print_rows([_task_row(task["name"], task["card"], task["digest"]) for task in _list("tasks", url=url)], as_json=as_json)


def _list(kind: Literal["teachers", "corpora", "tasks"], *, url: str | None) -> list[dict[str, Any]]:
    """What is registered, out of the database; where a service is named, out of that."""
    if url is not None:
        with make_client(url) as client:
            return list(getattr(client, kind)())
    with open_store() as (store, _):
        return [asdict(record) for record in getattr(store, f"list_{kind}")()]


def _task_row(task: str, card: Mapping[str, Any], digest: str) -> dict[str, Any]:
    return {"name": task, "type": card["output_type"], "metrics": [m["name"] for m in card["metrics"]], "documents": card["num_documents"], "digest": digest}
