"""What all answers share: their base, the envelope of a list, the shape of an error."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

_Item = TypeVar("_Item", bound=BaseModel)


class Answer(BaseModel):
    """Base of all answers: built from records by attribute, documented by the docstrings of the fields."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)


class Page(Answer, Generic[_Item]):
    """One page of a list."""

    object: Literal["list"] = "list"
    data: list[_Item]
    has_more: bool = False
    next_cursor: str | None = None
    """Give it as `after` to get the next page; null on the last one."""


class FieldError(Answer):
    """One thing that is wrong with a request."""

    field: str
    """Dotted path of the field: `budget.max_parameters`."""
    expected: str
    got: str


class ProblemAnswer(Answer):
    """RFC 9457 problem: every error has this shape."""

    type: str
    """Address of the page that explains this kind of problem."""
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    """Also in the header X-Request-Id; the service's log names the request by it."""
    errors: list[FieldError] | None = None
    quota: str | None = None
    """Of a 429: the quota that is used up, such as `max_active_searches`."""
    limit: float | None = None
    used: float | None = None
