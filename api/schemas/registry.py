"""Registered teachers, corpora and tasks."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from api.schemas.common import Answer


class TeacherAnswer(Answer):
    """A registered teacher."""

    object: Literal["teacher"] = "teacher"
    name: str
    digest: str
    """SHA-256 over its files."""
    parameters: int
    config: dict[str, Any]
    """Its Hugging Face `config.json`."""
    added_at: datetime


class CorpusAnswer(Answer):
    """A registered corpus."""

    object: Literal["corpus"] = "corpus"
    name: str
    digest: str
    num_documents: int
    num_bytes: int
    added_at: datetime


class TaskAnswer(Answer):
    """A registered lm-eval task."""

    object: Literal["task"] = "task"
    name: str
    digest: str
    card: dict[str, Any]
    """Its metrics (the first one is the default), documents and lm-eval version."""
    added_at: datetime
