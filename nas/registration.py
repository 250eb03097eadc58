"""What an operator adds to the service: teachers, corpora and tasks, checked once and known by a digest. Never over HTTP.

A search names what is registered here; it can name nothing else, so no request makes the service read a path or run code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nas.compress.corpus import check_corpus, fetch_corpus
from nas.compress.teacher import check_teacher, fetch_teacher
from nas.compress.untrusted import inside
from nas.errors import InvalidSpec, Problem
from nas.evaluate.tasks import add_task
from nas.settings import Settings
from nas.shared_files import SharedFiles, registry_key
from nas.store.records import CorpusRecord, TaskRecord, TeacherRecord, utc_now
from nas.store.store import Store

MAX_NAME = 96
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")
"""`spec.Name`: a thing with another name could be registered, but no search could name it."""


def register_teacher(source: str, *, name: str | None, store: Store, settings: Settings) -> TeacherRecord:
    """Register a local folder or a Hugging Face id.

    Raises:
        FilesUnavailable: NAS_SHARED cannot be reached.
        TeacherUnavailable: it cannot be used. Conflict: the name stands for another teacher. InvalidSpec: no spec could say the name.
    """
    name = _checked_name(name, source=source)
    folder = fetch_teacher(source, cache=settings.registry_folder / "teachers").absolute()
    teacher = check_teacher(folder)
    _publish(settings, "teachers", digest=teacher.digest, files={file: inside(folder, name=file) for file in teacher.files})
    return store.add_teacher(
        TeacherRecord(
            name=name,
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
        CorpusUnavailable: it cannot be used. Conflict: the name stands for another corpus. InvalidSpec: no spec could say the name.
    """
    name = _checked_name(name, source=sources[0])
    files = [path.absolute() for source in sources for path in fetch_corpus(source, cache=settings.registry_folder / "corpora")]
    corpus = check_corpus(files)
    # Each in a folder that is its number: their order is part of the digest, and two may have one name.
    _publish(settings, "corpora", digest=corpus.digest, files={f"{index:06d}/{file.name}": file for index, file in enumerate(corpus.files)})
    return store.add_corpus(
        CorpusRecord(
            name=name,
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
    for card in cards:
        _publish(settings, "tasks", digest=card.digest, files={path.relative_to(card.folder).as_posix(): path for path in _files_in(card.folder)})
    return [
        store.add_task(TaskRecord(name=card.name, digest=card.digest, folder=str(card.folder.absolute()), card=card.as_dict(), added_at=utc_now()))
        for card in cards
    ]


def _publish(settings: Settings, kind: str, *, digest: str, files: Mapping[str, Path]) -> None:
    """Copy a thing to where the nodes of the cluster find it, once; without NAS_SHARED they see the paths themselves."""
    if settings.shared_url is None:
        return
    shared, key = SharedFiles(settings.shared_url), registry_key(kind, digest=digest)
    if shared.find_tree(key) is None:
        shared.publish_tree(files, key=key)


def _files_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _checked_name(name: str | None, *, source: str) -> str:
    """The given name, or the last part of a path or id without the ending of a file, in the characters that a spec may use."""
    if name is None:
        path = Path(source).expanduser()
        path = path.resolve() if path.exists() else path
        return re.sub(r"[^A-Za-z0-9._-]", "-", path.stem if path.is_file() else path.name).lstrip("._-")[:MAX_NAME] or "unnamed"
    if not _NAME.fullmatch(name):
        expected = f"at most {MAX_NAME} letters, digits, dots, dashes and underscores, the first a letter or digit"
        raise InvalidSpec(Problem(field="name", expected=expected, got=repr(name)))
    return name
