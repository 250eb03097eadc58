"""Earlier searches as a source: whether a new one may build on them, and what they know that it need not find out again.

Two uses. Any result at the same tokens of the same recipe teaches the sampler, whatever its seed. One that came about under the *same conditions*
(everything that is prepared, the seed and the kind of device among it) is the result that training would give again: it is taken as it is.
Only ended searches are read: they never change, so decisions stay a function of what the store holds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nas.chain import is_stand_in
from nas.errors import NotFound, Problem
from nas.search.layout import prepared_key
from nas.search.results import RungResult, is_repeat
from nas.shape import Shape
from nas.spec import SearchSpec, dump_spec, parse_spec
from nas.store.records import SearchRecord
from nas.store.store import Store

_OF_NO_CONSEQUENCE = {"distillation": ("micro_batch_size", "moments", "max_signal_bytes")}
"""Fields that change how a student is trained, but not which student comes out (bfloat16 moments: nearly)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What one rung of an earlier search's trial measured."""

    search: str
    trial: int
    shape: Shape
    result: RungResult
    is_answer: bool
    """Whether training it here would give this result again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What earlier searches know, in the order in which they found it out."""

    by_tokens: Mapping[int, Sequence[Known]] = field(default_factory=dict)

    def at(self, tokens: int) -> Sequence[Known]:
        """Every result at so many tokens; a shape may have several, of several seeds."""
        return self.by_tokens.get(tokens, ())

    def answer(self, shape: Shape, *, tokens: int) -> Known | None:
        """The result that training this shape would give, if one is known."""
        return next((known for known in self.at(tokens) if known.is_answer and known.shape == shape), None)


def check_warm_start(spec: SearchSpec, *, inputs: Mapping[str, Any], store: Store, project: str) -> list[Problem]:
    """Why the searches that `warm_start_from` names cannot serve this one: field by field, what is expected and what they had."""
    problems = []
    if spec.warm_start_from and is_stand_in(inputs):
        expected = f"none while the teacher is not known: only searches on the same one serve, and {spec.teacher} has no winner yet"
        return [Problem(field="warm_start_from", expected=expected, got=", ".join(spec.warm_start_from))]
    for index, search_id in enumerate(spec.warm_start_from):
        field_ = f"warm_start_from.{index}"
        try:
            earlier = store.get_search(search_id, project=project)
        except NotFound:
            problems.append(Problem(field=field_, expected="the id of a search", got=search_id))
            continue
        if not earlier.state.is_terminal:
            problems.append(Problem(field=field_, expected=f"a search that has ended ({search_id} still finds out more)", got=str(earlier.state)))
            continue
        problems += [
            Problem(field=field_, expected=f"{name} {_shown(ours)}, as in this search", got=f"{_shown(theirs)} in {search_id}")
            for name, ours, theirs in _differences(spec, inputs=inputs, earlier=earlier)
        ]
    return problems


def recall(record: SearchRecord, *, store: Store) -> Memory:
    """What the searches that the record's spec names in `warm_start_from` know of its rungs."""
    spec, inputs = parse_spec(json.dumps(record.spec)), record.inputs
    wanted = {spec.rungs.tokens(rung) for rung in range(spec.rungs.num_trained + 1)}
    key = prepared_key(spec, inputs=inputs) if spec.warm_start_from else ""
    found: defaultdict[int, list[Known]] = defaultdict(list)
    for search_id in spec.warm_start_from:
        earlier = store.get_search(search_id)
        their_spec = parse_spec(json.dumps(earlier.spec))
        is_same = prepared_key(their_spec, inputs=earlier.inputs) == key and (their_spec.resources.gpus > 0) == (spec.resources.gpus > 0)
        trials = store.list_trials(search_id)
        shapes = {trial.number: Shape.from_dict(trial.shape) for trial in trials}
        repeats = {trial.number for trial in trials if is_repeat(trial.origin)}
        for row in store.list_rungs(search_id):
            if row.trial in repeats:  # its seed is none of a search's; its shape's result is the anchor's
                continue
            result = RungResult.from_dict(row.result)
            if result.tokens in wanted:
                known = Known(search=search_id, trial=row.trial, shape=shapes[row.trial], result=result, is_answer=is_same)
                found[result.tokens].append(known)
    return Memory(by_tokens=dict(found))


def _differences(spec: SearchSpec, *, inputs: Mapping[str, Any], earlier: SearchRecord) -> list[tuple[str, Any, Any]]:
    """(field, ours, theirs) of all that makes their KLs incomparable with ours."""
    their_spec = parse_spec(json.dumps(earlier.spec))
    ours, theirs = _conditions(spec, inputs=inputs), _conditions(their_spec, inputs=earlier.inputs)
    differences = [(name, ours.get(name), theirs.get(name)) for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    tokens, their_tokens = (sorted({one.rungs.tokens(rung) for rung in range(1, one.rungs.num_trained + 1)}) for one in (spec, their_spec))
    if not set(tokens) & set(their_tokens):
        differences.append(("rungs: a trained rung of one of these tokens:", tokens, their_tokens))
    return differences


def _conditions(spec: SearchSpec, *, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Teacher, corpus and recipe by dotted name."""
    values = dump_spec(spec)
    recipe = {
        part: {name: value for name, value in values[part].items() if name not in _OF_NO_CONSEQUENCE.get(part, ())} for part in ("compression", "distillation")
    }
    return {
        "teacher": inputs["teacher"]["digest"],
        "corpus.parts": [[corpus["digest"], part.weight] for part, corpus in zip(spec.corpus.parts, inputs["corpora"], strict=True)],
        **{f"corpus.{name}": value for name, value in values["corpus"].items() if name != "parts"},
        **{f"{part}.{name}": value for part, fields in recipe.items() for name, value in fields.items()},
    }


def _shown(value: Any) -> str:
    return value[:16] if isinstance(value, str) else json.dumps(value)
