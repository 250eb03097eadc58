"""Workers that only pretend: a clock that moves when someone waits, and an executor whose steps take as long, and end as, a seed says.

What a step "measures" follows from its shape and rung alone, so that a rung that is run again gives what it gave before.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import time
from collections import deque
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nas.architecture import Architecture, read_architecture
from nas.cost import count_parameters
from nas.search.layout import STUDENT
from nas.search.results import Metric, RungResult
from nas.shape import Shape
from nas.spec import parse_spec
from workers.liveness import STOP, is_superseded
from workers.outcome import RESULT, Outcome
from workers.step import PROGRESS, Step

POLL_SECONDS = 0.05
"""What ends within so short a time is collected together, as a controller on a real machine would."""
NUM_BLOCKS, NUM_DOCUMENTS = 16, 48
HOST = {"host": "simulated", "pid": 0}


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Shares of the steps to which something happens."""

    straggler: float = 0.03
    """Takes twenty times as long."""
    preempted: float = 0.03
    """Its worker dies on the way."""
    failed: float = 0.02
    """Ends in an error that another try may not meet."""
    diverged: float = 0.01
    """Ends in a failure that no other try would mend."""
    refused: float = 0.002
    """The executor cannot even begin it."""
    unverified: float = 0.2
    """Of the finalists: the student is not what it claims to be."""


@dataclass(kw_only=True)
class Clock:
    """Seconds that pass when someone waits; with `is_charged` also while the controller thinks."""

    seconds: float = 0.0
    is_charged: bool = False
    _returned: float | None = None

    def __call__(self) -> float:
        return self.seconds

    def charge(self) -> None:
        """Someone waits from now on: the processor time since `resume` has passed here too. (Not the wall's: a busy machine's other programs are not ours.)"""
        if self.is_charged and self._returned is not None:
            self.seconds += time.process_time() - self._returned

    def resume(self) -> None:
        self._returned = time.process_time()


@dataclass(kw_only=True)
class Run:
    """One step on one worker."""

    step: Step
    outcome: Outcome
    seconds: float
    began: float = 0.0
    is_over: bool = False
    """It ended, whether or not the controller lived to hear of it."""

    @property
    def key(self) -> tuple[str, int | None, int | None]:
        """stage, trial, rung"""
        return self.step.stage, trial_of(self.step), self.step.request.get("rung")


@dataclass(kw_only=True)
class FakeCluster:
    """An executor of `num_workers` slots. Outlives its controllers, as a cluster does: `lose_driver` is what it notices of a restart."""

    num_workers: int
    seed: int
    clock: Clock
    trouble: Trouble = field(default_factory=Trouble)
    rung_seconds: tuple[float, ...] = (5.0, 20.0, 80.0, 320.0, 1280.0)
    other_seconds: float = 10.0
    history: list[Run] = field(default_factory=list)
    """Every step that was ever accepted."""
    busy_seconds: float = 0.0
    most_at_once: int = 0
    _heeded: float = float("-inf")
    _running: dict[str, Run] = field(default_factory=dict)
    _waiting: deque[Run] = field(default_factory=deque)
    _ends: list[tuple[float, str]] = field(default_factory=list)
    _unbegun: list[tuple[str, Outcome]] = field(default_factory=list)
    """Killed before they had a worker."""
    _tries: dict[tuple[str, int | None, int | None], int] = field(default_factory=dict)

    @property
    def running(self) -> list[Run]:
        """Those that have a worker."""
        return list(self._running.values())

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._waiting)

    # -- the executor's protocol -------------------------------------------------------------------------------------------

    def start(self, step: Step) -> None:
        run = self._draw(step)
        self.history.append(run)
        self._waiting.append(run)
        self._fill(self.clock())
        self.most_at_once = max(self.most_at_once, self.num_running)

    def wait(self, *, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        self.clock.charge()
        self._heed_stops()
        deadline = self.clock.seconds + timeout_seconds
        if self._ends and self._ends[0][0] <= deadline:
            deadline = min(deadline, max(self.clock.seconds, self._ends[0][0] + POLL_SECONDS))
        self.clock.seconds = max(self.clock.seconds, deadline)
        ended = self._collect()
        self.clock.resume()
        return ended

    def go_on_unwatched(self) -> None:
        """Its controller does nothing, and time has passed: what ended meanwhile waits to be told."""
        self._heed_stops()
        self._unbegun = self._collect()

    def kill(self, key: str) -> None:
        killed = Outcome(succeeded=False, reason="worker_died", message="killed")
        if key in self._running:
            self._end_early(key, killed)
        elif any(run.step.key == key for run in self._waiting):
            self._waiting = deque(run for run in self._waiting if run.step.key != key)
            self._unbegun.append((key, killed))

    def close(self) -> None:
        self.lose_driver()

    def lose_driver(self) -> None:
        """All that runs or waits is gone. A step that was as good as finished has left its result."""
        for key, run in list(self._running.items()):
            if run.began + 0.9 * run.seconds <= self.clock():
                self._settle(run)
            else:
                self.busy_seconds += self.clock() - run.began
            del self._running[key]
        self._waiting.clear()
        self._ends.clear()

    # -- what happens ------------------------------------------------------------------------------------------------------

    def _fill(self, now: float) -> None:
        while self._waiting and len(self._running) < self.num_workers:
            run = self._waiting.popleft()
            run.began = now
            folder = Path(run.step.folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PROGRESS).write_text(json.dumps(HOST) + "\n", encoding="utf-8")
            self._running[run.step.key] = run
            heapq.heappush(self._ends, (now + run.seconds, run.step.key))

    def _collect(self) -> list[tuple[str, Outcome]]:
        ended, self._unbegun = self._unbegun, []
        while self._ends and self._ends[0][0] <= self.clock.seconds:
            when, key = heapq.heappop(self._ends)
            run = self._running.get(key)
            if run is None or run.began + run.seconds != when:  # it was killed since
                continue
            del self._running[key]
            self._settle(run)
            ended.append((key, run.outcome))
            self._fill(when)
        return ended

    def _settle(self, run: Run) -> None:
        run.is_over = True
        self.busy_seconds += run.seconds
        if is_superseded(Path(run.step.folder)):
            run.outcome = Outcome(succeeded=False, reason="superseded", message="another attempt took its place")
        elif run.outcome.reason != "worker_died":
            (Path(run.step.folder) / RESULT).write_text(json.dumps(run.outcome.as_dict()), encoding="utf-8")

    def _end_early(self, key: str, outcome: Outcome) -> None:
        run = self._running[key]
        run.outcome, run.seconds = outcome, self.clock() - run.began
        heapq.heappush(self._ends, (run.began + run.seconds, key))

    def _heed_stops(self) -> None:
        """Once a second, as a step that trains looks for the file now and then."""
        if self.clock() - self._heeded < 1.0:
            return
        self._heeded = self.clock()
        for key, run in list(self._running.items()):
            if (Path(run.step.folder) / STOP).exists():
                self._end_early(key, Outcome(succeeded=False, reason="stopped", message="asked to"))

    # -- what is drawn -----------------------------------------------------------------------------------------------------

    def _draw(self, step: Step) -> Run:
        run = Run(step=step, outcome=Outcome(succeeded=True, result={}), seconds=1.0)
        tries = self._tries[run.key] = self._tries.get(run.key, -1) + 1
        stage = ("prepare", "rung", "confirm", "bundle").index(step.stage)
        generator = np.random.default_rng([self.seed, stage, trial_of(step) or 0, step.request.get("rung") or 0, tries])
        run.seconds = (self.rung_seconds[step.request["rung"]] if step.stage == "rung" else self.other_seconds) * float(generator.lognormal(0.0, 0.2))
        chance = self.trouble
        preempted, failed, diverged, straggler, refused, unverified = (float(value) for value in generator.random(6))
        if step.stage == "rung":
            if refused < chance.refused:
                raise ConnectionError("no node answers")
            if straggler < chance.straggler:
                run.seconds *= 20
            if diverged < chance.diverged and tries == 0:
                run.outcome = Outcome(succeeded=False, reason="diverged", message="loss not finite", retryable=False)
            elif failed < chance.failed:
                run.outcome = Outcome(succeeded=False, reason="error", message="something broke")
        if preempted < chance.preempted:
            run.outcome, run.seconds = Outcome(succeeded=False, reason="worker_died", message="preempted"), run.seconds * float(generator.random())
        if run.outcome.succeeded:
            run.outcome = Outcome(succeeded=True, result=pretended_result(step, is_verified=unverified >= chance.unverified))
        return run


def trial_of(step: Step) -> int | None:
    """The number of the trial that a step belongs to."""
    if step.stage == "bundle":
        return int(step.request["trial"])
    return int(Path(step.request["trial_folder"]).name) if "trial_folder" in step.request else None


def pretended_result(step: Step, *, is_verified: bool = True) -> dict[str, Any]:
    """What a step would have returned."""
    request = step.request
    tasks = [task["name"] for task in request["spec"]["tasks"]]
    spec = _parse(json.dumps(request["spec"]))
    last = spec.rungs.num_trained
    match step.stage:
        case "prepare":
            teacher, random = (measured(quality=quality, seed=[1], rung=0, tokens=0, tasks=tasks).as_dict() for quality in (1.0, 0.0))
            return {"teacher": teacher, "teacher_held_out": teacher, "random": random, "random_held_out": random, "seconds": {"all": 10.0}}
        case "rung":
            rung = request["rung"]
            shape = Shape.from_dict(request["shape"])
            if rung == last:
                save_pretended_student(Path(request["trial_folder"]), parameters=count(shape, inputs=request["inputs"]))
            order = request["seed"] - spec.seed  # 0 but for repeats
            result = measure(shape, rung=rung, tokens=spec.rungs.tokens(rung), tasks=tasks if rung == last else [], order=order)
            return replace(result, parameters=count(shape, inputs=request["inputs"])).as_dict()
        case "confirm":
            held_out = measure(Shape.from_dict(request["shape"]), rung=last, tokens=spec.rungs.tokens(last), tasks=tasks).as_dict()
            reason = None if is_verified else "parameters: one too few"
            return {"verified": is_verified, "reason": reason, "reloaded": True, "parameters": 1, "held_out": held_out, "latency": {}}
        case _:
            tar = Path(request["bundle_folder"]) / "bundle.tar"
            return {"bundle": str(tar), "bundle_sha256": hashlib.sha256(str(tar).encode()).hexdigest(), "trial": request["trial"]}


_parse = lru_cache(maxsize=8)(parse_spec)
"""Every step carries the whole spec, and nobody changes one."""


def count(shape: Shape, *, inputs: dict[str, Any]) -> int:
    """Parameters of a shape."""
    return count_parameters(_architecture(json.dumps(inputs["teacher"]["config"])), shape).total


@lru_cache(maxsize=8)
def _architecture(config: str) -> Architecture:
    return read_architecture(json.loads(config))


def save_pretended_student(trial_folder: Path, *, parameters: int) -> None:
    """A student's file without its weights: the header is all that a controller reads."""
    header = json.dumps({"all": {"dtype": "F32", "shape": [parameters], "data_offsets": [0, 4 * parameters]}}).encode()
    (trial_folder / STUDENT).mkdir(parents=True, exist_ok=True)
    (trial_folder / STUDENT / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def measure(shape: Shape, *, rung: int, tokens: int, tasks: list[str], order: int = 0) -> RungResult:
    """A made-up result: wider beats deeper up to a point, every shape is a little better or worse than that, and short rungs say less; trained in
    another order it is another one."""
    identity = [int(value) for value in shape.as_dict().values()]
    luck = np.random.default_rng(identity).standard_normal() * 0.02
    quality = 0.6 + luck - 0.05 * abs(np.log(shape.hidden_size / (96 * shape.num_hidden_layers))) + 0.02 * np.log(shape.intermediate_size / shape.hidden_size)
    noise = np.random.default_rng([*identity, rung, *([order] if order and rung else [])]).standard_normal() * 0.03 / (1 + rung) ** 2
    return measured(quality=float(np.clip(quality + noise, 0.05, 0.95)), seed=[*identity, rung], rung=rung, tokens=tokens, tasks=tasks)


def measured(*, quality: float, seed: list[int], rung: int, tokens: int, tasks: list[str]) -> RungResult:
    """A result of some quality (0: random weights, 1: the teacher), with documents that differ."""
    generator = np.random.default_rng(seed)
    blocks = (1.0 - quality) / (1 + rung) + 0.01 * generator.standard_normal(NUM_BLOCKS)
    kl = Metric.from_documents(tuple(float(value) for value in np.maximum(blocks, 1e-6)), higher_is_better=False)
    common = np.random.default_rng(0).random(NUM_DOCUMENTS)  # the same documents are hard for everybody
    accuracy = {
        name: Metric.from_documents(tuple(float(value) for value in 0.25 + 0.5 * quality + 0.2 * (common - 0.5)), higher_is_better=True) for name in tasks
    }
    for name, metric in accuracy.items():
        documents = tuple(value + 0.02 * float(noise) for value, noise in zip(metric.documents, generator.standard_normal(NUM_DOCUMENTS), strict=True))
        accuracy[name] = Metric.from_documents(documents, higher_is_better=True)
    return RungResult(rung=rung, tokens=tokens, kl=kl, loss=kl, tasks=accuracy, parameters=1, seconds={"distil": 1.0}, details={})
