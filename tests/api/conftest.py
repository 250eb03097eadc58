"""A real SQLite store with a registered teacher, corpus and tasks, and the application over it."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from nas.distillations import check_distillation, parse_distillation
from nas.search.layout import SORTED, STUDENT, prepared_key, trial_folder
from nas.settings import Settings
from nas.spec import dump_spec, parse_spec
from nas.store.records import AttemptState, CorpusRecord, PointRecord, SearchRecord, SearchState, TaskRecord, TeacherRecord, TrialState, utc_now
from nas.store.store import Store
from nas.submission import check_submission

TEACHER_CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
SHAPE = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


def a_metric(value: float, *, higher_is_better: bool) -> dict[str, Any]:
    return {"value": value, "standard_error": 0.03, "higher_is_better": higher_is_better, "documents": [value - 0.1, value + 0.1]}


def a_result(rung: int, *, tokens: int, kl: float) -> dict[str, Any]:
    tasks = {"pairs": a_metric(0.8, higher_is_better=True), "bits": a_metric(1.1, higher_is_better=False)} if rung else {}
    return {
        "rung": rung,
        "tokens": tokens,
        "kl": a_metric(kl, higher_is_better=False),
        "loss": a_metric(1 + kl, higher_is_better=False),
        "tasks": tasks,
        "parameters": 90000,
        "seconds": {"slice": 0.5, "distil": 2.0},
        "details": {},
    }


def a_row(number: int, *, shape: dict[str, int], rank: int | None, tie_group: int | None, **changes: Any) -> dict[str, Any]:
    return {
        "rank": rank,
        "tie_group": tie_group,
        "tied": False,
        "number": number,
        "origin": "sampler",
        "is_control": False,
        "shape": shape,
        "parameters": 90000,
        "share_of_teacher": 0.45,
        "rung": 2,
        "tokens": 4000,
        "score": 0.7,
        "standard_error": 0.02,
        "kl": 0.4,
        "kl_standard_error": 0.03,
        "kl_by_rung": [2.0, 1.0, 0.4],
        "loss": 1.4,
        "tasks": {"pairs": {"value": 0.8, "standard_error": 0.03, "higher_is_better": True, "share": 0.7}},
        "state": "completed",
        "costs": {"parameters": 90000.0, "memory_bytes": 400000.0},
        "difference": {"value": -0.01, "standard_error": 0.02, "low": -0.05, "high": 0.03} if rank else None,
        "verified": None,
        "probability_best": None,
        "confirmation": None,
        **changes,
    }


def a_confirmation() -> dict[str, Any]:
    """What the confirm step leaves of a finalist on the board: without documents."""
    metric = {"value": 0.8, "standard_error": 0.03, "higher_is_better": True}
    return {
        "verified": True,
        "reason": None,
        "reloaded": True,
        "parameters": 90000,
        "held_out": {"parameters": 90000, "tokens": 4000, "kl": metric, "loss": metric, "tasks": {"pairs": metric, "bits": metric}},
        "latency": {"prefill_seconds": 0.02, "decode_seconds_per_token": 0.0015, "prompt_tokens": 8, "device": "cpu", "num_threads": 1},
        "deployability": {"tensor_parallel_sizes": [1, 2, 4], "quantization_block_sizes": [], "quantized_tensor_parallel": {}},
        "seconds": {"verify": 3.0},
    }


def a_cost() -> dict[str, Any]:
    counts = {"trials": 3, "chosen": 1, "tokens": 4000, "device_seconds": 12.0, "tokens_per_chosen": 4000.0, "device_seconds_per_chosen": 12.0}
    seconds = {"prepare": 3.0, "distil": 24.0}
    return {"tokens": 8000, "seconds": seconds, "device_seconds": 27.0, "cpus": 1.0, "gpus": 0.0, "decisions": [{"decision": "rung 2", **counts}]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The application's client, and the store behind it."""

    store: Store
    client: TestClient
    settings: Settings

    def spec(self, **changes: Any) -> dict[str, Any]:
        """The JSON of a spec that can be run, with some fields changed."""
        return {
            "teacher": "tiny",
            "corpus": {"parts": [{"name": "stories"}], "sequence_length": 128},
            "tasks": [{"name": "pairs"}, {"name": "bits", "weight": 2.0}],
            "budget": {"max_fraction": 0.6},
            "rungs": {"first_tokens": 1000, "num_trained": 2},
            "distillation": {"batch_size": 2},
            **changes,
        }

    def submit(self, **changes: Any) -> SearchRecord:
        spec = parse_spec(json.dumps(self.spec(**changes)))
        submission = check_submission(spec, store=self.store)
        return self.store.create_search(spec=dump_spec(spec), inputs=submission.inputs, plan=submission.plan, label=spec.label, labels=spec.labels)

    def move(self, search: SearchRecord, to: SearchState, **values: Any) -> None:
        self.store.change_search(search.id, to=to, expected=[state for state in SearchState if not state.is_terminal], fence=None, **values)

    def shape(self, number: int) -> dict[str, int]:
        """The shape of a trial; each has its own."""
        return {**SHAPE, "intermediate_size": 96 + number}

    def propose(self, search: SearchRecord, number: int, *, origin: str = "sampler") -> dict[str, int]:
        shape = self.shape(number)
        self.store.add_trial(search.id, number=number, origin=origin, shape=shape, choices=None, parameters=90000, fence=None)
        return shape

    def finish_rung(self, search: SearchRecord, number: int, *, rung: int, tokens: int, kl: float, state: TrialState) -> None:
        attempt = self.store.start_attempt(search.id, stage="rung", trial=number, rung=rung, fence=None)
        if tokens:
            points = [(tokens // 2, kl + 0.1), (tokens, kl)]
            self.store.add_points(
                PointRecord(search_id=search.id, trial=number, rung=rung, tokens=count, loss=loss, learning_rate=1e-3, tokens_per_second=1e4)
                for count, loss in points
            )
        self.store.record_rung(
            attempt.id, search_id=search.id, trial=number, rung=rung, result=a_result(rung, tokens=tokens, kl=kl), trial_state=state, fence=None
        )

    def succeed(self, search: SearchRecord) -> SearchRecord:
        """A search that has succeeded with its trial 1, and a bundle of nothing."""
        self.store.save_winner(search.id, {"trial": 1, "config": {"hidden_size": 48}}, fence=None)
        self.move(search, SearchState.SUCCEEDED)
        return self.store.get_search(search.id)

    def verify_trial(self, search: SearchRecord, number: int) -> None:
        """A trial that the confirm step verified, with its student and what its search prepared on the disk."""
        self.store.save_confirmation(None, search_id=search.id, trial=number, confirmation={"verified": True, "reloaded": True, "reason": None}, fence=None)
        (trial_folder(self.settings.searches_folder / search.id, number=number) / STUDENT).mkdir(parents=True)
        key = prepared_key(parse_spec(json.dumps(search.spec)), inputs=search.inputs)
        (self.settings.prepared_folder / key / SORTED).mkdir(parents=True, exist_ok=True)

    def pack(self, search: SearchRecord, number: int, *, content: bytes = b"a bundle" * 1000) -> None:
        """As a controller does that packs what was asked for."""
        path = f"searches/{search.id}/bundles/{number}/t/bundle.tar"
        (self.settings.data_folder / path).parent.mkdir(parents=True)
        (self.settings.data_folder / path).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        self.store.save_bundle(search.id, number, path=path, sha256=digest, num_bytes=len(content), device_seconds=1.0, fence=None)

    def distil(self, search: SearchRecord, **asked: Any) -> SearchRecord:
        """A distillation of the winner of a search that has succeeded."""
        plan = check_distillation(parse_distillation(json.dumps({"search_id": search.id, **asked})), store=self.store, settings=self.settings)
        named = {"spec": plan.spec, "inputs": plan.inputs, "tokens": plan.tokens, "label": asked.get("label", ""), "project": search.project}
        return self.store.create_distillation(search_id=search.id, trial=plan.trial, **named)

    def finish_distillation(self, distillation: SearchRecord, *, content: bytes = b"a model" * 1000) -> SearchRecord:
        """One attempt, two points, a log, and a file."""
        self.move(distillation, SearchState.RUNNING)
        trial = distillation.spec["trial"]
        attempt = self.store.start_attempt(distillation.id, stage="distil", trial=trial, rung=None, fence=None)
        named = {"search_id": distillation.id, "trial": trial, "rung": 0, "learning_rate": 1e-3, "tokens_per_second": 1e4}
        self.store.add_points(PointRecord(tokens=tokens, loss=1.0 / tokens, **named) for tokens in (1000, 2000))
        (self.settings.data_folder / f"{distillation.id}.tar").write_bytes(content)
        held_out = {"kl": 0.5, "kl_standard_error": 0.01, "loss": 1.5, "loss_standard_error": 0.02}
        told = {"tokens": 2000, "seconds": 3.0, "held_out_before": held_out, "held_out_after": {**held_out, "kl": 0.1}}
        file = {"file": f"{distillation.id}.tar", "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        self.store.save_distilled(distillation.id, {**told, **file}, fence=None)
        self.store.finish_attempt(attempt.id, state=AttemptState.SUCCEEDED, reason=None, fence=None, log="a line\n")
        self.move(distillation, SearchState.SUCCEEDED)
        return self.store.get_distillation(distillation.id)

    def board(self, search: SearchRecord) -> dict[str, Any]:
        """The whole board, as it was saved."""
        board = self.store.whole_board(search.id)
        assert board is not None
        return board

    def confirmed_search(self) -> SearchRecord:
        """The ranked one, its second trial named the winner."""
        search = self.ranked_search()
        board = self.board(search)
        for row, probability in zip(board["rows"][:2], (0.2, 0.8), strict=True):
            row |= {"confirmation": a_confirmation(), "verified": True, "probability_best": probability}
        held_out = a_confirmation()["held_out"]
        board |= {"leader": 1, "winner": 1, "teacher": {"held_out": held_out, "search": held_out}, "importances": {"hidden_size": 0.75, "mlp_fill": 0.25}}
        self.store.save_board(search.id, board, fence=None)
        return self.store.get_search(search.id)

    def ranked_search(self) -> SearchRecord:
        """Three trials at the last rung (two of them tied, one a control), one stopped, one failed; still searching."""
        search = self.submit(label="ranked")
        self.move(search, SearchState.SEARCHING)
        shapes = [self.propose(search, number, origin=origin) for number, origin in enumerate(("anchor:uniform", "sampler", "control", "sampler", "user"))]
        for number in range(4):
            self.finish_rung(search, number, rung=0, tokens=0, kl=2.0, state=TrialState.WAITING)
            self.finish_rung(search, number, rung=1, tokens=1000, kl=1.0, state=TrialState.STOPPED if number == 3 else TrialState.WAITING)
            if number < 3:
                self.finish_rung(search, number, rung=2, tokens=4000, kl=0.4, state=TrialState.COMPLETED)
        failure = {"stage": "rung", "reason": "out_of_memory", "message": "no room", "attempts": 3}
        self.store.change_trial(search.id, 4, to=TrialState.FAILED, fence=None, failure=failure)
        rows = [
            a_row(0, shape=shapes[0], rank=1, tie_group=1, tied=True, origin="anchor:uniform"),
            a_row(1, shape=shapes[1], rank=1, tie_group=1, tied=True, score=0.69),
            a_row(2, shape=shapes[2], rank=3, tie_group=2, origin="control", is_control=True, score=0.5),
            a_row(3, shape=shapes[3], rank=None, tie_group=None, rung=1, tokens=1000, score=0.9, state="stopped"),
        ]
        board = {
            "rows": rows,
            "leader": 0,
            "finalists": [0, 1],
            "winner": None,
            "cost": a_cost(),
            "pareto": [0],
            "agreement": [{"first": "KL at rung 0", "second": "KL at rung 1", "tau": None, "num_trials": 4}],
        }
        board["controls"] = {"num_trials": 1, "score": 0.5, "kl": 0.4}
        self.store.save_board(search.id, board, fence=None)
        return self.store.get_search(search.id)


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database, migrated once: copying it is faster than migrating again."""
    path = tmp_path_factory.mktemp("migrated") / "nas.db"
    Store.open(f"sqlite:///{path}", migrate=True).close()
    return path


def register_inputs(store: Store) -> None:
    """The teacher, corpus and tasks of `Service.spec`."""
    now = utc_now()
    store.add_teacher(TeacherRecord(name="tiny", digest="a" * 64, path="/secret/tiny", config=TEACHER_CONFIG, parameters=200000, added_at=now))
    store.add_corpus(CorpusRecord(name="stories", digest="b" * 64, files=("/secret/s.txt",), num_documents=10, num_bytes=1000, added_at=now))
    kinds = (("pairs", "acc", "multiple_choice"), ("bits", "bits_per_byte", "loglikelihood_rolling"))
    for name, metric, kind in kinds:
        metrics = [{"name": metric, "higher_is_better": metric == "acc"}]
        card = {"name": name, "output_type": kind, "num_documents": 50, "default_metric": metric, "metrics": metrics}
        store.add_task(TaskRecord(name=name, digest="c" * 64, folder="/secret/tasks", card=card, added_at=now))


@pytest.fixture
def service(tmp_path: Path, migrated_file: Path) -> Iterator[Service]:
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path)})
    shutil.copy(migrated_file, tmp_path / "nas.db")
    store = Store.open(settings.database_url)
    register_inputs(store)
    # raise_server_exceptions: a bug is an answer here, as it is to a user.
    client = TestClient(create_app(store=store, settings=settings), base_url="http://127.0.0.1", raise_server_exceptions=False)
    yield Service(store=store, client=client, settings=settings)
    store.close()


@pytest.fixture
def free_port() -> int:
    """A loopback port that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
