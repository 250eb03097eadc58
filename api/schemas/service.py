"""What the service says of itself."""

from __future__ import annotations

from typing import Literal

from api.schemas.common import Answer


class Health(Answer):
    """The process answers."""

    status: Literal["ok"]


class Readiness(Answer):
    """The service can serve."""

    status: Literal["ready", "degraded"]
    """degraded: no controller lives, so searches wait."""
    schema_revision: str
    """Of the database."""
    controllers: int
    """Those that live."""


class VersionAnswer(Answer):
    """What runs here."""

    version: str
    commit: str | None
    """Of the source that the image was built from (NAS_COMMIT); null where nobody said."""
    python: str
    schema_revision: str | None
    libraries: dict[str, str]
    """Those that are installed beside the API; an image of the API alone has neither torch nor ray."""
