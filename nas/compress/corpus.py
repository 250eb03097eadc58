"""Text files -> documents, checked and known by a digest. Does not clean or deduplicate text, and needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nas.errors import CorpusUnavailable
from nas.files import whole_file

SUFFIXES = (".txt", ".jsonl", ".parquet")
_BATCH_DOCUMENTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What `check_corpus` found."""

    files: tuple[Path, ...]
    digest: str
    """sha256 over every file's name and content."""
    num_documents: int
    num_bytes: int
    """Of the documents' text in UTF-8."""


def check_corpus(paths: Sequence[Path]) -> Corpus:
    """Read every document of files (.txt, .jsonl, .parquet) and folders of them once.

    Raises:
        CorpusUnavailable: a path is missing, of another kind, unreadable or empty; the message names file, expected and got.
    """
    files = _list_files(paths)
    digest = hashlib.sha256()
    num_documents = num_bytes = 0
    for file in files:
        with _open(file) as stream:
            digest.update(f"{file.name}\0".encode() + hashlib.file_digest(stream, "sha256").digest())
        before = num_documents
        for document in read_documents([file]):
            num_documents += 1
            num_bytes += len(document.encode())
        if num_documents == before:
            raise CorpusUnavailable(f"{file}: expected at least one document, got none")
    return Corpus(files=files, digest=digest.hexdigest(), num_documents=num_documents, num_bytes=num_bytes)


def fetch_corpus(name: str, *, cache: Path, split: str = "train") -> list[Path]:
    """An existing path as it is; otherwise the Hugging Face dataset `name` (`owner/dataset` or `owner/dataset:config`) as one parquet file in `cache`.

    Raises:
        CorpusUnavailable: neither a path nor a dataset that can be loaded here, or it has no column `text`.
    """
    if Path(name).exists():
        return [Path(name)]
    target = cache / f"{name.replace('/', '--').replace(':', '--')}--{split}.parquet"
    if target.exists():
        return [target]
    import datasets  # 2 s of import that local files do not need

    dataset_id, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(dataset_id, config or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise CorpusUnavailable(
            f"corpus: expected an existing path, or a Hugging Face dataset id that can be reached from here, got {name!r} ({type(error).__name__}: {error})"
        ) from error
    if "text" not in dataset.column_names:
        raise CorpusUnavailable(f"corpus {name!r}: expected a column 'text', got {', '.join(dataset.column_names)}")
    cache.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as temporary:
        dataset.select_columns(["text"]).to_parquet(temporary)
    return [target]


def read_documents(files: Sequence[Path]) -> Iterator[str]:
    """The documents of the files, in order; blank ones are left out.

    .txt: paragraphs between blank lines, or one document per line if no blank line lies between text. .jsonl: the key `text`. .parquet: the column `text`.
    """
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for file in files:
        if file.suffix not in readers:
            raise CorpusUnavailable(f"{file}: expected a file ending in {', '.join(SUFFIXES)}, got {file.suffix or 'no suffix'}")
        for document in readers[file.suffix](file):
            if document and not document.isspace():
                yield document


def _list_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not found:
                raise CorpusUnavailable(f"{path}: expected a folder with {', '.join(SUFFIXES)} files, got none")
            if strange := [file for file in found if not file.resolve().is_relative_to(path.resolve())]:
                raise CorpusUnavailable(f"{strange[0]}: expected a file inside the corpus's folder, got a link to {strange[0].resolve()}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise CorpusUnavailable(f"{path}: expected a file or a folder, got nothing there")
    if not files:
        raise CorpusUnavailable("corpus: expected at least one file, got none")
    return tuple(files)


def _open(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise CorpusUnavailable(f"{file}: expected a readable file, got {error.strerror}") from error


def _read_lines(file: Path) -> Iterator[str]:
    """The lines without their line ends."""
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise CorpusUnavailable(f"{file}:{number}: expected UTF-8 text, got {error.object[error.start : error.end]!r}") from error


def _read_txt(file: Path) -> Iterator[str]:
    if not _has_paragraphs(file):
        yield from _read_lines(file)
        return
    paragraph: list[str] = []
    for line in _read_lines(file):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    yield "\n".join(paragraph)


def _has_paragraphs(file: Path) -> bool:
    """Whether a blank line lies between text; one at the start or the end says nothing."""
    has_text = has_gap = False
    for line in _read_lines(file):
        if not line.strip():
            has_gap = has_text
        elif has_gap:
            return True
        else:
            has_text = True
    return False


def _read_jsonl(file: Path) -> Iterator[str]:
    for number, line in enumerate(_read_lines(file), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if "\\ud" in line or "\\uD" in line:
                text.encode()  # half a surrogate pair is legal JSON, but no text
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorpusUnavailable(f"{file}:{number}: expected a JSON object with text under the key 'text', got {line[:80]!r}") from error
        if not isinstance(text, str):
            raise CorpusUnavailable(f"{file}:{number}: expected text under the key 'text', got {type(text).__name__}")
        yield text


def _read_parquet(file: Path) -> Iterator[str]:
    try:
        with pq.ParquetFile(file) as table:
            kind = table.schema_arrow.field("text").type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise CorpusUnavailable(f"{file}: expected text in the column 'text', got {kind}")
            for batch in table.iter_batches(batch_size=_BATCH_DOCUMENTS, columns=["text"]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise CorpusUnavailable(f"{file}: expected a parquet file with the column 'text', got {error}") from error
