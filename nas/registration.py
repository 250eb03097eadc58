"""What an operator adds to the service: teachers, corpora and tasks, checked once and known by a digest. Never over HTTP.

A search names what is registered here; it can name nothing else, so no request makes the service read a path or run code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nas.compress.corpus import check_corpus, fetch_corpus
from nas.compress.teacher import check_teacher, fetch_teacher
from nas.evaluate.tasks import add_task
from nas.settings import Settings
from nas.store.records import CorpusRecord, TaskRecord, TeacherRecord, utc_now
from nas.store.store import Store


def register_teacher(source: str, *, name: str | None, store: Store, settings: Settings) -> TeacherRecord:
    """Register a local folder or a Hugging Face id.

    Raises:
        TeacherUnavailable: it cannot be used. Conflict: the name stands for another teacher.
    """
    folder = fetch_teacher(source, cache=settings.registry_folder / "teachers").absolute()
    teacher = check_teacher(folder)
    return store.add_teacher(
        TeacherRecord(
            name=name or _default_name(source),
            digest=teacher.digest,
            path=str(folder),
            config=teacher.config,
            parameters=teacher.parameters,
            added_at=utc_now(),
        )
    )


def register_corpus(sources: Sequence[str], *, name: str | None, store: Store, settings: Settings) -> CorpusRecord:
    """Register text, jsonl or parquet files, folders of them, or a Hugging Face dataset id.

    Raises:
        CorpusUnavailable: it cannot be used. Conflict: the name stands for another corpus.
    """
    files = [path.absolute() for source in sources for path in fetch_corpus(source, cache=settings.registry_folder / "corpora")]
    corpus = check_corpus(files)
    return store.add_corpus(
        CorpusRecord(
            name=name or _default_name(sources[0]),
            digest=corpus.digest,
            files=tuple(str(file) for file in corpus.files),
            num_documents=corpus.num_documents,
            num_bytes=corpus.num_bytes,
            added_at=utc_now(),
        )
    )


def register_tasks(source: str, *, dataset_path: Path | None, store: Store, settings: Settings) -> list[TaskRecord]:
    """Register a stock lm-eval task or group, or every task of a folder of YAML; rows and code are copied into the data folder.

    Raises:
        TaskUnavailable: it cannot be used offline. Conflict: the name stands for another task.
    """
    cards = add_task(source, destination=settings.registry_folder / "tasks", dataset_path=dataset_path)
    return [
        store.add_task(TaskRecord(name=card.name, digest=card.digest, folder=str(card.folder.absolute()), card=card.as_dict(), added_at=utc_now()))
        for card in cards
    ]


def _default_name(source: str) -> str:
    """The last part of a path or id, without the ending of a file."""
    path = Path(source.rstrip("/"))
    return path.stem if path.is_file() else path.name
