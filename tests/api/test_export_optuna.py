"""`nas export-optuna` against the API's own answers: the study says what the board says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import pytest

from nas import cli
from tests.served import served

if TYPE_CHECKING:
    from tests.api.conftest import Service


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with served(service.client.app) as address:
        yield address


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
