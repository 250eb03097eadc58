"""Whether a step's result can be true: the controller believes no worker. Pure but for the header of a student's file.

A result that is not what was asked for, or that no student can have measured, fails its attempt with the reason `invalid_result`; nothing of it is stored
or ranked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from nas.architecture import Architecture
from nas.cost import count_parameters
from nas.errors import NotFound
from nas.search.confirmed import Confirmation
from nas.search.layout import STUDENT
from nas.search.results import Metric, RungResult
from nas.shape import Shape
from nas.shared_files import SharedFiles
from nas.spec import SearchSpec
from nas.store.records import AttemptRecord, TrialRecord
from workers.folders import MODEL_TAR, SearchFolder

MAX_HEADER_BYTES = 100 * 2**20
"""Of a safetensors file, as its own library bounds it."""
_SHARES = ("acc", "acc_norm")
"""Metrics that lie between 0 and 1 whatever the task."""


Count = Callable[[], int]
"""Parameters of a student's file. Raises Untrue: there is none. Undecided: they are not counted yet."""


class Undecided(Exception):
    """What a result is judged by is not known yet."""


class Untrue(ValueError):
    """A result that cannot be; the message says what was expected and what came."""


def check_result(
    result: Mapping[str, Any],
    *,
    attempt: AttemptRecord,
    spec: SearchSpec,
    architecture: Architecture,
    trial: TrialRecord | None,
    folders: SearchFolder,
    count: Count,
) -> None:
    """What the step of an attempt returned, if it can be true.

    Args:
        trial: the attempt's, where it has one. folders: of its search, which is where a bundle may be.
        count: of the student that the attempt left, if it was of a last rung.
    Raises:
        Untrue. Undecided: see `Count`.
    """
    match attempt.stage:
        case "prepare":
            check_prepared(result)
        case "rung":
            assert trial is not None
            assert attempt.rung is not None
            shape = Shape.from_dict(trial.shape)
            check_rung(result, spec=spec, architecture=architecture, shape=shape, rung=attempt.rung, count=count)
        case "confirm":
            check_confirmation(result)
        case "bundle":
            assert trial is not None
            check_bundle(result, trial=trial.number, folder=folders.winner(budget=trial.budget))


def check_rung(result: Mapping[str, Any], *, spec: SearchSpec, architecture: Architecture, shape: Shape, rung: int, count: Count) -> RungResult:
    """The result of a rung, if it can be true.

    Raises:
        Untrue: not of this rung and its tokens, a metric out of range, a task too many or too few, or not as many parameters as the shape has,
            in the result or (at the last rung) in the student's file.
    """
    found = _parse(result)
    _expect("rung", rung, found.rung)
    # Training ends with a whole step.
    least, step = spec.rungs.tokens(rung), spec.distillation.batch_size * spec.corpus.sequence_length
    if not least <= found.tokens < least + (step if rung else 1):
        raise Untrue(f"tokens: expected {least}, got {found.tokens}")
    parameters = count_parameters(architecture, shape).total
    _expect("parameters", parameters, found.parameters)
    _expect("tasks", sorted(task.name for task in spec.tasks) if spec.scores_tasks(rung) else [], sorted(found.tasks))
    _check_metrics(found, spec=spec)
    if rung == spec.rungs.num_trained:
        _expect("parameters of the student's file", parameters, count())
    return found


def check_confirmation(values: Mapping[str, Any]) -> Confirmation:
    """A confirmation, if it can be true."""
    try:
        found = Confirmation.from_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise Untrue(f"confirmation: expected one with all its parts, got {type(error).__name__}: {error}") from error
    if not isinstance(found.verified, bool):
        raise Untrue(f"verified: expected true or false, got {found.verified!r}")
    if found.held_out is not None:
        _check_metrics(found.held_out)
    return found


def check_prepared(values: Mapping[str, Any]) -> None:
    """What the prepare step measured of the teacher and of random weights, if it can be true."""
    for name in ("teacher", "random", "teacher_held_out", "random_held_out"):
        if name not in values:
            raise Untrue(f"prepared: expected {name}, got {sorted(values)}")
        _check_metrics(_parse(values[name]))


def check_bundle(values: Mapping[str, Any], *, trial: int, folder: Path) -> None:
    """Where the winner was packed, if it can be: in the folder that was asked for."""
    _expect("trial", trial, values.get("trial"))
    path = Path(str(values.get("bundle", "")))
    if path.parent != folder or path.name in ("", ".."):
        raise Untrue(f"bundle: expected a file in {folder}, got {path}")
    if not re.fullmatch(r"[0-9a-f]{64}", str(values.get("bundle_sha256"))):
        raise Untrue(f"bundle_sha256: expected 64 hexadecimal digits, got {values.get('bundle_sha256')!r}")
    teacher = values.get("as_teacher")
    if teacher is not None and not (isinstance(teacher, Mapping) and isinstance(teacher.get("config"), Mapping) and isinstance(teacher.get("digest"), str)):
        raise Untrue(f"as_teacher: expected a digest and a config, got {teacher!r:.200}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number that a float holds: JSON may have integers of any length."""
    return (isinstance(value, float) and math.isfinite(value)) or (isinstance(value, int) and abs(value) <= 2**53)


_HELD_OUT = ("kl", "kl_standard_error", "loss", "loss_standard_error")
"""What a full distillation measures on held-out text."""


def check_size(values: Mapping[str, Any], *, name: str) -> None:
    """How many bytes a file has, if it can have so many."""
    size = values.get(name)
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**62:
        raise Untrue(f"{name}: expected a number of bytes, got {size!r:.80}")


def check_distilled(values: Mapping[str, Any], *, recipe: Mapping[str, Any], folders: SearchFolder) -> None:
    """What a full distillation made, if it can be true: all the tokens were trained on, and the file lies where it was asked for.

    Raises:
        Untrue
    """
    least, step = recipe["tokens"], recipe["batch_size"] * recipe["sequence_length"]
    tokens = values.get("tokens")
    if not isinstance(tokens, int) or not least <= tokens < least + step:
        raise Untrue(f"tokens: expected {least}, got {tokens}")
    for name in ("held_out_before", "held_out_after"):
        held_out = values.get(name)
        numbers = [held_out.get(number) for number in _HELD_OUT] if isinstance(held_out, Mapping) else [None]
        if not all(map(is_number, numbers)):
            raise Untrue(f"{name}: expected {', '.join(_HELD_OUT)}, finite, got {held_out}")
    if not is_number(seconds := values.get("seconds")) or seconds < 0:
        raise Untrue(f"seconds: expected a duration, got {seconds!r:.80}")
    check_size(values, name="bytes")
    _expect("file", str(folders.path / MODEL_TAR), values.get("file"))
    if not re.fullmatch(r"[0-9a-f]{64}", str(values.get("sha256"))):
        raise Untrue(f"sha256: expected 64 hexadecimal digits, got {values.get('sha256')!r}")


def count_file_parameters(folder: Path) -> int:
    """Parameters of a saved model, by the headers of its files.

    Raises:
        Untrue: there is none, or a header cannot be read.
    """
    return _count({path.name: (path.stat().st_size, partial(_read, path)) for path in sorted(folder.glob("*.safetensors"))}, place=str(folder))


def count_tree_parameters(shared: SharedFiles, key: str) -> int:
    """The same of a student that lies where machines share files by URL, of which the headers alone are fetched.

    Args:
        key: of its trial's tree.
    Raises:
        Untrue: there is none, or a header cannot be read. FilesUnavailable: the URL cannot be reached.
    """
    manifest = shared.find_tree(key)
    files = {} if manifest is None else {path: file for path, file in manifest.files.items() if PurePosixPath(path).match(f"{STUDENT}/*.safetensors")}
    try:
        return _count({path: (file.bytes, partial(_fetch, shared, f"{key}/{file.sha256}")) for path, file in files.items()}, place=f"{shared.url}/{key}")
    except NotFound as gone:
        raise Untrue(f"student: expected its weights, got {gone}") from gone


def _read(path: Path, start: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(length)


def _fetch(shared: SharedFiles, key: str, start: int, length: int) -> bytes:
    return shared.read_range(key, start=start, length=length)


def _count(files: Mapping[str, tuple[int, Callable[[int, int], bytes]]], *, place: str) -> int:
    """Of files by name: their size, and what reads so many bytes from a place on."""
    if not files:
        raise Untrue(f"student: expected its weights in {place}, got none")
    headers = [_header(name, size=size, read=read) for name, (size, read) in files.items()]
    try:
        return sum(math.prod(tensor["shape"]) for header in headers for name, tensor in header.items() if name != "__metadata__")
    except (KeyError, TypeError) as error:
        raise Untrue(f"student: expected the shape of every tensor in {place}, got {type(error).__name__}: {error}") from error


def _header(name: str, *, size: int, read: Callable[[int, int], bytes]) -> dict[str, Any]:
    try:
        length = int.from_bytes(read(0, 8), "little") if size >= 8 else size
        header = json.loads(read(8, length)) if length <= min(MAX_HEADER_BYTES, size - 8) else None
    except (OSError, ValueError) as error:
        raise Untrue(f"{name}: expected a safetensors header, got {error}") from error
    if not isinstance(header, dict):
        raise Untrue(f"{name}: expected a safetensors header, got something else")
    return header


def _parse(values: Mapping[str, Any]) -> RungResult:
    try:
        return RungResult.from_dict(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise Untrue(f"result: expected one with all its parts, got {type(error).__name__}: {error}") from error


def _check_metrics(result: RungResult, *, spec: SearchSpec | None = None) -> None:
    """Finite, and in the range of what they measure."""
    for name, metric in _metrics(result):
        numbers = (metric.value, metric.standard_error, *metric.documents)
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise Untrue(f"{name}: expected finite numbers, got {metric.value} +- {metric.standard_error}")
        if metric.standard_error < 0:
            raise Untrue(f"{name}: expected a standard error of at least 0, got {metric.standard_error}")
    for name, metric in (("kl", result.kl), ("loss", result.loss)):
        # Below zero only by rounding: the divergence of a student that equals its teacher.
        if metric.value < -1e-3:
            raise Untrue(f"{name}: expected at least 0, got {metric.value}")
    for task in spec.tasks if spec is not None else ():
        if task.name in result.tasks and task.metric in _SHARES and not 0 <= result.tasks[task.name].value <= 1:
            raise Untrue(f"{task.metric} of {task.name}: expected 0 to 1, got {result.tasks[task.name].value}")
    for name, cost in result.costs.items():
        if not math.isfinite(cost) or cost < 0:
            raise Untrue(f"cost {name}: expected a finite number of at least 0, got {cost}")


def _metrics(result: RungResult) -> Iterator[tuple[str, Metric]]:
    yield from (("kl", result.kl), ("loss", result.loss))
    yield from result.tasks.items()
    for task, forms in result.likelihoods.items():
        yield from ((f"{form} of {task}", metric) for form, metric in forms.items())


def _expect(name: str, expected: object, got: object) -> None:
    if got != expected:
        raise Untrue(f"{name}: expected {expected}, got {got}")
