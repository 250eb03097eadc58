from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.waiting import wait_until
from workers.courier import MAX_PARCEL_BYTES, Collector, Deliverer, Parcel, PostOffice, carrying, raised_flags
from workers.liveness import BEAT, STOP, SUPERSEDED, ask_to_stop, supersede
from workers.logs import LOG
from workers.step import PROGRESS


@pytest.fixture
def node(tmp_path: Path) -> Path:
    (tmp_path / "node").mkdir()
    return tmp_path / "node"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The controller's side of the mailbox."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_what_a_step_writes_appears_on_the_other_side(node: Path, here: Path) -> None:
    collector, deliverer = Collector(folder=node), Deliverer(folder=here)
    for round_ in range(3):
        append(node / PROGRESS, json.dumps({"tokens": round_}) + "\n")
        append(node / LOG, f"line {round_}\n")
        (node / BEAT).write_text(str(round_))
        parcel = collector.collect()
        deliverer.deliver(parcel)
        collector.arrived(parcel)

    for name in (PROGRESS, LOG, BEAT):
        assert (here / name).read_bytes() == (node / name).read_bytes()
    assert collector.collect() == {}


def test_a_parcel_whose_arrival_nobody_acknowledged_is_written_once(node: Path, here: Path) -> None:
    collector, deliverer = Collector(folder=node), Deliverer(folder=here)
    append(node / PROGRESS, "1\n")
    deliverer.deliver(collector.collect())
    append(node / PROGRESS, "2\n")

    parcel = collector.collect()
    deliverer.deliver(parcel)
    collector.arrived(parcel)
    append(node / PROGRESS, "3\n")
    deliverer.deliver(collector.collect())

    assert (here / PROGRESS).read_text() == "1\n2\n3\n"


def test_of_a_flood_the_end_is_carried(node: Path, here: Path) -> None:
    append(node / LOG, "x" * 3 * MAX_PARCEL_BYTES + "the end\n")

    Deliverer(folder=here).deliver(Collector(folder=node).collect())

    assert (here / LOG).stat().st_size == MAX_PARCEL_BYTES
    assert (here / LOG).read_text().endswith("the end\n")


def test_flags_reach_the_step_and_its_last_words_the_controller(node: Path, here: Path) -> None:
    office, deliverer = PostOffice(), Deliverer(folder=here)
    with carrying(node, send=lambda parcel: office.send("att", parcel), beat_seconds=0.02):
        ask_to_stop(here)
        office.exchange({"att": raised_flags(here), "other": [SUPERSEDED]})
        wait_until((node / STOP).exists, what="the request to stop")
        assert not (node / SUPERSEDED).exists()
        append(node / PROGRESS, "last\n")
    for parcel in office.exchange({}).get("att", []):
        deliverer.deliver(parcel)

    assert (here / PROGRESS).read_text() == "last\n"
    assert office.exchange({}) == {}


def test_a_step_whose_mailbox_was_superseded_or_is_gone_must_leave_no_trace(here: Path, tmp_path: Path) -> None:
    assert raised_flags(here) == []
    supersede(here)

    assert raised_flags(here) == raised_flags(tmp_path / "gone") == [STOP, SUPERSEDED]


def test_a_step_that_reaches_nobody_keeps_its_words_and_stops_when_it_must_have_been_given_up(node: Path) -> None:
    away, got = [True], list[Parcel]()

    def send(parcel: Parcel) -> list[str]:
        if away[0]:
            raise ConnectionError("no route to host")
        got.append(parcel)
        return []

    append(node / PROGRESS, "said meanwhile\n")
    with carrying(node, send=send, beat_seconds=0.02):
        wait_until((node / SUPERSEDED).exists, what="its end as the one that counts")
        assert (node / STOP).exists()
        away[0] = False

    assert got[-1] == {PROGRESS: (0, b"said meanwhile\n")} or {PROGRESS: (0, b"said meanwhile\n")} in got
