"""The files that all machines of a deployment share, by fsspec URL: `file:///mnt/nas` or `s3://bucket/prefix`.

A tree (a folder's files) is objects named after their content and a manifest, written last: whoever finds the manifest finds
the whole tree, a killed upload goes on where it was, and nothing that was published is ever written over. A key is a path
below the URL, the same as below the data folder. Keeps no copies: that is `node_cache.py`.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from nas.errors import CorruptFile, Fenced, FilesUnavailable, NotFound
from nas.files import check_may_publish, file_digest, publish, whole_file

MANIFEST, PARTIAL = "manifest.json", "partial.json"
"""What a tree holds; and what there is already of one that is not whole."""
TRANSFERS = 4
"""Files of one tree that are on their way at a time."""
_S3_OPTIONS = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 3}}, "use_listings_cache": False}


def registry_key(kind: str, *, digest: str) -> str:
    """Where a registered thing is: kind is teachers, corpora or tasks."""
    return f"registry/{kind}/{digest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file of a tree."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a tree holds, by path within it."""

    files: Mapping[str, File]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    def as_dict(self) -> dict[str, Any]:
        return {"files": {path: asdict(file) for path, file in self.files.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """Raises CorruptFile where a path would leave the tree."""
        for path in values["files"]:
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise CorruptFile(f"manifest: expected paths inside the tree, got {path!r}")
        return cls(files={path: File(**file) for path, file in values["files"].items()})


class SharedFiles:
    """What is below one URL. Every method may raise FilesUnavailable: it cannot be reached, or refuses; those that write Fenced, as `nas.files.publish`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    # -- trees -------------------------------------------------------------------------------------------------------------

    def publish_tree(self, source: Path | Mapping[str, Path], *, key: str, name: str = MANIFEST) -> Manifest:
        """Upload files; what an earlier try has uploaded stays. Whoever publishes the same key again replaces the manifest alone.

        Args:
            source: a folder, of which all `regular_files`; or files by their path within the tree.
            name: of the manifest; PARTIAL leaves the tree not whole.
        """
        sources = regular_files(source) if isinstance(source, Path) else source
        with self._reaching(key), ThreadPoolExecutor(TRANSFERS) as pool:
            there = self.sizes(key)
            files = dict(zip(sources, pool.map(partial(self._upload, key=key, there=there), sources.values()), strict=True))
        manifest = Manifest(files=files)
        self.write_json(manifest.as_dict(), key=f"{key}/{name}")
        return manifest

    def replace_tree(self, source: Mapping[str, Path], *, key: str) -> Manifest:
        """Publish files as a tree that only this process publishes, in place of what it held; nothing of that stays."""
        manifest = self.publish_tree(source, key=key)
        kept = {MANIFEST, *(file.sha256 for file in manifest.files.values())}
        with self._reaching(key):
            for name in self.sizes(key).keys() - kept:
                self._fs.rm(self._path(f"{key}/{name}"))
        return manifest

    def find_tree(self, key: str, *, name: str = MANIFEST) -> Manifest | None:
        """The manifest of a tree; None while it is not whole. PARTIAL: what there is of it already, None where nobody said."""
        found = self.read_json(f"{key}/{name}")
        return None if found is None else Manifest.from_dict(found)

    def fetch_tree(self, key: str, *, folder: Path, manifest: Manifest | None = None) -> Manifest:
        """Download a tree into a folder; files that are there with the right content stay.

        Raises:
            NotFound: no such tree. CorruptFile: a file has not the content that its manifest promises, twice.
        """
        manifest = manifest or self.find_tree(key)
        if manifest is None:
            raise NotFound(f"{self.url}/{key}: expected a published tree, got none")
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda item: self._download(item[1], key=key, target=folder / item[0]), manifest.files.items()))
        return manifest

    def copy_tree(self, source: str, *, to: str) -> bool:
        """Make a tree another key's, too; False where there is none."""
        manifest = self.find_tree(source)
        if manifest is None:
            return False
        with self._reaching(source):
            there = self.sizes(to)
            for file in manifest.files.values():
                if there.get(file.sha256) != file.bytes:
                    self._write(f"{to}/{file.sha256}", partial(self._fs.copy, self._path(f"{source}/{file.sha256}")))
        self.write_json(manifest.as_dict(), key=f"{to}/{MANIFEST}")
        return True

    def children(self, key: str) -> list[str]:
        """Names right below a key; none where it is not there."""
        with self._reaching(key):
            path = self._path(key)
            return sorted(PurePosixPath(name).name for name in self._fs.ls(path, detail=False)) if self._fs.exists(path) else []

    def sizes(self, key: str) -> dict[str, int]:
        """Bytes of every file below a key, by its path there, of trees that are whole or not. On S3 one request for a thousand."""
        with self._reaching(key):
            path = self._path(key)
            return {PurePosixPath(name).relative_to(path).as_posix(): int(info["size"]) for name, info in self._fs.find(path, detail=True).items()}

    def delete(self, key: str) -> None:
        """Remove all below a key, manifest first; what is not there is no error."""
        with self._reaching(key):
            for path in (self._path(f"{key}/{MANIFEST}"), self._path(key)):
                if self._fs.exists(path):
                    self._fs.rm(path, recursive=True)

    # -- single files ------------------------------------------------------------------------------------------------------

    def publish_file(self, path: Path, *, key: str) -> None:
        """Upload one file, whole or not at all."""
        with self._reaching(key):
            self._write(key, partial(self._fs.put_file, str(path)))

    def fetch_file(self, key: str, *, target: Path, sha256: str) -> None:
        """Download one file, whole or not at all.

        Raises:
            NotFound: it is not there. CorruptFile: it has another content.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as temporary:
            with self._reaching(key):
                self._fs.get_file(self._path(key), str(temporary))
            if (found := file_digest(temporary)) != sha256:
                raise CorruptFile(f"{self.url}/{key}: expected sha256 {sha256}, got {found}")

    @contextmanager
    def open(self, key: str) -> Iterator[IO[bytes]]:
        """Read one file; NotFound where it is not there."""
        with self._reaching(key):
            file = self._fs.open(self._path(key), "rb")
        with file:
            yield file

    def read_range(self, key: str, *, start: int, length: int) -> bytes:
        """So many bytes of one file, which has them; NotFound where it is not there."""
        with self._reaching(key):
            found = self._fs.cat_file(self._path(key), start=start, end=start + length)
        assert isinstance(found, bytes)
        return found

    def size(self, key: str) -> int | None:
        """Bytes of one file; None where it is not there."""
        with self._reaching(key):
            path = self._path(key)
            return int(self._fs.size(path)) if self._fs.exists(path) else None

    def read_json(self, key: str) -> dict[str, Any] | None:
        """A small JSON object; None where it is not there."""
        try:
            with self._reaching(key):
                text = self._fs.cat_file(self._path(key))
        except NotFound:
            return None
        value = json.loads(text)
        if not isinstance(value, dict):
            raise CorruptFile(f"{self.url}/{key}: expected a JSON object, got {type(value).__name__}")
        return value

    def write_json(self, value: Mapping[str, Any], *, key: str) -> None:
        """A small JSON object, whole or not at all."""
        content = json.dumps(value, sort_keys=True, allow_nan=False).encode()
        with self._reaching(key):
            self._write(key, lambda path: self._fs.pipe_file(path, content))

    # -- the file system ---------------------------------------------------------------------------------------------------

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        if self._is_local:
            return fsspec.filesystem("file", auto_mkdir=True)
        return fsspec.filesystem(self.url.split("://")[0], skip_instance_cache=True, **_S3_OPTIONS)

    @property
    def _is_local(self) -> bool:
        return self.url.startswith("file://")

    def _path(self, key: str) -> str:
        return f"{self.url.removeprefix('file://') if self._is_local else self.url.split('://')[1]}/{key}"

    def _upload(self, path: Path, *, key: str, there: Mapping[str, int]) -> File:
        file = File(sha256=file_digest(path), bytes=path.stat().st_size)
        if there.get(file.sha256) != file.bytes:
            self._write(f"{key}/{file.sha256}", partial(self._fs.put_file, str(path)))
        return file

    def _download(self, file: File, *, key: str, target: Path) -> None:
        if target.is_file() and target.stat().st_size == file.bytes and file_digest(target) == file.sha256:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")
        for _ in range(2):
            with self._reaching(f"{key}/{file.sha256}"):
                self._fs.get_file(self._path(f"{key}/{file.sha256}"), str(temporary))
            if (found := file_digest(temporary)) == file.sha256:
                publish(temporary, target=target)
                return
        temporary.unlink()
        raise CorruptFile(f"{self.url}/{key}: {target.name}: expected sha256 {file.sha256}, got {found}")

    def _write(self, key: str, write: Callable[[str], object]) -> None:
        """An object store shows an object when it is whole; a folder does so only after a rename."""
        path = self._path(key)
        if not self._is_local:
            check_may_publish(Path(key))
            write(path)
            return
        temporary = f"{path}.{uuid.uuid4().hex}.partial"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            publish(Path(temporary), target=Path(path))
        finally:
            Path(temporary).unlink(missing_ok=True)

    @contextmanager
    def _reaching(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as absent:
            raise NotFound(f"{self.url}/{key}: no such file") from absent
        except (NotFound, CorruptFile, FilesUnavailable, Fenced):
            raise
        # Broad: every file system behind fsspec raises types of its own.
        except Exception as error:
            raise FilesUnavailable(f"{self.url}/{key}: expected an answer, got {type(error).__name__}: {error}"[:1000]) from error


def regular_files(folder: Path) -> dict[str, Path]:
    """By path within the folder; no link is followed, and what is still being written, or worked on, is hidden, and left out."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(names):
            path = Path(parent) / name
            if not path.is_symlink() and path.is_file() and not name.startswith("."):
                found[path.relative_to(folder).as_posix()] = path
    return found
