"""Lists in their orders and filters, curves, winners and files, over HTTP."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
import yaml

from nas.store.records import PointRecord, SearchRecord
from tests.api.test_problems import assert_problem

if TYPE_CHECKING:
    from tests.api.conftest import Service


@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        ("", [0, 1, 2, 3, 4]),
        ("sort=-number", [4, 3, 2, 1, 0]),
        ("sort=parameters", [0, 1, 2, 3, 4]),
        ("sort=-parameters", [4, 3, 2, 1, 0]),
        ("state=completed", [0, 1, 2]),
        ("state=completed&sort=-parameters", [2, 1, 0]),
        ("state=waiting", []),
        ("origin=anchor", [0]),
        ("origin=anchor:uniform", [0]),
        ("origin=sampler", [1, 3]),
        ("origin=samp", []),
    ],
)
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_trials_are_paged_in_any_order_and_filtered(service: Service, query: str, numbers: list[int], limit: int) -> None:
    search = service.ranked_search()
    found, after = [], ""
    while True:
        page = service.client.get(f"/v1/searches/{search.id}/trials?{query}&limit={limit}{after}").json()
        found += [trial["number"] for trial in page["data"]]
        assert len(page["data"]) <= limit
        if not page["has_more"]:
            break
        after = f"&after={page['next_cursor']}"

    assert found == numbers


def test_a_cursor_of_another_order_is_refused(service: Service) -> None:
    url = f"/v1/searches/{service.ranked_search().id}/trials"
    cursor = service.client.get(f"{url}?limit=1").json()["next_cursor"]

    assert service.client.get(f"{url}?after={cursor}&sort=-number").status_code == 422


def test_lists_of_what_is_registered_are_paged_by_name(service: Service) -> None:
    first = service.client.get("/v1/tasks?limit=1").json()
    second = service.client.get(f"/v1/tasks?limit=1&after={first['next_cursor']}").json()

    assert [[task["name"] for task in page["data"]] for page in (first, second)] == [["bits"], ["pairs"]]
    assert (first["has_more"], second["has_more"], second["next_cursor"]) == (True, False, None)
    assert service.client.get(f"/v1/teachers?after={first['next_cursor']}").status_code == 422


def test_searches_are_found_by_label_state_and_time(service: Service) -> None:
    def submit(**labels: str) -> str:
        made: str = service.client.post("/v1/searches", json=service.spec(labels=labels)).json()["id"]
        return made

    first, second = submit(team="a", kind="x:y"), submit(team="b", kind="x:y")
    between = service.client.get(f"/v1/searches/{second}").json()["created_at"]
    service.client.post(f"/v1/searches/{first}/cancel")

    def found(*query: tuple[str, str]) -> list[str]:
        return [search["id"] for search in service.client.get("/v1/searches", params=query).json()["data"]]

    assert found(("label", "kind:x:y")) == [second, first]
    assert found(("label", "kind:x:y"), ("label", "team:a")) == [first]
    assert found(("label", "team:c")) == []
    assert found(("state", "cancelled")) == [first]
    assert found(("created_after", between)) == [second]
    assert found(("created_before", between)) == [first]


@pytest.mark.parametrize("text", ["a\0", "\x1b[2J", "two\nlines"])
def test_a_label_is_a_line_wherever_it_is_given(service: Service, text: str) -> None:
    """PostgreSQL reads nothing out of JSON with a NUL in it: one such label would end every later question by label in a 500."""
    search = service.submit()

    answers = [
        service.client.post("/v1/searches", json=service.spec(label=text)),
        service.client.post("/v1/searches", json=service.spec(labels={"team": text})),
        service.client.patch(f"/v1/searches/{search.id}", json={"labels": {"team": text}}, headers={"If-Match": "*"}),
    ]

    for answer in answers:
        assert_problem(answer, "invalid-spec")
        assert "a line of text without control characters" in answer.json()["detail"]
    assert_problem(service.client.get("/v1/searches", params={"label": f"team:{text}"}), "invalid-request")


def test_a_learning_curve_is_thinned_to_what_was_asked_for(service: Service) -> None:
    search = service.ranked_search()
    url = f"/v1/searches/{search.id}/trials/0/metrics"
    service.store.add_points(
        PointRecord(search_id=search.id, trial=0, rung=2, tokens=1000 + step, loss=1.0, learning_rate=1e-3, tokens_per_second=1.0) for step in range(1, 500)
    )

    whole, thin, rung = (service.client.get(f"{url}?{query}").json() for query in ("", "max_points=7", "rung=1"))

    assert whole["num_points"] == len(whole["points"]) == thin["num_points"] == 503
    assert [point["tokens"] for point in rung["points"]] == [500, 1000]
    assert len(thin["points"]) == 7
    assert [thin["points"][end] for end in (0, -1)] == [whole["points"][end] for end in (0, -1)]
    assert service.client.get(f"/v1/searches/{search.id}/trials/77/metrics").status_code == 404


def test_a_failed_trial_is_retried_once_for_a_key(service: Service) -> None:
    search = service.ranked_search()
    url = f"/v1/searches/{search.id}/trials/4"

    answers = [service.client.post(f"{url}/retry", headers={"Idempotency-Key": "k"}) for _ in range(2)]

    assert [(answer.status_code, answer.json()["state"], answer.json()["failure"]) for answer in answers] == [(202, "waiting", None)] * 2
    assert "idempotency-replayed" in answers[1].headers
    assert service.client.post(f"{url}/retry").status_code == 409
    assert service.client.post(f"/v1/searches/{search.id}/trials/77/retry").status_code == 404


def test_who_has_a_trial_as_it_is_gets_no_body(service: Service) -> None:
    search = service.ranked_search()
    url = f"/v1/searches/{search.id}/trials/0"
    etag = service.client.get(url).headers["etag"]

    unchanged = service.client.get(url, headers={"If-None-Match": etag})
    service.store.add_points([PointRecord(search_id=search.id, trial=0, rung=2, tokens=9999, loss=1.0, learning_rate=1e-3, tokens_per_second=1.0)])

    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert service.client.get(url, headers={"If-None-Match": etag}).status_code == 200


def test_importances_come_with_the_winner(service: Service) -> None:
    early = service.client.get(f"/v1/searches/{service.ranked_search().id}/importances").json()
    late = service.client.get(f"/v1/searches/{service.confirmed_search().id}/importances").json()

    assert early["importances"] == {}
    assert list(late["importances"].items()) == [("hidden_size", 0.75), ("mlp_fill", 0.25)]


@pytest.fixture
def bundle(service: Service) -> tuple[SearchRecord, bytes, str]:
    """A search whose winner has a bundle, its content and digest."""
    search, content = service.ranked_search(), b"a tar file" * 1000
    digest = hashlib.sha256(content).hexdigest()
    (service.settings.data_folder / "w.tar").write_bytes(content)
    service.store.save_winner(search.id, {"bundle": "w.tar", "bundle_sha256": digest, "trial": 0, "config": {"hidden_size": 48}}, fence=None)
    return search, content, digest


def test_the_winner_comes_as_a_config_and_as_yaml(service: Service, bundle: tuple[SearchRecord, bytes, str]) -> None:
    url = f"/v1/searches/{bundle[0].id}/winner"

    config, text = service.client.get(f"{url}?format=hf-config"), service.client.get(f"{url}?format=yaml")

    assert config.json() == {"hidden_size": 48}
    assert "config.json" in config.headers["content-disposition"]
    assert text.headers["content-type"].startswith("application/yaml")
    assert yaml.safe_load(text.text) == service.client.get(url).json()


def test_a_file_is_downloaded_by_its_digest_whole_or_in_part(service: Service, bundle: tuple[SearchRecord, bytes, str]) -> None:
    _, content, digest = bundle
    url = f"/v1/artifacts/{digest}"

    whole = service.client.get(url)

    assert whole.content == content
    assert whole.headers["etag"] == f'"{digest}"'
    assert "immutable" in whole.headers["cache-control"]
    assert service.client.get(url, headers={"If-None-Match": f'"{digest}"'}).status_code == 304
    assert service.client.get(f"/v1/artifacts/{'0' * 64}").status_code == 404
    assert service.client.get("/v1/artifacts/x").status_code == 422


@pytest.mark.parametrize(
    ("headers", "status", "part"),
    [
        ({"Range": "bytes=2-4"}, 206, slice(2, 5)),
        ({"Range": "bytes=9990-"}, 206, slice(9990, None)),
        ({"Range": "bytes=-3"}, 206, slice(-3, None)),
        ({"Range": "bytes=0-99999999999"}, 206, slice(None)),
        ({"Range": "bytes=10000-"}, 416, None),
        ({"Range": "bytes=-0"}, 416, None),
        ({"Range": "bytes=4-2"}, 200, slice(None)),
        ({"Range": "bytes=a-b"}, 200, slice(None)),
        ({"Range": "bytes=0-1,3-4"}, 200, slice(None)),
        ({"Range": "bytes=" + "9" * 5000 + "-"}, 200, slice(None)),
        ({"Range": "bytes=2-4", "If-Range": '"other"'}, 200, slice(None)),
    ],
)
def test_ranges_of_a_file(service: Service, bundle: tuple[SearchRecord, bytes, str], headers: dict[str, str], status: int, part: slice | None) -> None:
    _, content, digest = bundle

    answer = service.client.get(f"/v1/artifacts/{digest}", headers=headers)

    assert answer.status_code == status
    if part is None:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["content-range"] == "bytes */10000"
    else:
        assert answer.content == content[part]
