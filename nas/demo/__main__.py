"""`make demo`: the main job from end to end, on a teacher, a corpus and tasks that the project makes by itself.

It goes the way a user goes: register, submit over REST, watch, pull the winner, run its full distillation. Everything it
writes lies in the folder `demo`; what is slow to make (the teacher) is kept for the next run. Ends with `demo/report.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nas.client import Client
from nas.compress import corpus, data_order, distillation, losses, objective, train_plan
from nas.compress.blocks import Blocks, load_blocks
from nas.compress.teacher import load_model
from nas.demo import language, teacher
from nas.registration import register_corpus, register_tasks, register_teacher
from nas.search.layout import BLOCKS, prepared_key
from nas.search.results import RungResult
from nas.search.trial import measure
from nas.settings import Settings
from nas.spec import SearchSpec, parse_spec
from nas.store.store import Store
from nas.terminal import event_line, leaderboard_table

ROOT = Path("demo")
SEED = 0
START_SECONDS = 60.0
NUM_DOCUMENTS = 30_000
DOCUMENTS_PER_TASK = 800
NUM_CONTROLS = 8
SEARCH_TOKENS = 12_500
FULL_RUN_TOKENS = 400_000
_TABLE_WIDTH = 200
"""Columns of the leaderboard; what says least is left out of a narrower one."""
MIN_SIGNAL = 5.0
"""Standard errors by which the teacher must beat random weights on every task."""
MIN_LOSS_RATIO = 2.0
"""Unigram model's loss over the teacher's."""

console = Console()


def main() -> int:
    logging.basicConfig(level=logging.WARNING)
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    cores = min(2, os.cpu_count() or 1)
    torch.set_num_threads(cores)
    with _timed(seconds, "teacher, corpus and tasks"):
        inputs = make_inputs()
    data = (ROOT / "data").absolute()
    shutil.rmtree(data, ignore_errors=True)
    environment = {**os.environ, "NAS_DATA": str(data), "NAS_PORT": str(_free_port()), "NAS_NUM_CPUS": str(cores), "NAS_NUM_GPUS": "0"}
    settings = Settings.from_environment(environment)
    with _timed(seconds, "register"):
        _register(inputs, settings=settings)
    with _serving(environment, settings=settings) as client:
        with _timed(seconds, "search"):
            search_id = _search(client, parallel=cores)
        board = client.leaderboard(search_id)
        winner = client.winner(search_id)
        with _timed(seconds, "pull the winner"):
            bundle = _pull(client, search_id)
    with _timed(seconds, "full distillation"):
        full = _full_run(bundle, inputs=inputs, threads=cores)
    with _timed(seconds, "final scores"):
        report = _report(board, winner=winner, search_id=search_id, full=full, settings=settings)
    seconds["total"] = time.perf_counter() - started
    report |= {"seconds": seconds, "bundle": str(bundle), "search_id": search_id, "full_run": json.loads((full / "distillation.json").read_text("utf-8"))}
    (ROOT / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False), encoding="utf-8")
    _print_report(report)
    console.print(f"\nreport: {ROOT / 'report.json'}   bundle: {bundle}", highlight=False)
    console.print(f"leaderboard page: .venv/bin/nas serve --data {ROOT / 'data'}   then open http://127.0.0.1:8400/searches/{search_id}")
    return 0 if report["teacher_is_worth_compressing"] else 1


# -- the way of a user -----------------------------------------------------------------------------------------------------


def make_inputs() -> Path:
    """Corpus, tasks and teacher; made once and kept under a digest of the code that makes them."""
    makers = (language, teacher, corpus, data_order, distillation, losses, objective, train_plan)
    digest = hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in makers)).hexdigest()[:12]
    folder = ROOT / f"inputs-{digest}"
    if (folder / "done").exists():
        console.print(f"teacher, corpus and tasks: kept from an earlier run ({folder})", highlight=False)
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    console.print("making a corpus and an lm-eval task pack, and training a teacher on the corpus")
    stories = language.write_corpus(folder / "corpus", seed=SEED, num_documents=NUM_DOCUMENTS)
    language.write_tasks(folder / "tasks", seed=SEED + 1, documents_per_task=DOCUMENTS_PER_TASK)
    teacher.train_teacher(folder / "teacher", corpus=stories, report=_print_progress)
    (folder / "done").touch()
    return folder


def _register(inputs: Path, *, settings: Settings) -> None:
    settings.data_folder.mkdir(parents=True)
    store = Store.open(settings.database_url, migrate=True)
    try:
        register_teacher(str(inputs / "teacher"), name="demo-teacher", store=store, settings=settings)
        register_corpus([str(inputs / "corpus")], name="demo-stories", store=store, settings=settings)
        register_tasks(str(inputs / "tasks"), dataset_path=None, store=store, settings=settings)
    finally:
        store.close()


@contextlib.contextmanager
def _serving(environment: Mapping[str, str], *, settings: Settings) -> Iterator[Client]:
    """`nas serve` for as long as the block runs; nothing is left running after it."""
    log = (ROOT / "serve.log").open("wb")
    process = subprocess.Popen([sys.executable, "-m", "nas.cli", "serve"], env=dict(environment), stdout=log, stderr=log)
    try:
        with Client(f"http://{settings.host}:{settings.port}") as client:
            deadline = time.monotonic() + START_SECONDS
            while not client.is_ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the service did not start; see {ROOT / 'serve.log'}")
                time.sleep(0.2)
            console.print(f"service: http://{settings.host}:{settings.port}")
            yield client
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()


def _search(client: Client, *, parallel: int) -> str:
    spec = {
        "label": "make demo",
        "teacher": "demo-teacher",
        "corpus": {"parts": [{"name": "demo-stories"}], "sequence_length": 128, "calibration_tokens": 32_768, "validation_tokens": 16_384},
        "tasks": [{"name": task["name"]} for task in client.tasks()],
        "budget": {"max_fraction": 0.4},
        "sampler": {"max_trials": 14, "num_startup_trials": 6},
        "controls": {"anchors": True, "num_forced_anchors": 3, "num_random": NUM_CONTROLS},
        "rungs": {"first_tokens": SEARCH_TOKENS, "factor": 2, "num_trained": 3},
        "evaluation": {"documents_per_task": 150, "held_out_documents": 250, "batch_size": 64, "latency_prompt_tokens": 64, "latency_new_tokens": 16},
        "distillation": {"batch_size": 4},
        "resources": {"cpus": 1.0, "max_parallel_trials": parallel},
        "seed": SEED,
    }
    search = client.submit(json.dumps(spec).encode())
    console.print(f"search {search['id']}: {search['plan']['legal_shapes']} legal shapes of at most {search['plan']['max_parameters']:,} parameters")
    for event in client.follow(search["id"]):
        if line := event_line(event):
            console.print("  " + line, highlight=False, markup=False)
    state = client.search(search["id"])
    if state["state"] != "succeeded":
        raise RuntimeError(f"the search ended as {state['state']}: {state['error']}; see {ROOT / 'serve.log'}")
    Console(width=_TABLE_WIDTH).print(leaderboard_table(client.leaderboard(search["id"]), width=_TABLE_WIDTH))
    return str(search["id"])


def _pull(client: Client, search_id: str) -> Path:
    """The bundle over HTTP, unpacked."""
    archive = client.download_bundle(search_id, target=ROOT / "winner.tar")
    shutil.rmtree(ROOT / "winner", ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(ROOT / "winner", filter="data")
    return ROOT / "winner" / "bundle"


def _full_run(bundle: Path, *, inputs: Path, threads: int) -> Path:
    """The full distillation, as a user types it."""
    folder = ROOT / "distilled"
    shutil.rmtree(folder, ignore_errors=True)
    command = ["distill", str(bundle), "--teacher", str(inputs / "teacher"), "--corpus", str(inputs / "corpus"), "--out", str(folder)]
    command += ["--tokens", str(FULL_RUN_TOKENS), "--threads", str(threads), "--json"]
    console.print("nas " + " ".join(command), highlight=False)
    subprocess.run([sys.executable, "-m", "nas.cli", *command], check=True, stdout=subprocess.DEVNULL)
    return folder


# -- the table -------------------------------------------------------------------------------------------------------------


def _report(board: dict[str, Any], *, winner: dict[str, Any], search_id: str, full: Path, settings: Settings) -> dict[str, Any]:
    """All rows on the documents that no rung used; every distilled row but the full run at the same tokens."""
    store = Store.open(settings.database_url)
    search = store.get_search(search_id)
    store.close()
    spec = parse_spec(json.dumps(search.spec))
    prepared = settings.prepared_folder / prepared_key(spec, inputs=search.inputs)
    after = _measure_held_out(spec, inputs=search.inputs, prepared=prepared, checkpoint=full)
    rows = {row["number"]: row for row in board["rows"]}
    held_out = {number: row["confirmation"]["held_out"] for number, row in rows.items() if row.get("confirmation")}
    controls = [number for number, row in rows.items() if row["is_control"] and number in held_out]
    table = [_row("teacher", board["teacher"]["held_out"]), _row("winner", held_out[winner["trial"]]), _row("winner, full run", after)]
    names = {number: row["origin"].removeprefix("anchor:").replace("_", " ") for number, row in rows.items() if row["origin"].startswith("anchor:")}
    table += [_row(name, held_out[number]) for number, name in names.items() if number in held_out]
    table.append(_median_row(f"random shapes (median of {len(controls)})", [held_out[number] for number in controls]))
    table.append(_row("random weights", board["random"]["held_out"]))
    unigram = _unigram_loss(load_blocks(prepared / BLOCKS))
    signal = _signal(board)
    ratio = unigram / board["teacher"]["held_out"]["loss"]["value"]
    return {
        "rows": table,
        "tokens": spec.rungs.tokens(spec.rungs.num_trained),
        "full_run_tokens": FULL_RUN_TOKENS,
        "winner": {name: winner[name] for name in ("trial", "shape", "parameters", "share_of_teacher")},
        "unigram_loss": unigram,
        "unigram_loss_over_teacher": ratio,
        "teacher_signal": signal,
        "teacher_is_worth_compressing": ratio >= MIN_LOSS_RATIO and all(value >= MIN_SIGNAL for value in signal.values()),
        "search_cost": board["cost"],
    }


def _measure_held_out(spec: SearchSpec, *, inputs: Mapping[str, Any], prepared: Path, checkpoint: Path) -> dict[str, Any]:
    model = load_model(checkpoint, dtype="float32", device="cpu")
    result: RungResult = measure(
        spec, inputs=inputs, prepared=prepared, model=model, device="cpu", rung=spec.rungs.num_trained, tokens=FULL_RUN_TOKENS, held_out=True, with_tasks=True
    )
    return result.as_dict()


def _row(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    def short(metric: Mapping[str, Any]) -> dict[str, float]:
        return {key: metric[key] for key in ("value", "standard_error")}

    tasks = {task: short(metric) for task, metric in result["tasks"].items()}
    return {
        "name": name,
        "parameters": result["parameters"],
        "tokens": result["tokens"],
        "loss": short(result["loss"]),
        "kl": short(result["kl"]),
        "tasks": tasks,
    }


def _median_row(name: str, results: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over shapes; the errors are the medians of the shapes' own errors."""
    rows = [_row(name, result) for result in results]

    def middle(metrics: list[dict[str, float]]) -> dict[str, float]:
        return {key: median(metric[key] for metric in metrics) for key in ("value", "standard_error")}

    return {
        "name": name,
        "parameters": int(median(row["parameters"] for row in rows)),
        "tokens": rows[0]["tokens"],
        "loss": middle([row["loss"] for row in rows]),
        "kl": middle([row["kl"] for row in rows]),
        "tasks": {task: middle([row["tasks"][task] for row in rows]) for task in rows[0]["tasks"]},
    }


def _unigram_loss(blocks: Blocks) -> float:
    """Cross-entropy of the training frequencies on the validation tokens, nats per token; one count is added to every token."""
    counts = torch.bincount(blocks.train_NT.flatten().long(), minlength=int(blocks.validation_NT.max()) + 1).double() + 1
    log_frequency = (counts / counts.sum()).log()
    return float(-log_frequency[blocks.validation_NT.flatten().long()].mean())


def _signal(board: Mapping[str, Any]) -> dict[str, float]:
    """Per task, by how many standard errors the teacher beats random weights on the held-out documents."""
    teacher_scores, random_scores = board["teacher"]["held_out"]["tasks"], board["random"]["held_out"]["tasks"]
    signal = {}
    for task, metric in teacher_scores.items():
        gain = metric["value"] - random_scores[task]["value"]
        error = math.hypot(metric["standard_error"], random_scores[task]["standard_error"])
        signal[task] = (gain if metric["higher_is_better"] else -gain) / error
    return signal


def _print_report(report: Mapping[str, Any]) -> None:
    tasks = list(report["rows"][0]["tasks"])
    table = Table("", "parameters", "tokens", "held-out loss", "KL to teacher", *tasks, box=None, header_style="bold")
    for row in report["rows"]:
        numbers = [row["loss"], row["kl"], *(row["tasks"][task] for task in tasks)]
        cells = [f"{metric['value']:.3f} ± {metric['standard_error']:.3f}" for metric in numbers]
        table.add_row(row["name"], f"{row['parameters']:,}", f"{row['tokens']:,}", *cells)
    wide = Console(width=max(console.width, 160))
    wide.print("\nOn documents that no rung used:", style="bold")
    wide.print(table)
    signal = ", ".join(f"{task} {value:.0f}" for task, value in report["teacher_signal"].items())
    console.print(f"\nteacher over random weights, in standard errors: {signal}; unigram loss over teacher loss: {report['unigram_loss_over_teacher']:.2f}")
    console.print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items()), highlight=False)


def _print_progress(progress: Any) -> None:
    console.print(f"  {progress.tokens:>10,} tokens, loss {progress.loss:.3f}, {progress.tokens_per_second:,.0f} tokens/s", highlight=False)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
