"""Two searches side by side: what was asked differently, the shapes that both measured, best against best, and what each took. Pure.

Scores of two searches lie on one scale where the same teacher was scored on the same documents; then the difference is paired over them, else it has the
errors of both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nas.search.results import RungResult
from nas.search.rungs import TIE_Z, paired_difference

_UNSET = "(unset)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One search: its spec, what it was run on, its board's facts, and the leading row with the result behind it."""

    spec: Mapping[str, Any]
    inputs: Mapping[str, Any]
    board: Mapping[str, Any]
    """The leaderboard's facts."""
    leader: Mapping[str, Any] | None
    """Its leading row; None while nobody leads."""
    best: RungResult | None
    """The leader's result at its rung, with its documents; None while nobody leads."""
    held_out: RungResult | None = None
    """The same on the held-out documents, by which it was not chosen; None unless it was confirmed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The second search's figure minus the first one's."""

    value: float
    standard_error: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    paired: bool
    """Whether it was taken document by document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`compare`'s answer; everything is ordered (first, second)."""

    spec: dict[str, tuple[Any, Any]]
    """Fields of the spec that differ, by dotted path; `(unset)` on the side that has none."""
    inputs: dict[str, tuple[str | None, str | None]]
    """Digests that differ, by kind and name."""
    documents: str
    """`held_out` where both leaders were confirmed, else `search`: those by which they were chosen, which flatters both."""
    other_documents: tuple[str, ...]
    """Why the documents are not the same, field by field; empty: they are, and differences are paired."""
    best: tuple[dict[str, Any] | None, dict[str, Any] | None]
    """The leading rows."""
    tasks: dict[str, Gap]
    """Leader against leader, by task that both scored with the same metric."""
    kl: Gap | None
    shapes: tuple[dict[str, Any], ...]
    """Shapes on both boards, in the order of the first: `shape` and the two rows' rank, rung, tokens, score, standard_error and kl."""
    cost: tuple[dict[str, Any] | None, dict[str, Any] | None]


def compare(first: Side, second: Side, *, shared: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]] = ()) -> Comparison:
    """The comparison of two searches at any state; what a side does not have yet is None. `shared`: rows of both boards that have the same shape."""
    held_out = first.held_out is not None and second.held_out is not None
    reasons = _other_documents(first, second, held_out=held_out)
    best = (first.held_out, second.held_out) if held_out else (first.best, second.best)
    tasks: dict[str, Gap] = {}
    kl: Gap | None = None
    if best[0] is not None and best[1] is not None:
        same_metric = [name for name in best[0].tasks if name in best[1].tasks and _metric(first, name) == _metric(second, name)]
        tasks = {name: _gap(best[0].tasks[name], best[1].tasks[name], paired=not reasons) for name in same_metric}
        if _teacher(first) == _teacher(second):
            kl = _gap(best[0].kl, best[1].kl, paired=not reasons)
    return Comparison(
        spec=dict(_differing(first.spec, second.spec)),
        inputs={name: pair for name, pair in _pairs(_digests(first), _digests(second)) if pair[0] != pair[1]},
        documents="held_out" if held_out else "search",
        other_documents=reasons,
        best=(_leader(first), _leader(second)),
        tasks=tasks,
        kl=kl,
        shapes=tuple({"shape": one["shape"], "parameters": one["parameters"], "first": _figures(one), "second": _figures(other)} for one, other in shared),
        cost=(first.board.get("cost"), second.board.get("cost")),
    )


def comparison_as_dict(comparison: Comparison) -> dict[str, Any]:
    """Plain JSON values."""
    return asdict(comparison)


def _gap(first: Any, second: Any, *, paired: bool) -> Gap:
    paired = paired and len(first.documents) == len(second.documents)
    if paired:
        difference = paired_difference(second, first)
        value, error = second.value - first.value, difference.standard_error
    else:
        value, error = second.value - first.value, math.hypot(first.standard_error, second.standard_error)
    return Gap(value=value, standard_error=error, low=value - TIE_Z * error, high=value + TIE_Z * error, paired=paired)


def _other_documents(first: Side, second: Side, *, held_out: bool) -> tuple[str, ...]:
    """What decides which documents and blocks a search scores on (`search/prepare.py`), where the two differ."""
    values = [_document_choice(side, held_out=held_out) for side in (first, second)]
    return tuple(
        f"{name}: {values[0].get(name)} and {values[1].get(name)}" for name in {**values[0], **values[1]} if values[0].get(name) != values[1].get(name)
    )


def _document_choice(side: Side, *, held_out: bool) -> dict[str, Any]:
    digests, corpus = _digests(side), side.spec["corpus"]
    return {
        "teacher": _teacher(side),
        "seed": side.spec["seed"],
        **({"evaluation.held_out_documents": side.spec["evaluation"]["held_out_documents"]} if held_out else {}),
        "evaluation.documents_per_task": side.spec["evaluation"]["documents_per_task"],
        **{f"corpus.{name}": corpus[name] for name in ("sequence_length", "validation_tokens", "calibration_tokens")},
        **{f"corpus {index}": (part["name"], part["weight"], digests.get(f"corpus {part['name']}")) for index, part in enumerate(corpus["parts"])},
        **{f"task {task['name']}": (digests.get(f"task {task['name']}"), task["num_fewshot"]) for task in side.spec["tasks"]},
        "tokens of the last rung": _last_tokens(side.spec),
    }


def _last_tokens(spec: Mapping[str, Any]) -> int:
    """The training blocks end where the validation blocks begin."""
    rungs = spec["rungs"]
    return int(rungs["first_tokens"] * rungs["factor"] ** (rungs["num_trained"] - 1))


def _teacher(side: Side) -> str | None:
    return _digests(side).get(f"teacher {side.spec['teacher']}")


def _metric(side: Side, task: str) -> Any:
    spec = next(entry for entry in side.spec["tasks"] if entry["name"] == task)
    card: Mapping[str, Any] = next((entry["card"] for entry in side.inputs["tasks"] if entry["name"] == task), {})
    return spec["metric"] or card.get("default_metric")


def _digests(side: Side) -> dict[str, str]:
    found = {f"teacher {side.inputs['teacher']['name']}": side.inputs["teacher"]["digest"]}
    found |= {f"corpus {corpus['name']}": corpus["digest"] for corpus in side.inputs["corpora"]}
    return found | {f"task {task['name']}": task["digest"] for task in side.inputs["tasks"]}


def _leader(side: Side) -> dict[str, Any] | None:
    row = side.leader
    if row is None:
        return None
    return {**_figures(row), "shape": row["shape"], "parameters": row["parameters"], "is_winner": row["number"] == side.board.get("winner")}


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("number", "origin", "rank", "rung", "tokens", "score", "standard_error", "kl", "kl_standard_error")}


def _differing(first: Any, second: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for name, (ours, theirs) in _pairs(first, second, missing=_UNSET):
            yield from _differing(ours, theirs, f"{path}.{name}" if path else name)
    elif first != second:
        yield path, (first, second)


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any], *, missing: Any = None) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in {**first, **second}:
        yield name, (first.get(name, missing), second.get(name, missing))
