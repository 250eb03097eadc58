"""Every exception of ours. They know nothing of HTTP; `api/problems.py` maps them.

NasError
├─ InvalidSpec(ValueError)        the request cannot be run                          422
│  └─ BudgetInfeasible            nothing in the space fits the budget               422
├─ NotFound(LookupError)          unknown search, trial, teacher, corpus, task       404
│  └─ NotPrepared                 a prepared folder was there, and is gone           prepared again
├─ Conflict                       not allowed in this state                          409
├─ IdempotencyKeyReused           the key of a request came with another one before  422
├─ PreconditionFailed             changed since the caller read it                   412
├─ StoreUnavailable               the database does not answer                       503
├─ KeyRefused                     an API key that is unknown, revoked or expired     401
├─ QuotaExceeded                  the project has used up what it may                429
├─ Outdated                       a page of something that has changed since         410
├─ Fenced                         another controller leads; this write is too late   the controller stops
├─ TeacherUnavailable             cannot be loaded, or its family is unknown         job fails, reason kept
├─ CorpusUnavailable              cannot be read, or is too small for the spec       job fails, reason kept
├─ TaskUnavailable                cannot be resolved offline, or scores nothing      job fails, reason kept
├─ DoesNotFit                     more memory or disk is needed than there is        job fails, numbers kept
├─ CorruptFile                    a file does not match its manifest                 recomputed where possible
└─ FilesUnavailable               the shared files cannot be reached                 tried again
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong with a request: where, what was expected, what came."""

    field: str
    """Dotted path of the field, as the user wrote it: `budget.max_parameters`."""
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, got {self.got}"


class NasError(Exception):
    """Base of all errors that a caller may want to catch together."""


class InvalidSpec(NasError, ValueError):
    """The request cannot be run; `problems` names each field, what it expects and what came."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(str(problem) for problem in problems))
        self.problems = problems


class BudgetInfeasible(InvalidSpec):
    """No legal shape fits the budget; the message carries the smallest legal shape."""


class NotFound(NasError, LookupError):
    """There is no such search, trial, teacher, corpus or task."""


class NotPrepared(NotFound):
    """A search's prepared folder is not there, or not whole: deleted, or not part of what a backup brought back."""


class Conflict(NasError):
    """The resource exists, but not in a state that allows this."""


class IdempotencyKeyReused(NasError):
    """The key of a request came with another operation or body before."""


class PreconditionFailed(NasError):
    """The resource has changed since the caller read it; read it again and decide again."""


class StoreUnavailable(NasError):
    """The database does not answer. What was asked may be asked again; whether a write was kept can be seen then."""


class KeyRefused(NasError):
    """An API key (or a browser's session) that is unknown, revoked or expired. The message never repeats the secret."""


class QuotaExceeded(NasError):
    """A project would go over one of its quotas; nothing was stored."""

    def __init__(self, message: str, *, quota: str, limit: float, used: float, retry_after_seconds: int | None) -> None:
        """
        Args:
            quota: which one, a field of `nas.store.quotas.Quotas`.
            limit: what the project may use of it.
            used: what it has used without this request.
            retry_after_seconds: when the same request may pass without anybody doing anything; None: time alone does not help.
        """
        super().__init__(message)
        self.quota = quota
        self.limit = limit
        self.used = used
        self.retry_after_seconds = retry_after_seconds


class Outdated(NasError):
    """A version of something that has changed since, and is not kept any more."""


class Fenced(NasError):
    """The writer lost its leadership: another controller may lead by now, so nothing of it may be written."""


class TeacherUnavailable(NasError):
    """The teacher's folder is unsafe, incomplete or of a family without a row in `families.py`."""


class CorpusUnavailable(NasError):
    """The corpus cannot be read, or holds fewer tokens than the spec asks for."""


class TaskUnavailable(NasError):
    """An lm-eval task cannot be resolved from its folder, or lacks the metric asked for."""


class DoesNotFit(NasError):
    """More memory or disk is needed than there is; the message names each component and its bytes."""


class CorruptFile(NasError):
    """A stored file's digest differs from its manifest."""


class FilesUnavailable(NasError):
    """The files that all machines share (NAS_SHARED) cannot be reached, or refuse."""
