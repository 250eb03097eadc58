"""Progress is for display: whatever a worker writes, nothing of it can trouble the store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nas.store.records import AttemptRecord, AttemptState, utc_now
from workers.progress import ProgressReader, make_point
from workers.step import PROGRESS

SOUND = {"tokens": 100, "loss": 1.5, "learning_rate": 1e-3, "tokens_per_second": 1e4}
ATTEMPT = AttemptRecord(
    id="att_1", search_id="srch_1", stage="rung", trial=3, rung=1, state=AttemptState.RUNNING, reason=None, started_at=utc_now(), finished_at=None
)


def test_a_line_of_training_is_a_point_of_its_rung() -> None:
    point = make_point(SOUND, attempt=ATTEMPT)

    assert point is not None
    assert (point.trial, point.rung, point.tokens, point.loss, point.learning_rate, point.tokens_per_second) == (3, 1, *SOUND.values())


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("value", [None, "1", [], 10**400, -(2**63), float("nan"), float("inf")])
def test_what_no_training_writes_is_no_point(name: str, value: object) -> None:
    assert make_point({**SOUND, name: value}, attempt=ATTEMPT) is None
    assert make_point({key: number for key, number in SOUND.items() if key != name}, attempt=ATTEMPT) is None


def test_a_line_is_read_once_it_is_whole_and_one_that_is_no_json_is_dropped(tmp_path: Path) -> None:
    reader, file = ProgressReader(folder=tmp_path), tmp_path / PROGRESS
    assert reader.read() == []
    file.write_text(f'{json.dumps(SOUND)}\n[1]\nno json\n{{"tokens": 2')

    assert reader.read() == [SOUND]
    with file.open("a") as more:
        more.write("}\n")
    assert reader.read() == [{"tokens": 2}]
