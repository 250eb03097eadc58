"""One step of a search, run in a worker process: request in, result file out. Both executors run this.

A step's folder is the mailbox between it and the controller, on a folder that all nodes share: `progress.jsonl` and `beat` are
written by the step, `stop` and `superseded` by the controller (`liveness.py`), `result.json` last and atomically. So no worker needs the database, a step
whose result was written is never lost, and it does not matter which executor, or which controller, started it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from nas.errors import InvalidSpec, NotPrepared
from nas.files import is_disk_full, publishing_unless, whole_file
from nas.logs import find_secrets, redact
from nas.search.layout import PREPARED
from nas.spec import SearchSpec, dump_spec, parse_spec
from nas.tracing import note_end, set_up_tracing, step_span
from workers.liveness import STOP, beating, is_superseded
from workers.logs import captured
from workers.outcome import NOT_PREPARED, RESULT, Outcome

PROGRESS, REQUEST = "progress.jsonl", "request.json"
BEAT_SECONDS = 5.0

DISK_FULL = 28
"""Exit code of a step that may not have had the room to say so."""

logger = logging.getLogger("workers.step")  # also where it is the main module


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one worker is asked to do."""

    key: str
    """The attempt's id."""
    stage: str
    """prepare, rung, confirm or bundle; distil, of a full distillation; or probe, which belongs to no search."""
    folder: str
    """The attempt's own folder, made by who starts it."""
    request: dict[str, Any]
    """Arguments of the stage, plain JSON: paths and digests, never weights."""
    cpus: float
    gpus: float
    context: dict[str, str | int | None] = field(default_factory=dict)
    """What its log lines carry: search_id, trial, rung."""
    traceparent: str | None = None
    """The trace to which it belongs."""
    beat_seconds: float = BEAT_SECONDS
    """Between two signs of life."""


def execute(step: Step) -> Outcome:
    """Run a step to its end and leave the outcome, and all that it said, in its folder, which is there. Never raises: what went wrong is the outcome.

    A step that was superseded, before it began or since, leaves nothing but its log.
    """
    folder = Path(step.folder)
    if is_superseded(folder):
        return _SUPERSEDED
    log = captured(folder, context={**step.context, "attempt_id": step.key})
    with log, beating(folder, seconds=step.beat_seconds), publishing_unless(partial(is_superseded, folder)):
        outcome = _traced_attempt(step, folder=folder)
    if is_superseded(folder):
        return _SUPERSEDED
    try:
        with whole_file(folder / RESULT) as temporary:
            temporary.write_text(_as_json(outcome), encoding="utf-8")
    except OSError as error:
        if not is_disk_full(error):
            raise
        return Outcome(succeeded=False, reason="disk_full", message=f"no room for its result: {error}")
    return outcome


_SUPERSEDED = Outcome(succeeded=False, reason="superseded", message="another attempt took this one's place, or its search ended")


def _as_json(outcome: Outcome) -> str:
    try:
        return json.dumps(outcome.as_dict(), allow_nan=False)
    except (TypeError, ValueError) as error:
        lie = Outcome(succeeded=False, reason="invalid_result", message=f"result: expected plain JSON with finite numbers, got {error}")
        return json.dumps(lie.as_dict())


def _traced_attempt(step: Step, *, folder: Path) -> Outcome:
    try:
        set_up_tracing(os.environ, service_name="nas-step")
    except InvalidSpec as missing:
        logger.warning("not traced: %s", missing)
    with step_span(f"step {step.stage}", traceparent=step.traceparent, attributes={**step.context, "attempt_id": step.key}) as span:
        outcome = _attempt(step, folder=folder)
        note_end(span, reason=outcome.reason)
    return outcome


def _attempt(step: Step, *, folder: Path) -> Outcome:
    began = time.monotonic()
    logger.info("%s begins", step.stage, extra={"action": "step_begin", "host": socket.gethostname(), "pid": os.getpid(), "cpus": step.cpus, "gpus": step.gpus})
    try:
        outcome = Outcome(succeeded=True, result=_run(step, folder=folder))
    except BaseException as error:
        outcome = failure(error)
        outcome = replace(outcome, message=redact(outcome.message, secrets=find_secrets(os.environ)))
        if outcome.reason != "stopped":
            # The traceback of what nobody expected; of the others the message says it all.
            logger.error("%s failed: %s", step.stage, outcome.message.partition("\n")[0], exc_info=error if outcome.reason == "error" else None)
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
    ended = outcome.reason or "succeeded"
    logger.info("%s ended: %s", step.stage, ended, extra={"action": "step_end", "seconds": round(time.monotonic() - began, 3)})
    return outcome


def _run(step: Step, *, folder: Path) -> dict[str, Any]:
    # Here and not above: the controller imports this module, and has no use for a second of imports.
    import torch
    from transformers.utils import logging as transformers_logging

    from nas.bundle import write_bundle
    from nas.compress.distillation import Progress
    from nas.compress.speed import probe_speed
    from nas.search.confirm import confirm
    from nas.search.prepare import prepare
    from nas.search.study import Observation, dimension_importances
    from nas.search.trial import run_rung
    from nas.shape import Shape
    from nas.space import Choices
    from workers.distil import distil_student

    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    torch.set_num_threads(max(1, round(step.cpus)))
    device = "cuda" if step.gpus > 0 else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"resources.gpus: expected a CUDA device for gpus={step.gpus}, got none on {socket.gethostname()}")
    if 0 < step.gpus < 1:
        torch.cuda.set_per_process_memory_fraction(step.gpus)
    request = step.request
    if step.stage == "probe":
        points = [point.as_dict() for point in probe_speed(device=device, dtype=request["dtype"])]
        return {"points": points, "host": socket.gethostname()}
    should_stop = (folder / STOP).exists
    with (folder / PROGRESS).open("a", encoding="utf-8") as file:

        def report(line: Mapping[str, Any]) -> None:
            file.write(json.dumps({**line, "at": time.time()}) + "\n")
            file.flush()

        def report_progress(progress: Progress) -> None:
            report(asdict(progress))

        report({"host": socket.gethostname(), "pid": os.getpid()})
        if step.stage == "distil":
            return distil_student(request, device=device, report=report_progress, should_stop=should_stop)
        spec, inputs, prepared = parse_spec(json.dumps(request["spec"])), request["inputs"], Path(request["prepared"])
        spec = _with_smaller_passes(spec, num_halvings=request.get("num_halvings", 0))
        if step.stage != "prepare" and not (prepared / PREPARED).exists():
            raise NotPrepared(f"{prepared / PREPARED}: expected what the prepare step made, got nothing")
        match step.stage:
            case "prepare":
                return prepare(spec, inputs=inputs, folder=prepared, device=device, report=report, should_stop=should_stop)
            case "rung":
                result = run_rung(
                    spec,
                    inputs=inputs,
                    prepared=prepared,
                    shape=Shape.from_dict(request["shape"]),
                    rung=request["rung"],
                    folder=Path(request["trial_folder"]),
                    device=device,
                    report=report_progress,
                    should_stop=should_stop,
                    budget=request.get("budget", 0),
                    seed=request.get("seed", spec.seed),
                )
                return result.as_dict()
            case "confirm":
                shape, trial_folder = Shape.from_dict(request["shape"]), Path(request["trial_folder"])
                with_reload = request["with_reload"]
                return confirm(spec, inputs=inputs, prepared=prepared, shape=shape, folder=trial_folder, device=device, with_reload=with_reload)
            case "bundle":
                observations = [Observation(choices=Choices(**told["choices"]), value=told["value"]) for told in request["observations"]]
                return {**write_bundle(request, spec=spec), "importances": dimension_importances(observations)}
            case unknown:
                raise ValueError(f"stage: expected prepare, rung, confirm or bundle, got {unknown!r}")


def _with_smaller_passes(spec: SearchSpec, *, num_halvings: int) -> SearchSpec:
    """After a try that ran out of memory: the same student, in passes of fewer sequences."""
    if not num_halvings:
        return spec
    values, distillation = dump_spec(spec), spec.distillation
    values["distillation"]["micro_batch_size"] = max(1, (distillation.micro_batch_size or distillation.batch_size) >> num_halvings)
    return parse_spec(json.dumps(values))


def failure(error: BaseException) -> Outcome:
    """What an exception means for the search. What is deterministic is not tried again."""
    from nas.compress.distillation import Diverged, Stopped
    from nas.errors import CorpusUnavailable, CorruptFile, DoesNotFit, Fenced, FilesUnavailable, InvalidSpec, TaskUnavailable, TeacherUnavailable
    from nas.search.prepare import StoppedEarly

    message = f"{type(error).__name__}: {error}"
    if isinstance(error, Fenced):
        return _SUPERSEDED
    if isinstance(error, (Stopped, StoppedEarly)):
        return Outcome(succeeded=False, reason="stopped", message=message)
    if isinstance(error, (Diverged, FloatingPointError)):
        return Outcome(succeeded=False, reason="diverged", message=message, retryable=False)
    if isinstance(error, (TeacherUnavailable, CorpusUnavailable, TaskUnavailable, InvalidSpec)):
        return Outcome(succeeded=False, reason="unavailable", message=message, retryable=False)
    if is_disk_full(error):
        return Outcome(succeeded=False, reason="disk_full", message=message)
    if isinstance(error, DoesNotFit):
        return Outcome(succeeded=False, reason="does_not_fit", message=message, retryable=False)
    if isinstance(error, CorruptFile):
        return Outcome(succeeded=False, reason="corrupt_file", message=message)
    if isinstance(error, NotPrepared):
        return Outcome(succeeded=False, reason=NOT_PREPARED, message=message)
    if isinstance(error, FilesUnavailable):
        return Outcome(succeeded=False, reason="files_unavailable", message=message)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return Outcome(succeeded=False, reason="out_of_memory", message=message)
    return Outcome(succeeded=False, reason="error", message=message + "\n" + "".join(traceback.format_exception(error)[-4:])[-2000:])


def watch_parent(parent: int, *, exit_process: Callable[[int], None] = os._exit) -> None:
    """End this process when its parent is gone, so that a killed service leaves nothing running."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        exit_process(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()


def main(folder: str) -> int:
    """Entry of the local executor: `python -m workers.step FOLDER`."""
    watch_parent(int(os.environ["NAS_PARENT_PID"]))
    step = Step(**json.loads((Path(folder) / REQUEST).read_text(encoding="utf-8")))
    outcome = execute(step)
    return 0 if outcome.succeeded else DISK_FULL if outcome.reason == "disk_full" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
