"""The leaderboard over HTTP, and what reading costs: the same number of queries however many trials a search has."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event

from nas.store import boards
from tests.store.big_search import fill, make_row

if TYPE_CHECKING:
    from nas.store.records import SearchRecord
    from tests.api.conftest import Service


def filled(service: Service, num_trials: int) -> SearchRecord:
    search = service.submit(label=f"{num_trials} trials")
    fill(service.store, search.id, num_trials=num_trials)
    return service.store.get_search(search.id)


def address(search: SearchRecord) -> str:
    return f"/v1/searches/{search.id}/leaderboard"


def ask(service: Service, path: str, **parameters: Any) -> dict[str, Any]:
    answer = service.client.get(path, params=parameters)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def all_rows(service: Service, search: SearchRecord, **parameters: Any) -> list[dict[str, Any]]:
    """By pages."""
    rows, cursor = [], {}
    while True:
        page = ask(service, address(search), **parameters, **cursor)
        rows += page["rows"]
        assert page["has_more"] is (page["next_cursor"] is not None)
        if not page["has_more"]:
            return rows
        cursor = {"after": page["next_cursor"]}


def in_answer(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "shape": {**row["shape"], "num_experts": None}}


def test_pages_join_to_the_stored_board(service: Service) -> None:
    search = filled(service, 100)
    stored = service.board(search)["rows"]

    assert all_rows(service, search, limit=7) == [in_answer(row) for row in stored]
    assert ask(service, address(search), limit=7)["num_rows"] == len(stored)


def test_rows_are_filtered_and_sorted(service: Service) -> None:
    search = filled(service, 100)
    stored = [in_answer(row) for row in service.board(search)["rows"]]
    small = [row for row in stored if row["rung"] == 1 and row["parameters"] <= 80_000]
    assert small

    assert all_rows(service, search, rung=1, max_parameters=80_000, sort="kl", limit=5) == sorted(small, key=lambda row: (row["kl"], row["number"]))
    assert all_rows(service, search, sort="-rank", limit=9) == stored[::-1]
    assert [row["number"] for row in all_rows(service, search, pareto=True)] == service.board(search)["pareto"]
    assert all_rows(service, search, state="failed") == []


def test_a_cursor_goes_on_in_its_own_version(service: Service) -> None:
    search = filled(service, 60)
    first = ask(service, address(search), limit=20)
    board = service.board(search)
    service.store.save_board(search.id, {**board, "rows": [{**row, "score": 0.0} for row in board["rows"]]}, fence=None)

    second = ask(service, address(search), limit=100, after=first["next_cursor"])

    assert second["version"] == first["version"] != ask(service, address(search))["version"]
    assert first["rows"] + second["rows"] == [in_answer(row) for row in board["rows"]]


def test_a_cursor_of_a_version_that_is_gone_is_told_so(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    search = filled(service, 60)
    first = ask(service, address(search), limit=20)
    monkeypatch.setattr(boards, "KEPT_SECONDS", -1.0)
    for loss in (1.0, 2.0):
        board = service.board(search)
        service.store.save_board(search.id, {**board, "rows": [{**row, "loss": loss} for row in board["rows"]]}, fence=None)

    answer = service.client.get(address(search), params={"after": first["next_cursor"]})

    assert (answer.status_code, answer.json()["type"]) == (410, "/problems/outdated")
    assert "begin again with the first page" in answer.json()["detail"]
    # An open page goes on where it was, in the board as it is now.
    page = service.client.get(f"/searches/{search.id}", params={"after": first["next_cursor"]})
    assert page.status_code == 200
    assert f'id="trial-{first["rows"][-1]["number"]}"' not in page.text
    assert f'id="trial-{service.board(search)["rows"][20]["number"]}"' in page.text


@pytest.mark.parametrize("change", [{"sort": "kl"}, {"sort": "-rank"}, {"after": "x"}, {"after": "W10"}])
def test_a_cursor_of_another_order_is_refused(service: Service, change: dict[str, str]) -> None:
    search = filled(service, 60)
    cursor = ask(service, address(search), limit=20)["next_cursor"]

    answer = service.client.get(address(search), params={"after": cursor, **change})

    assert answer.status_code == 422
    assert [problem["field"] for problem in answer.json()["errors"]] == ["after"]


def test_who_has_this_version_gets_nothing_again(service: Service) -> None:
    search = filled(service, 20)
    etag = service.client.get(address(search)).headers["etag"]

    assert service.client.get(address(search), headers={"If-None-Match": etag}).status_code == 304
    service.store.save_board(search.id, service.board(search) | {"rows": []}, fence=None)
    assert service.client.get(address(search), headers={"If-None-Match": etag}).status_code == 200


def test_the_whole_board_streams_as_json_lines_and_as_csv(service: Service) -> None:
    search = filled(service, 1200)  # more than one batch
    stored = service.board(search)["rows"]

    lines = service.client.get(address(search), params={"format": "ndjson"})
    table = service.client.get(address(search), params={"format": "csv", "pareto": "true"})

    assert lines.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line) for line in lines.text.splitlines()] == stored
    found = list(csv.DictReader(io.StringIO(table.text)))
    assert [int(row["number"]) for row in found] == service.board(search)["pareto"]
    assert {row["is_pareto"] for row in found} == {"True"}


def test_a_page_of_the_html_board_leads_to_the_next(service: Service) -> None:
    search = filled(service, 300)
    numbers = [row["number"] for row in service.board(search)["rows"]]

    first = service.client.get(f"/searches/{search.id}").text
    next_link = next(part.split('"')[0] for part in first.split('href="') if "after=" in part.split('"')[0]).replace("&amp;", "&")
    second = service.client.get(next_link).text

    assert all(f'id="trial-{number}"' in first for number in numbers[:50])
    assert all(f'id="trial-{number}"' in second for number in numbers[50:100])
    assert f'id="trial-{numbers[50]}"' not in first


def test_a_long_figure_says_that_it_draws_a_part(service: Service) -> None:
    long, short = filled(service, 1000), filled(service, 50)

    assert "the front, the best 100 and as many spread evenly" in service.client.get(f"/searches/{long.id}").text
    assert "spread evenly" not in service.client.get(f"/searches/{short.id}").text


@contextmanager
def counted(service: Service) -> Iterator[list[str]]:
    """The statements that run inside, without the beginnings of transactions."""
    found: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("BEGIN"):
            found.append(statement)

    event.listen(service.store._engine, "before_cursor_execute", note)
    yield found
    event.remove(service.store._engine, "before_cursor_execute", note)


def test_every_read_takes_as_many_queries_with_1000_trials_as_with_60(service: Service) -> None:
    few, many = filled(service, 60), filled(service, 1000)
    other = filled(service, 30)
    routes = [route for route in service.client.get("/openapi.json").json()["paths"].items() if "get" in route[1]]
    pages = ["/", "/searches/{search_id}", "/searches/{search_id}?sort=kl&pareto=true", "/searches/{search_id}/trials/{number}"]
    pages += ["/searches/{search_id}/compare?with={other}"]
    skipped = ("/events/stream", "/winner", "/bundle", "/log", "/artifacts", "/metrics", "/distillations/")
    paths = [path for path, _ in routes if not any(part in path for part in skipped)] + pages
    values = {"number": 8, "other": other.id}

    for search in (few, many):  # the connection's own statements
        service.client.get(f"/v1/searches/{search.id}")

    def cost(path: str, search: SearchRecord) -> int:
        target = path.replace("/compare", f"/compare?with={other.id}") if path.endswith("/compare") else path
        with counted(service) as statements:
            answer = service.client.get(target.format(search_id=search.id, **values))
        assert answer.status_code == 200, (path, answer.text[:300])
        return len(statements)

    assert len(paths) > 15
    for path in paths:
        first = [cost(path, search) for search in (few, many)]  # figures of a version of a board are made once
        assert first[0] == first[1] <= 25, path
        assert cost(path, few) == cost(path, many) <= min(first[0], 20), path


def test_a_row_of_the_test_board_is_like_a_real_one() -> None:
    """Columns of the made-up board are those of `nas.search.ranking.Row`, and what the controller adds."""
    from dataclasses import fields

    from nas.search.leaderboard import Row

    trial = {"number": 1, "rung": 1, "origin": "sampler", "shape": {}, "parameters": 9, "state": "stopped"}
    assert set(make_row(trial, rank=None, tie_group=None, score=0.5)) == {field.name for field in fields(Row)} | {"confirmation"}
