"""What all tests share: one thread per process, no network, and no silent skip of what must run.

The world is stricter here than in production: warnings of our own code are errors, and in continuous integration
(NAS_REQUIRED=ray,postgresql,browser,faults) a skipped test of one of those parts fails the run.
"""

from __future__ import annotations

import os

# Before torch and the hub's client are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import json
import random
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import summary
from tests.word_tokenizer import word_tokenizer

_skipped: dict[str, list[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        summary.collect(report.user_properties)
    if report.skipped:
        for part in _required():
            if part in report.keywords or f"[{part}" in report.nodeid or f"-{part}" in report.nodeid:
                _skipped.setdefault(part, []).append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    # With pytest-xdist the workers report to the controller, which alone decides.
    if _skipped and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for part, tests in _skipped.items():
        terminalreporter.write_line(f"required part {part!r} was skipped: {', '.join(tests)}", red=True)
    for line in summary.lines():
        terminalreporter.write_line(line)


def _required() -> list[str]:
    return [part for part in os.environ.get("NAS_REQUIRED", "").split(",") if part]


# -- files by URL ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server of our own; what reads the environment finds it, processes that are started later included."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_server: str) -> str:
    """An empty place on it."""
    import s3fs

    bucket = f"nas-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(bucket)
    return f"s3://{bucket}/team"


# -- the smallest input of a whole search ----------------------------------------------------------------------------------

_WORDS = ["the", "cat", "dog", "sun", "sat", "ran", "shone", "on", "a", "mat", "hill", "day", "red", "big", "old"]
_CHOICES = (" cat", " dog", " sun", " hill")


@pytest.fixture(scope="session")
def tiny_sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Llama of 25 thousand parameters, a corpus, and a task whose right answers are those that this teacher prefers."""
    folder = tmp_path_factory.mktemp("sources")
    generator = random.Random(0)
    corpus = folder / "corpus.jsonl"
    stories = (" ".join(generator.choices(_WORDS, k=30)) for _ in range(800))
    corpus.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories), encoding="utf-8")
    model, tokenizer = _save_tiny_teacher(folder / "teacher")
    task = folder / "tasks"
    task.mkdir()
    questions = [" ".join(generator.choices(_WORDS, k=6)) for _ in range(48)]
    rows = [{"text": question, "choices": list(_CHOICES), "gold": _preferred(model, tokenizer, question)} for question in questions]
    (task / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (task / "choice.yaml").write_text(
        "task: choice\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\noutput_type: multiple_choice\n"
        'target_delimiter: ""\ndoc_to_text: "{{text}}"\ndoc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n',
        encoding="utf-8",
    )
    return {"teacher": folder / "teacher", "corpus": corpus, "tasks": task}


@pytest.fixture(scope="session")
def register_tiny(tiny_sources: dict[str, Path]) -> Callable[..., None]:
    """Registers the tiny teacher, corpus and task, all under their names in `tiny_spec`."""

    def register(*, store: Any, settings: Any) -> None:
        from nas.registration import register_corpus, register_tasks, register_teacher

        register_teacher(str(tiny_sources["teacher"]), name="tiny", store=store, settings=settings)
        register_corpus([str(tiny_sources["corpus"])], name="words", store=store, settings=settings)
        register_tasks(str(tiny_sources["tasks"]), dataset_path=None, store=store, settings=settings)

    return register


@pytest.fixture(scope="session")
def tiny_spec() -> Callable[..., dict[str, Any]]:
    """The spec of a search that takes seconds; changes replace whole sections."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "teacher": "tiny",
            "corpus": {"parts": [{"name": "words"}], "sequence_length": 32, "calibration_tokens": 512, "validation_tokens": 512},
            "tasks": [{"name": "choice"}],
            "budget": {"max_fraction": 0.7},
            "controls": {"anchors": False},
            "sampler": {"name": "tpe", "max_trials": 4, "num_startup_trials": 2},
            "rungs": {"first_tokens": 2048, "factor": 2, "num_trained": 2, "keep": 0.5},
            "evaluation": {"documents_per_task": 16, "latency_prompt_tokens": 8, "latency_new_tokens": 2},
            "distillation": {"learning_rate": 3e-3, "batch_size": 4},
            "compression": {"depth": "block_influence"},
            "num_finalists": 1,
            **changes,
        }

    return make


def _save_tiny_teacher(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer(_WORDS)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(_WORDS) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)  # not a search's seed: its random weights would be this teacher
        model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model, tokenizer


def _preferred(model: Any, tokenizer: Any, question: str) -> int:
    """The choice, each of one token, that the model finds likeliest."""
    import torch

    with torch.no_grad():
        logits_V = model(torch.tensor([tokenizer.encode(question)])).logits[0, -1]
    tokens = [tokenizer.encode(choice)[0] for choice in _CHOICES]
    return int(logits_V[tokens].argmax())
