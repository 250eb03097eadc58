"""A small version of the real search, through REST: a pretrained teacher, real text, lm-eval tasks that carry signal at its size, Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.client import Client
from nas.registration import register_corpus, register_tasks, register_teacher
from nas.settings import Settings
from nas.store.store import Store

pytestmark = [
    pytest.mark.reference,
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.skipif("NAS_REFERENCE" not in os.environ, reason="NAS_REFERENCE is not set: no reference material"),
]

ROWS = 100
"""Of each task: the confirmation scores all documents that no rung saw, and this test wants to be short. Half of them must show that
the teacher beats random weights, or the search is refused."""

TASKS: dict[str, dict[str, Any]] = {
    "ending": {
        "file": "tinystories/ending-validation.jsonl",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc_norm"}],
    },
    "lastword": {
        "file": "tinystories/lastword-test.jsonl",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [{"metric": "acc"}],
    },
    "bits": {
        "file": "tinystories/pages-test.jsonl",
        "rows": 30,
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "agreement": {
        "file": "tinystories_minpairs/agreement.jsonl",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
}
SPEC = {
    "teacher": "stories260K",
    "corpus": {"parts": [{"name": "tinystories"}], "sequence_length": 256, "calibration_tokens": 16384, "validation_tokens": 8192},
    "tasks": [{"name": "ending"}, {"name": "lastword"}, {"name": "bits"}, {"name": "agreement"}],
    "budget": {"max_fraction": 0.6},
    "sampler": {"max_trials": 5, "num_startup_trials": 2},
    "controls": {"num_forced_anchors": 3},
    "rungs": {"first_tokens": 8192, "factor": 2, "num_trained": 3},
    "num_finalists": 1,
    "evaluation": {"documents_per_task": 50, "latency_prompt_tokens": 16, "latency_new_tokens": 4},
    "distillation": {"learning_rate": 2e-3, "batch_size": 2},
}

LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
tokens = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
assert model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] == tokens.shape[1] + 4
print(sum(parameter.numel() for parameter in model.parameters()))
"""


def write_tasks(folder: Path, *, reference: Path) -> Path:
    """The tasks as YAML (JSON is YAML) beside the first rows of each."""
    for name, task in TASKS.items():
        values = {key: value for key, value in task.items() if key not in ("file", "rows")}
        with (reference / "data" / "eval" / task["file"]).open(encoding="utf-8") as file:
            rows = [next(file) for _ in range(task.get("rows", ROWS))]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        values |= {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A running service with the reference material registered."""
    reference, data = Path(os.environ["NAS_REFERENCE"]), tmp_path_factory.mktemp("data")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "NAS_DATA": str(data), "NAS_PORT": str(port), "NAS_NUM_CPUS": "2", "NAS_EXECUTOR": "ray"}
    settings = Settings.from_environment(environment)
    store = Store.open(settings.database_url, migrate=True)
    register_teacher(str(reference / "models" / "stories260K"), name=None, store=store, settings=settings)
    register_corpus([str(reference / "data" / "text" / "tinystories" / "train.jsonl")], name="tinystories", store=store, settings=settings)
    register_tasks(str(write_tasks(tmp_path_factory.mktemp("tasks"), reference=reference)), dataset_path=None, store=store, settings=settings)
    store.close()
    with (data / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "nas.cli", "serve"], env=environment, stdout=log, stderr=log)
    with Client(f"http://127.0.0.1:{port}") as client:
        deadline = time.monotonic() + 60
        while not client.is_ready():
            assert process.poll() is None, (data / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the service did not get ready"
            time.sleep(0.2)
        yield client
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def search(client: Client) -> dict[str, Any]:
    """The search, followed to its end."""
    spec = json.dumps(SPEC).encode()
    assert client.preview(spec)["plan"]["max_parameters"] == int(0.6 * 260_032)
    submitted = client.submit(spec)
    for _ in client.follow(submitted["id"]):
        pass
    return client.search(submitted["id"])


def test_the_search_succeeds_with_all_its_trials(client: Client, search: dict[str, Any]) -> None:
    assert search["state"] == "succeeded", search["error"]
    states = [trial["state"] for trial in client.trials(search["id"])]
    assert len(states) == 5
    assert set(states) <= {"completed", "stopped"}


def test_every_shape_is_within_the_budget_and_smaller_than_the_teacher(client: Client, search: dict[str, Any]) -> None:
    rows = client.leaderboard(search["id"])["rows"]
    assert len({json.dumps(row["shape"], sort_keys=True) for row in rows}) == len(rows) == 5
    assert all(row["parameters"] <= int(0.6 * 260_032) for row in rows)


def test_the_board_ranks_the_anchors_at_equal_tokens(client: Client, search: dict[str, Any]) -> None:
    board = client.leaderboard(search["id"])
    rows = [row for row in board["rows"] if row["state"] == "completed"]
    assert {"anchor:width_only", "anchor:depth_only", "anchor:uniform"} <= {row["origin"] for row in rows}
    assert len({row["tokens"] for row in rows}) == 1
    assert rows[0]["rank"] == 1
    assert len(set(TASKS) - set(board["weak_tasks"])) > 1
    assert all(set(row["tasks"]) == set(TASKS) - set(board["weak_tasks"]) for row in rows)


def test_distillation_brings_every_trial_nearer_to_the_teacher_from_rung_to_rung(client: Client, search: dict[str, Any]) -> None:
    for trial in client.trials(search["id"]):
        kl = [rung["kl"]["value"] for rung in client.trial(search["id"], trial["number"])["rungs"]]
        assert kl == sorted(kl, reverse=True), f"trial {trial['number']}"


def test_the_winner_is_verified_and_its_bundle_loads_in_a_fresh_process(client: Client, search: dict[str, Any], tmp_path: Path) -> None:
    winner = client.winner(search["id"])
    assert winner["scores"]["confirmation"]["verified"] is True
    with tarfile.open(client.download_bundle(search["id"], target=tmp_path / "bundle.tar")) as archive:
        archive.extractall(tmp_path, filter="data")
    for folder in (tmp_path / "bundle", tmp_path / "bundle" / "pruned"):
        process = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=False)
        assert process.stdout.strip() == str(winner["parameters"]), process.stderr[-1000:]
