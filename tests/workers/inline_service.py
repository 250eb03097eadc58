"""A store, its data folder and controllers on it in this process, with workers that run a step when it is waited for."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nas.settings import Settings
from nas.spec import dump_spec, parse_spec
from nas.store.records import SearchRecord, SearchState
from nas.store.store import Store
from nas.submission import check_submission
from workers.controller import Controller
from workers.liveness import BEAT
from workers.outcome import Outcome
from workers.step import Step, execute

RUNGS = {"first_tokens": 2048, "factor": 2, "num_trained": 2, "keep": 0.5}
ONE_RUNG = {"first_tokens": 2048, "factor": 2, "num_trained": 1, "keep": 1.0, "keep_untrained": 1.0}


class InlineExecutor:
    """Runs a step when it is waited for. A test may put its hands on the step before, or take the step's place."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.history: list[Step] = []
        self.before: Callable[[Step], Outcome | None] = lambda step: None
        self.closed = False

    def start(self, step: Step) -> None:
        self.steps.append(step)
        self.history.append(step)

    def wait(self, *, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        if not self.steps:
            return []
        step = self.steps.pop(0)
        return [(step.key, self.before(step) or execute(step))]

    def kill(self, key: str) -> None:
        self.steps = [step for step in self.steps if step.key != key]

    def close(self) -> None:
        self.steps.clear()
        self.closed = True

    def ran(self, *, trial: int, rung: int) -> int:
        """How often a rung of a trial was started."""
        return sum(is_rung(step, trial=trial, rung=rung) for step in self.history)


def is_rung(step: Step, *, trial: int, rung: int) -> bool:
    return step.stage == "rung" and step.request["rung"] == rung and Path(step.request["trial_folder"]).name == str(trial)


@dataclasses.dataclass
class Service:
    """A store, its data folder, and controllers on it."""

    settings: Settings
    store: Store
    make_spec: Callable[..., dict[str, Any]]
    executor: InlineExecutor = dataclasses.field(default_factory=InlineExecutor)

    def submit(self, **changes: Any) -> str:
        spec = parse_spec(json.dumps(self.make_spec(**changes)))
        submission = check_submission(spec, store=self.store)
        return self.store.create_search(spec=dump_spec(spec), inputs=submission.inputs, plan=submission.plan, label="").id

    def run(self, search_id: str, *, until: Callable[[SearchRecord], bool] | None = None, seconds: float = 120.0) -> SearchRecord:
        """A controller of its own, until the search has ended (or the condition holds): as if it was killed there."""
        controller = Controller(store=self.store, executor=self.executor, settings=self.settings)
        deadline = time.monotonic() + seconds
        until = until or (lambda record: record.state.is_terminal)
        while not until(record := self.store.get_search(search_id)):
            assert time.monotonic() < deadline, f"search {record.state} after {seconds} s"
            controller.tick(timeout_seconds=0.0)
        self.executor.steps.clear()
        return record

    def board(self, search: SearchRecord) -> dict[str, Any]:
        """The whole board."""
        board = self.store.whole_board(search.id)
        assert board is not None
        return board

    def expire_lease(self) -> None:
        time.sleep(self.settings.lease_seconds + 0.05)

    def folder(self, search_id: str) -> Path:
        return self.settings.searches_folder / search_id


def verify_here(verify: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return verify(*arguments, **{**named, "with_reload": False})


def is_state(state: SearchState) -> Callable[[SearchRecord], bool]:
    return lambda record: record.state is state


def hang(service: Service, *, hangs: Callable[[Step], bool]) -> list[Step]:
    """Steps of which `hangs` says so beat once and never end; returns them as they come."""
    hung: list[Step] = []
    executor = service.executor

    def wait(*, timeout_seconds: float) -> list[tuple[str, Outcome]]:
        for step in [step for step in executor.steps if hangs(step)]:
            executor.steps.remove(step)
            (Path(step.folder) / BEAT).write_text("0")
            hung.append(step)
        return InlineExecutor.wait(executor, timeout_seconds=timeout_seconds)

    executor.wait = wait  # type: ignore[method-assign]
    return hung


def verified_loser(store: Store, search: SearchRecord) -> int:
    """The one trial that was verified and did not win."""
    verified = [trial.number for trial in store.list_trials(search.id) if (trial.confirmation or {}).get("verified")]
    [other] = [number for number in verified if number != (search.winner or {})["trial"]]
    return other
