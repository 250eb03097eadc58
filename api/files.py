"""Files whose content is known by its digest: whole, or one range of them, and never twice to who has them."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from api.conditional import etag_of, is_unchanged
from nas.errors import FilesUnavailable, NotFound
from nas.settings import Settings
from nas.shared_files import SharedFiles

logger = logging.getLogger(__name__)

IMMUTABLE = "private, max-age=31536000, immutable"
"""What a digest names is the same for ever; it is still of one project."""

_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})|bytes=-([0-9]{1,18})")


def find_file(place: str, *, sha256: str, settings: Settings) -> Path:
    """A file below the data folder; where machines share files by URL it is fetched from there first, once.

    Raises:
        NotFound: it is gone, or lies elsewhere. FilesUnavailable: it cannot be fetched now.
    """
    folder = settings.data_folder.resolve()
    path = (folder / place).resolve()
    # A link is not followed to other files of the folder either: a worker that writes there does not choose what is served.
    is_itself = path == folder / place and path.is_relative_to(folder)
    if settings.shared_url is not None and is_itself and not path.is_file():
        try:
            SharedFiles(settings.shared_url).fetch_file(path.relative_to(folder).as_posix(), target=path, sha256=sha256)
        except FilesUnavailable as error:
            logger.warning("file not fetched: %s", error, extra={"action": "fetch_failed", "path": place})
            raise FilesUnavailable("the place where the service keeps its files cannot be reached now") from error
        except NotFound:
            logger.info("file is gone", extra={"action": "file_gone", "path": place})
    if not is_itself or not path.is_file():
        raise NotFound("the file is no longer in the data folder")
    return path


def send_file(place: str, *, sha256: str, name: str, request: Request, settings: Settings, cache: str | None = None) -> Response:
    """The file at a place (`find_file`), or the range that is asked for, in a thread for files (`threads.fetching`).

    A Range header of another form is passed over, as RFC 9110 (14.2) has it.

    Raises:
        NotFound, FilesUnavailable: see `find_file`. HTTPException: 416, the range begins behind the file's end.
    """
    path = find_file(place, sha256=sha256, settings=settings)
    etag = etag_of(sha256)
    headers = {"ETag": etag, **({"Cache-Control": cache} if cache else {})}
    if is_unchanged(request, etag):
        return Response(status_code=304, headers=headers)
    _check_range(request, etag=etag, size=path.stat().st_size)
    return FileResponse(path, media_type="application/x-tar", filename=name, headers=headers)


def _check_range(request: Request, *, etag: str, size: int) -> None:
    """Starlette answers a Range that it cannot serve in plain text: none of that kind reaches it."""
    match = _RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    first, last = (int(match[1]), match[2]) if match and match[1] else (None, "")
    is_usable = match is not None and request.headers.get("if-range", etag) == etag and not (first is not None and last and int(last) < first)
    if not is_usable:
        request.scope["headers"] = [(key, value) for key, value in request.scope["headers"] if key != b"range"]
    elif match is not None and (first >= size if first is not None else int(match[3]) == 0):
        raise HTTPException(
            416, f"Range: expected one that begins within the {size} bytes of the file, got {match[0]}", headers={"Content-Range": f"bytes */{size}"}
        )
