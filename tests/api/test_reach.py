"""Whatever the API can do, the client can, and so can a terminal: every operation of the document is reached over real HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nas import cli
from nas import client as client_module
from nas.client import Client
from nas.connection import ApiError
from nas.store.records import SearchState
from tests.served import served

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from tests.api.conftest import Service


@dataclass
class Recorder:
    """The application, and the operations that were asked of it."""

    app: ASGIApp
    templates: dict[tuple[str, str], str]
    reached: set[str] = field(default_factory=set)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.reached |= {name for (method, path), name in self.templates.items() if method == scope["method"] and re.fullmatch(path, scope["path"])}
        await self.app(scope, receive, send)


@dataclass(frozen=True, kw_only=True)
class Live:
    """A service that listens, with searches in it."""

    url: str
    recorder: Recorder
    done: str
    ranked: str
    fresh: Callable[[], str]
    digest: str
    distilled: str

    @property
    def operations(self) -> set[str]:
        return set(self.recorder.templates.values())


@pytest.fixture
def live(service: Service) -> Iterator[Live]:
    document = service.client.get("/openapi.json").json()
    templates = {
        (method.upper(), re.sub(r"\{\w+\}", "[^/]+", path)): operation["operationId"]
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    content = b"a bundle" * 1000
    digest = hashlib.sha256(content).hexdigest()
    (service.settings.data_folder / "w.tar").write_bytes(content)
    done, ranked = service.confirmed_search(), service.ranked_search()
    shape = service.shape(1)
    winner = {
        "bundle": "w.tar",
        "bundle_sha256": digest,
        "trial": 1,
        "shape": shape,
        "parameters": 90000,
        "share_of_teacher": 0.45,
        "config": {"hidden_size": 48},
    }
    service.store.save_winner(done.id, winner, fence=None)
    attempt = service.store.list_attempts(done.id)[0]
    service.store.save_logs(done.id, {attempt.id: "a line\n"}, fence=None)
    service.move(done, SearchState.SUCCEEDED)
    distilled = service.finish_distillation(service.distil(done))
    recorder = Recorder(service.client.app, templates)
    with served(recorder) as url:
        yield Live(
            url=url,
            recorder=recorder,
            done=done.id,
            ranked=ranked.id,
            fresh=lambda: service.submit().id,
            digest=digest,
            distilled=distilled.id,
        )


def test_the_client_reaches_every_operation(live: Live, service: Service, tmp_path: Path) -> None:
    with Client(live.url) as client:
        assert (client.is_alive(), client.is_ready(), "fastapi" in client.version()["libraries"]) == (True, True, True)
        assert client.project()["name"] == "default"
        assert client.nodes() == []
        assert [len(names) for names in (client.teachers(), client.corpora(), client.tasks())] == [1, 1, 2]
        spec = json.dumps(service.spec(labels={"team": "edge"})).encode()
        assert client.preview(spec)["object"] == "preview"
        made, again = (client.submit(spec, idempotency_key="k") for _ in range(2))
        assert made["id"] == again["id"] == client.searches(labels={"team": "edge"})[0]["id"]
        assert client.update(made["id"], max_trials=30)["spec"]["sampler"]["max_trials"] == 30
        assert [act(made["id"])["state"] for act in (client.pause, client.resume, client.cancel)] == ["paused", "queued", "cancelled"]
        client.delete(made["id"])
        assert [trial["number"] for trial in client.trials(live.done, sort="-number", state="completed")] == [2, 1, 0]
        assert client.trial(live.done, 1)["number"] == 1
        assert client.trial_metrics(live.done, 1, max_points=2)["num_points"] > 2
        assert client.retry(live.ranked, 4)["state"] == "waiting"
        attempts = list(client.attempts(live.done))
        assert client.log(live.done, attempts[-1]["id"]) == "a line\n"
        assert len(client.leaderboard(live.done)["rows"]) == 4
        assert client.compare(live.done, live.ranked)["searches"] == [live.done, live.ranked]
        assert client.importances(live.done)["hidden_size"] == 0.75
        assert client.winner(live.done)["trial"] == 1
        assert "hidden_size" in client.winner_as(live.done, format="hf-config")
        for saved in (client.download_bundle(live.done, target=tmp_path / "a.tar"), client.download(live.digest, target=tmp_path / "b.tar")):
            assert hashlib.sha256(saved.read_bytes()).hexdigest() == live.digest
        assert client.request_bundle(live.done, 1)["state"] == "packed"
        assert client.download_trial_bundle(live.done, 1, target=tmp_path / "c.tar").read_bytes() == (tmp_path / "a.tar").read_bytes()
        request = json.dumps({"search_id": live.done}).encode()
        distilled, again = (client.distil(request, idempotency_key="d") for _ in range(2))
        assert distilled["id"] == again["id"] == client.distillations(search=live.done, state="queued")[0]["id"]
        assert client.cancel_distillation(distilled["id"])["state"] == "cancelled"
        client.delete_distillation(distilled["id"])
        assert client.distillation(live.distilled)["tokens_done"] == 2000
        assert client.distillation_log(live.distilled) == "a line\n"
        assert client.download_distillation(live.distilled, target=tmp_path / "model.tar").read_bytes() == b"a model" * 1000
        followed = [event["sequence"] for event in client.follow_distillation(live.distilled)]
        assert followed == [event["sequence"] for event in client.distillation_events(live.distilled)] != []
        assert [event["sequence"] for event in client.follow(live.done)] == [event["sequence"] for event in client.events(live.done)]

    assert live.recorder.reached == live.operations


def pack_what_is_asked_for(service: Service, *, search_id: str, until: threading.Event) -> None:
    """In the place of a controller: of what is asked for the first fails, the others are packed."""
    num_seen = 0
    while not until.wait(0.05):
        for wanted in service.store.waiting_bundles(limit=9):
            num_seen += 1
            if num_seen == 1:
                error = {"reason": "disk_full", "message": "no room", "log": ""}
                service.store.fail_bundle(search_id, wanted.trial, error=error, max_failures=1, device_seconds=0.0, fence=None)
            else:
                service.pack(service.store.get_search(search_id), wanted.trial, content=b"a front member")


def test_a_bundle_that_is_asked_for_is_waited_for_and_one_that_cannot_be_packed_is_told(
    live: Live, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "BUNDLE_SECONDS", 0.05)
    service.verify_trial(service.store.get_search(live.done), 0)
    done = threading.Event()
    packing = threading.Thread(target=pack_what_is_asked_for, args=(service,), kwargs={"search_id": live.done, "until": done})
    packing.start()
    try:
        with Client(live.url) as client:
            with pytest.raises(ApiError, match=r"could not be packed \(disk_full: no room\)"):
                client.download_trial_bundle(live.done, 0, target=tmp_path / "a.tar")
            assert client.download_trial_bundle(live.done, 0, target=tmp_path / "a.tar").read_bytes() == b"a front member"
    finally:
        done.set()
        packing.join()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("a.tar")] == ["a.tar"]


NO_COMMAND = {"get_health", "get_readiness"}
"""Of probes, not of people."""


def test_the_command_reaches_every_operation(
    live: Live, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NAS_URL", live.url)
    spec = tmp_path / "spec.json"

    def nas(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["nas", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert int(ended.value.code or 0) == code, captured.err
        assert "Traceback" not in captured.err
        return captured.out

    spec.write_text(json.dumps(service.spec()), encoding="utf-8")
    for group in ("teachers", "corpora", "tasks"):
        assert nas(group, "list")
    nas("version")
    nas("whoami")
    nas("nodes")
    nas("estimate", spec, "--wait-seconds", 0)
    made = nas("submit", spec).strip()
    assert "paused" in nas("pause", made)
    assert "queued" in nas("resume", made)
    assert "edge" in nas("extend", made, "--max-trials", 30, "--max-parallel-trials", 2, "--label", "team=edge")
    assert made in nas("list", "--label", "team=edge")
    assert "30" in nas("show", made, "--json")
    assert "cancelled" in nas("cancel", made)
    assert "cancelled" in nas("wait", made, code=1)
    nas("delete", made, "--yes")
    nas("show", made, code=3)
    assert "waiting" in nas("retry", live.ranked, 4)
    nas("retry", live.ranked, 4, code=4)
    assert "anchor:uniform" in nas("trials", live.done, "--json")
    assert "attempts" in nas("trial", live.done, 1)
    assert nas("curve", live.done, 1)
    assert "a line" in nas("logs", live.done, "--attempt", json.loads(nas("logs", live.done, "--json"))[-1]["id"])
    assert "hidden_size" in nas("importances", live.done)
    assert "winner" in nas("events", live.done)
    assert nas("leaderboard", live.done)
    assert nas("compare", live.done, live.ranked)
    assert json.loads(nas("winner", live.done, "--format", "hf-config")) == {"hidden_size": 48}
    nas("winner", live.done, "--bundle", tmp_path / "a.tar")
    nas("download", live.digest, tmp_path / "b.tar")
    assert live.digest in nas("trial", live.done, 1, "--bundle", tmp_path / "c.tar")
    nas("trial", live.done, 0, "--bundle", tmp_path / "none.tar", code=4)
    assert (tmp_path / "c.tar").read_bytes() == (tmp_path / "a.tar").read_bytes()
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    distilled = nas("distillations", "submit", live.done, "--recipe", "tokens=4096", "--recipe", "optimizer=muon").strip()
    assert "4,096" in nas("distillations", "show", distilled)
    assert distilled in nas("distillations", "list", "--search", live.done)
    assert "cancelled" in nas("distillations", "cancel", distilled)
    nas("distillations", "watch", distilled, code=1)
    nas("distillations", "download", distilled, tmp_path / "none.tar", code=4)
    nas("distillations", "delete", distilled, "--yes")
    assert "a line" in nas("distillations", "logs", live.distilled)
    assert "held-out KL after" in nas("distillations", "show", live.distilled)
    assert "distilled" in nas("distillations", "events", live.distilled)
    assert "succeeded" in nas("distillations", "watch", live.distilled)
    nas("distillations", "download", live.distilled, tmp_path / "model.tar")
    assert (tmp_path / "model.tar").read_bytes() == b"a model" * 1000
    assert "succeeded" in nas("wait", live.done)
    assert "succeeded" in nas("watch", live.done)

    assert live.operations - live.recorder.reached == NO_COMMAND
