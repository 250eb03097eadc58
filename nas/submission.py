"""What a submitted spec means here and now: names looked up, space built, work priced. No compute, no torch.

The API calls `check_submission` before it stores anything; the controller rebuilds the same space from the stored inputs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.architecture import read_architecture
from nas.chain import ID_PREFIX, find_source, take_winner
from nas.errors import InvalidSpec, Problem
from nas.estimate import Speed, estimate_seconds, explain_shape, task_work, total_work
from nas.evaluate.scores import FORMS_BY_KIND
from nas.pricing import price
from nas.shape import Shape
from nas.space import SearchSpace, build_spaces
from nas.spec import LINE, SearchSpec, parse_spec
from nas.store.machines import SpeedRecord
from nas.store.records import DEFAULT_PROJECT, CorpusRecord, SearchRecord, TaskRecord, TeacherRecord
from nas.store.store import Store
from nas.warm_start import check_warm_start

MAX_TOKENS = 2**53
"""Beyond it a JSON reader may round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A spec that can be run: what it refers to, and what it will cost."""

    spec: SearchSpec
    """As it is stored and run: `rungs.first_tokens` follows from `rungs.total_tokens`, where that is given."""
    inputs: dict[str, Any]
    """Snapshot of the teacher, corpora and tasks (name, digest, place), so that a later change of the registry changes nothing. A teacher that is another
    search's winner has its place only when the search starts, and its digest when there is one (`nas/chain.py`)."""
    plan: dict[str, Any]
    """What it comes to (`nas/pricing.py`)."""

    def build_spaces(self) -> tuple[SearchSpace, ...]:
        """The legal shapes of each budget."""
        return build_spaces(self.spec, architecture=read_architecture(self.inputs["teacher"]["config"]))


def check_submission(spec: SearchSpec, *, store: Store, project: str = DEFAULT_PROJECT) -> Submission:
    """Look up every name and build the search space. Teachers, corpora and tasks are everybody's; of searches the spec may name the project's own.

    Raises:
        InvalidSpec: unknown corpus, task or metric, a teacher that is neither registered nor a search that may have a winner, a duplicate name, a sequence
            longer than the teacher's context, a named shape that cannot be evaluated, an impossible range or budget. All problems of names are reported
            together.
        BudgetInfeasible: nothing fits the budget; the message says the smallest legal shape.
    """
    return _plan_for(spec, inputs=_look_up(spec, store=store, project=project), store=store, project=project)


def take_teacher(search: SearchRecord, *, store: Store, data_folder: Path) -> Submission:
    """A search that was submitted while its teacher was still searched for, or lay who knows where: the same with the winner as its teacher.

    Raises:
        TeacherUnavailable: the search that it names has no such winner.
        InvalidSpec: what was possible with the stand-in is not with the winner.
    """
    teacher = search.inputs["teacher"]
    winner = take_winner(store.get_search(teacher["search"]), budget=teacher["budget"], data_folder=data_folder)
    return _plan_for(parse_spec(json.dumps(search.spec)), inputs={**search.inputs, "teacher": winner}, store=store, project=search.project)


def _plan_for(spec: SearchSpec, *, inputs: dict[str, Any], store: Store, project: str) -> Submission:
    """Check a spec against what it names, and plan it."""
    config = inputs["teacher"]["config"]
    problems = [*_duplicates("corpus.parts", [part.name for part in spec.corpus.parts]), *_duplicates("tasks", [task.name for task in spec.tasks])]
    problems += [*_objectives(spec), *_label(spec)]
    problems += [*_lengths(spec, context=config.get("max_position_embeddings")), *_scoring(spec, cards=[task["card"] for task in inputs["tasks"]])]
    if problems:
        raise InvalidSpec(*problems)
    spec, plan = price(spec, config=config)
    if problems := check_warm_start(spec, inputs=inputs, store=store, project=project):
        raise InvalidSpec(*problems)
    return Submission(spec=spec, inputs=inputs, plan=plan)


def estimate_time(submission: Submission, *, speed: SpeedRecord) -> dict[str, Any]:
    """How long the search will take on such workers; without their speed, why that cannot be told."""
    worker = {
        "cpus": speed.cpus,
        "gpus": speed.gpus,
        "dtype": speed.dtype,
        "host": speed.host,
        "measured_at": speed.measured_at and speed.measured_at.isoformat(),
    }
    if speed.points is None:
        reason = f"not measured: {speed.error}" if speed.error else "being measured, once, as soon as a worker with these resources is free; ask again"
        return {"worker": worker, "known": False, "pending": speed.error is None, "reason": reason}
    spec, spaces = submission.spec, submission.build_spaces()
    tasks = task_work(spec, cards=[task["card"] for task in submission.inputs["tasks"]], vocab_size=spaces[0].architecture.vocab_size)
    work = total_work(spec, plans=submission.plan["budgets"])
    return {
        "worker": worker,
        "known": True,
        "pending": False,
        **estimate_seconds(spec, spaces=spaces, work=work, tasks=tasks, speed=Speed(points=speed.points)),
    }


def ask_about(submission: Submission, shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    """Of each shape whether the search may try it under one of its budgets, and why not under the one that it misses by least."""
    spaces = submission.build_spaces() if shapes else ()
    return [explain_shape(min(spaces, key=lambda space: (len(space.explain(shape)), not space.proposes(shape))), shape) for shape in shapes]


def _look_up(spec: SearchSpec, *, store: Store, project: str) -> dict[str, Any]:
    """What the spec names, as it is now: the submission's inputs."""
    problems: list[Problem] = []
    found = store.find_registered(teacher=spec.teacher, corpus_names=[part.name for part in spec.corpus.parts], task_names=[task.name for task in spec.tasks])
    teacher: dict[str, Any] | None = None
    if found.teacher is not None:
        teacher = {"name": found.teacher.name, "digest": found.teacher.digest, "path": found.teacher.path, "config": found.teacher.config}
    elif spec.teacher.startswith(ID_PREFIX):
        try:
            teacher = find_source(spec, store=store, project=project)
        except InvalidSpec as invalid:
            problems += invalid.problems
    else:
        problems += _unknown({"teacher": spec.teacher}, registered=store.list_teachers)
    new_corpora = {f"corpus.parts.{index}.name": part.name for index, part in enumerate(spec.corpus.parts) if part.name not in found.corpora}
    new_tasks = {f"tasks.{index}.name": task.name for index, task in enumerate(spec.tasks) if task.name not in found.tasks}
    problems += [*_unknown(new_corpora, registered=store.list_corpora), *_unknown(new_tasks, registered=store.list_tasks)]
    if problems:
        raise InvalidSpec(*problems)
    corpora, tasks = [found.corpora[part.name] for part in spec.corpus.parts], [found.tasks[task.name] for task in spec.tasks]
    return {
        "teacher": teacher,
        "corpora": [{"name": corpus.name, "digest": corpus.digest, "files": list(corpus.files)} for corpus in corpora],
        "tasks": [{"name": task.name, "digest": task.digest, "folder": task.folder, "card": task.card} for task in tasks],
    }


def _unknown(names: Mapping[str, str], *, registered: Callable[[], Sequence[TeacherRecord | CorpusRecord | TaskRecord]]) -> list[Problem]:
    """That nothing is registered under these names, by the field that holds each."""
    known = ", ".join(sorted(record.name for record in registered())[:20]) or "none yet" if names else ""
    return [Problem(field=field, expected=f"a registered name ({known})", got=name) for field, name in names.items()]


def _lengths(spec: SearchSpec, *, context: object) -> list[Problem]:
    """Lengths that the teacher's context, or each other, forbid."""
    corpus, new_tokens, problems = spec.corpus, spec.evaluation.latency_new_tokens, []
    if isinstance(context, int) and corpus.sequence_length > context:
        problems.append(Problem(field="corpus.sequence_length", expected=f"at most the teacher's context of {context}", got=str(corpus.sequence_length)))
    if isinstance(context, int):
        problems.extend(_long_workloads(spec, context=context))
    if isinstance(context, int) and new_tokens >= context:
        problems.append(Problem(field="evaluation.latency_new_tokens", expected=f"less than the teacher's context of {context}", got=str(new_tokens)))
    if corpus.validation_tokens < 2 * corpus.sequence_length:
        expected = f"at least two blocks of sequence_length={corpus.sequence_length}, whose spread is the standard error"
        problems.append(Problem(field="corpus.validation_tokens", expected=expected, got=str(corpus.validation_tokens)))
    step, last = spec.distillation.batch_size * corpus.sequence_length, spec.rungs.tokens(spec.rungs.num_trained)
    if spec.rungs.total_tokens is None and spec.rungs.first_tokens < 2 * step:
        problems.append(
            Problem(field="rungs.first_tokens", expected=f"at least two steps of batch_size x sequence_length = {step}", got=str(spec.rungs.first_tokens))
        )
    if spec.rungs.total_tokens is None and last > MAX_TOKENS:
        problems.append(Problem(field="rungs.factor", expected=f"a last rung of at most {MAX_TOKENS} tokens", got=str(last)))
    return problems


def _long_workloads(spec: SearchSpec, *, context: int) -> list[Problem]:
    """Loads of the budgets that no model of this teacher can take."""
    problems = []
    for index, budget in enumerate(spec.budgets):
        field, tokens = f"more_budgets.{index - 1}" if index else "budget", budget.workload.context_length
        if tokens is not None and tokens > context:
            problems.append(Problem(field=f"{field}.workload.context_length", expected=f"at most the teacher's context of {context}", got=str(tokens)))
        for number, workload in enumerate(budget.latency):
            if (tokens := workload.prompt_tokens + workload.new_tokens) > context:
                expected = f"with new_tokens at most the teacher's context of {context}"
                problems.append(Problem(field=f"{field}.latency.{number}.prompt_tokens", expected=expected, got=str(tokens)))
    return problems


def _scoring(spec: SearchSpec, *, cards: list[dict[str, Any]]) -> list[Problem]:
    problems = []
    for index, (task, card) in enumerate(zip(spec.tasks, cards, strict=True)):
        # Ranks come from paired differences, so a metric must be a mean, ratio or perplexity over documents.
        kind = card["output_type"]
        if kind not in FORMS_BY_KIND:
            expected = f"a task of the kinds {', '.join(FORMS_BY_KIND)}: a rung is scored by the probabilities of given answers, not by generating any"
            problems.append(Problem(field=f"tasks.{index}.name", expected=expected, got=f"{task.name}, which is {kind}"))
            continue
        own = [metric["name"] for metric in card["metrics"] if metric.get("paired", True)]
        metrics = list(dict.fromkeys([*own, *FORMS_BY_KIND[kind]]))
        metric = task.metric or card["default_metric"]
        if metric not in metrics:
            expected = f"one of {task.name}'s metrics that can be compared document by document: {', '.join(metrics)}"
            problems.append(Problem(field=f"tasks.{index}.metric", expected=expected, got=metric))
        if task.num_fewshot > (most := card.get("max_fewshot", 0)):
            expected = f"at most {most}: {task.name} has " + ("no more examples" if most else "no split of its own for examples")
            problems.append(Problem(field=f"tasks.{index}.num_fewshot", expected=expected, got=str(task.num_fewshot)))
    return problems


def _objectives(spec: SearchSpec) -> list[Problem]:
    """A latency that no budget has a workload for is never measured."""
    every = [[workload.name for workload in budget.latency] for budget in (spec.budget, *spec.more_budgets)]
    names = [name for name in every[0] if all(name in others for others in every)]
    expected = f"the name of a workload of every budget's latency ({', '.join(names) or 'there is none'})"
    return [
        Problem(field=f"objectives.{index}", expected=expected, got=objective)
        for index, objective in enumerate(spec.objectives)
        if ":" in objective and objective.split(":", 1)[1] not in names
    ]


def _label(spec: SearchSpec) -> list[Problem]:
    """Asked of new searches only: those of an older version may have any label, and go on."""
    is_line = re.fullmatch(LINE, spec.label) is not None
    return [] if is_line else [Problem(field="label", expected="a line of text without control characters", got=repr(spec.label)[:80])]


def _duplicates(field: str, names: list[str]) -> list[Problem]:
    return [Problem(field=f"{field}.{index}.name", expected="each name once", got=f"{name} again") for index, name in enumerate(names) if name in names[:index]]
