"""`nas export-optuna` against the API's own answers: the study says what the board says."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import pytest
import uvicorn

from nas import cli

if TYPE_CHECKING:
    from tests.api.conftest import Service


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(service.client.app, log_level="warning"))  # type: ignore[arg-type]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=10)


def test_a_search_becomes_a_study_with_its_scores_shapes_and_rungs(service: Service, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, file = service.ranked_search(), tmp_path / "study.log"
    monkeypatch.setattr(sys, "argv", ["nas", "export-optuna", search.id, str(file), "--url", url])

    with pytest.raises(SystemExit) as ended:
        cli.main()

    assert not ended.value.code
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    trials = optuna.load_study(study_name=search.id, storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "FAIL"]
    assert [trial.value for trial in trials[:3]] == [0.7, 0.69, 0.5]
    assert trials[1].params["hidden_size"] == 48
    assert trials[3].intermediate_values == {0: 2.0, 1000: 1.0}
    assert trials[0].user_attrs["origin"] == "anchor:uniform"
