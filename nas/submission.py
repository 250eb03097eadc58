"""What a submitted spec means here and now: names looked up, space built, work priced. No compute, no torch.

The API calls `check_submission` before it stores anything; the controller rebuilds the same space from the stored inputs.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from nas.architecture import Architecture, read_architecture
from nas.budget import limits
from nas.chain import ID_PREFIX, find_source, take_winner
from nas.compress.train_plan import trunk_rate
from nas.cost import count_parameters
from nas.errors import InvalidSpec, Problem
from nas.estimate import Speed, describe_space, estimate_seconds, explain_shape, planned_work, task_work, total_work, with_first_tokens
from nas.evaluate.scores import FORMS_BY_KIND
from nas.memory import TeacherMemory, Training, inference_memory, least_training_memory, preparation_disk, rung_disk, training_memory
from nas.shape import Shape
from nas.space import SearchSpace, build_spaces, forced_anchors
from nas.spec import LINE, SearchSpec, parse_spec
from nas.store.records import DEFAULT_PROJECT, CorpusRecord, SearchRecord, SpeedRecord, TaskRecord, TeacherRecord
from nas.store.store import Store
from nas.warm_start import check_warm_start

MAX_TOKENS = 2**53
"""Beyond it a JSON reader may round."""

_Record = TypeVar("_Record", TeacherRecord, CorpusRecord, TaskRecord)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A spec that can be run: what it refers to, and what it will cost."""

    spec: SearchSpec
    """As it is stored and run: `rungs.first_tokens` follows from `rungs.total_tokens`, where that is given."""
    inputs: dict[str, Any]
    """Snapshot of the teacher, corpora and tasks (name, digest, place), so that a later change of the registry changes nothing. A teacher that is another
    search's winner has its place only when the search starts, and its digest when there is one (`nas/chain.py`)."""
    plan: dict[str, Any]
    """Legal shapes, ceilings and anchors of each budget, teacher parameters, learning rate, tokens per rung and at most in all."""
    spaces: tuple[SearchSpace, ...] = field(compare=False, repr=False)
    """The legal shapes of each budget."""


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
    spaces = build_spaces(spec, architecture=read_architecture(config))
    problems = [
        Problem(field=f"shapes.{index}.{problem.field}", expected=problem.expected, got=problem.got)
        for index, shape in enumerate(spec.shapes)
        for problem in min((space.explain(shape) for space in spaces), key=len)  # one budget that it fits is enough
    ]
    if problems:
        raise InvalidSpec(*problems)
    if problems := check_warm_start(spec, inputs=inputs, store=store, project=project):
        raise InvalidSpec(*problems)
    budgets = _describe_budgets(spec, spaces=spaces)
    spec = with_first_tokens(spec, plans=budgets)
    return Submission(spec=spec, inputs=inputs, plan=_plan(spec, spaces=spaces, budgets=budgets), spaces=tuple(spaces))


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
    spec, spaces = submission.spec, submission.spaces
    tasks = task_work(spec, cards=[task["card"] for task in submission.inputs["tasks"]], vocab_size=spaces[0].architecture.vocab_size)
    work = total_work(spec, plans=submission.plan["budgets"])
    return {
        "worker": worker,
        "known": True,
        "pending": False,
        **estimate_seconds(spec, spaces=spaces, work=work, tasks=tasks, speed=Speed(points=speed.points)),
    }


def ask_about(submission: Submission, shape: Shape) -> dict[str, Any]:
    """Whether the search may try a shape under one of its budgets, and why not under the one that it misses by least."""
    return explain_shape(min(submission.spaces, key=lambda space: (len(space.explain(shape)), not space.proposes(shape))), shape)


def _look_up(spec: SearchSpec, *, store: Store, project: str) -> dict[str, Any]:
    """What the spec names, as it is now: the submission's inputs."""
    problems: list[Problem] = []
    teachers, corpora, tasks = store.list_teachers(), store.list_corpora(), store.list_tasks()
    teacher: dict[str, Any] | None = None
    if spec.teacher.startswith(ID_PREFIX) and all(record.name != spec.teacher for record in teachers):
        try:
            teacher = find_source(spec, store=store, project=project)
        except InvalidSpec as invalid:
            problems += invalid.problems
    elif (registered := _find(teachers, name=spec.teacher, field="teacher", problems=problems)) is not None:
        teacher = {"name": registered.name, "digest": registered.digest, "path": registered.path, "config": registered.config}
    found_corpora = [_find(corpora, name=part.name, field=f"corpus.parts.{index}.name", problems=problems) for index, part in enumerate(spec.corpus.parts)]
    found_tasks = [_find(tasks, name=task.name, field=f"tasks.{index}.name", problems=problems) for index, task in enumerate(spec.tasks)]
    if problems:
        raise InvalidSpec(*problems)
    return {
        "teacher": teacher,
        "corpora": [{"name": corpus.name, "digest": corpus.digest, "files": list(corpus.files)} for corpus in found_corpora if corpus],
        "tasks": [{"name": task.name, "digest": task.digest, "folder": task.folder, "card": task.card} for task in found_tasks if task],
    }


def _find(records: list[_Record], *, name: str, field: str, problems: list[Problem]) -> _Record | None:
    for record in records:
        if record.name == name:
            return record
    known = ", ".join(sorted(record.name for record in records)[:20]) or "none yet"
    problems.append(Problem(field=field, expected=f"a registered name ({known})", got=name))
    return None


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


def _describe_budgets(spec: SearchSpec, *, spaces: tuple[SearchSpace, ...]) -> list[dict[str, Any]]:
    """Each budget with the teacher known, and what it searches. A shape of the user's belongs to the first budget that it fits."""
    named = [next(index for index, space in enumerate(spaces) if not space.explain(shape)) for shape in spec.shapes]
    return [
        _describe_budget(spec, space=space, named=[shape for shape, of in zip(spec.shapes, named, strict=True) if of == index])
        for index, space in enumerate(spaces)
    ]


def _plan(spec: SearchSpec, *, spaces: tuple[SearchSpace, ...], budgets: list[dict[str, Any]]) -> dict[str, Any]:
    architecture: Architecture = spaces[0].architecture
    teacher = count_parameters(architecture, architecture.shape)
    rungs = [spec.rungs.tokens(rung) for rung in range(spec.rungs.num_trained + 1)]
    work = planned_work(spec, budgets=budgets)
    learning_rate, rate_follows_loss = trunk_rate(spec.distillation.learning_rate, teacher_hidden_size=architecture.shape.hidden_size)
    return {
        "teacher_parameters": teacher.total,
        "teacher_non_embedding_parameters": teacher.non_embedding,
        "teacher_shape": architecture.shape.as_dict(),
        **budgets[0],
        "budgets": budgets,
        "rung_tokens": rungs,
        "learning_rate": learning_rate,
        "rate_follows_loss": rate_follows_loss,
        **work,
        **_needs(spec, spaces=spaces, trials=work["max_trials"]),
    }


def _describe_budget(spec: SearchSpec, *, space: SearchSpace, named: list[Shape]) -> dict[str, Any]:
    """One budget with the teacher known, and what it searches; the plan's own fields are those of the first. `named`: the user's shapes of this budget."""
    budget = space.budget
    anchors = space.anchors() if spec.controls.anchors else {}
    at_least = len(anchors) + len(named)
    return {
        "max_parameters": budget.max_parameters,
        "min_parameters": budget.min_parameters,
        "counting": budget.counting,
        "ceilings": {ceiling.cost: ceiling.maximum for ceiling in budget.ceilings},
        "teacher_costs": dict(budget.teacher),
        "workload": asdict(budget.workload),
        "latency_ceilings": {name: maximum for workload in budget.latency for name, maximum in limits(workload).items()},
        "legal_shapes": space.count(),
        "anchors": {name: _described(space.architecture, shape) for name, shape in anchors.items()},
        "space": describe_space(space),
        "searched": max(min(spec.sampler.max_trials, space.count() + at_least), at_least),
        "forced": len({*forced_anchors(spec, anchors=anchors).values(), *named}),
    }


def _needs(spec: SearchSpec, *, spaces: tuple[SearchSpace, ...], trials: int) -> dict[str, Any]:
    """Memory of one trial of the largest student in view, as asked for and at the least, and the disk that the search fills, in bytes.

    A worker compares with its own device before each step, and fits micro-batch, checkpointing and moments to it (compress/fitting.py).
    """
    architecture, settings = spaces[0].architecture, spec.distillation
    anchors = [shape for space in spaces for shape in space.anchors().values()]
    shape = max((*anchors, *spec.shapes), key=lambda shape: count_parameters(architecture, shape).total)
    dtype = settings.dtype if spec.resources.gpus else "float32"
    wanted = Training(
        sequence_length=spec.corpus.sequence_length,
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size or settings.batch_size,
        dtype=dtype,
        moments="float32" if settings.moments == "auto" else settings.moments,
        optimizer=settings.optimizer,
        device="cuda" if spec.resources.gpus else "cpu",
    )
    teacher = TeacherMemory(architecture=architecture, dtype=dtype, stored=settings.signals != "off")
    preparing = inference_memory(replace(teacher, stored=False), tokens=wanted.micro_tokens, device=wanted.device)
    disk = preparation_disk(architecture, corrected=spec.compression.teacher_correction_tokens > 0, moments=spec.compression.reconstruction)
    return {
        "memory": {
            "shape": shape.as_dict(),
            "training": training_memory(architecture, shape, training=wanted, teacher=teacher).as_dict(),
            "training_at_least": least_training_memory(architecture, shape, wanted=wanted, teacher=teacher).as_dict(),
            "preparing": preparing.as_dict(),
        },
        "disk": {
            "prepared_bytes": sum(disk.values()),
            "max_signal_bytes": 0 if settings.signals == "off" else settings.max_signal_bytes,
            "trial_bytes": sum(rung_disk(architecture, shape).values()),
            "trials": trials,
        },
    }


def _described(architecture: Architecture, shape: Shape) -> dict[str, Any]:
    return {"shape": shape.as_dict(), "parameters": count_parameters(architecture, shape).total}
