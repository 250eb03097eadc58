from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from nas.store.records import SearchState
from tests.api.conftest import a_row

if TYPE_CHECKING:
    from tests.api.conftest import Service

JSON = {"Content-Type": "application/json"}


def test_the_registry_is_listed_without_paths_of_the_server(service: Service) -> None:
    answers = [service.client.get(f"/v1/{kind}") for kind in ("teachers", "corpora", "tasks")]

    assert [answer.json()["data"][0]["name"] for answer in answers] == ["tiny", "stories", "bits"]
    assert all(answer.json()["object"] == "list" for answer in answers)
    assert not any("/secret" in answer.text for answer in answers)


def test_a_submitted_search_is_created_and_found_at_its_location(service: Service) -> None:
    answer = service.client.post("/v1/searches", content=json.dumps(service.spec(label="mine")), headers=JSON)

    assert answer.status_code == 201
    body = answer.json()
    assert (body["state"], body["label"], body["teacher"]) == ("queued", "mine", "tiny")
    assert body["plan"]["legal_shapes"] > 0
    assert body["spec"]["sampler"]["max_trials"] == 24
    assert [(item["kind"], item["name"]) for item in body["inputs"]] == [("teacher", "tiny"), ("corpus", "stories"), ("task", "pairs"), ("task", "bits")]
    assert service.client.get(answer.headers["location"]).json() == body
    assert "/secret" not in answer.text


def test_the_spec_of_an_answer_can_be_submitted_again(service: Service) -> None:
    spec = service.client.post("/v1/searches", content=json.dumps(service.spec()), headers=JSON).json()["spec"]

    again = service.client.post("/v1/searches", content=json.dumps(spec), headers=JSON)

    assert again.status_code == 201
    assert again.json()["spec"] == spec


def test_the_same_request_is_answered_when_what_it_names_would_be_refused_by_now(service: Service) -> None:
    source = service.submit()
    spec, headers = json.dumps(service.spec(teacher=source.id)), {"Content-Type": "application/json", "Idempotency-Key": "k"}
    first = service.client.post("/v1/searches", content=spec, headers=headers)
    service.store.request_cancel(source.id)

    again = service.client.post("/v1/searches", content=spec, headers=headers)

    assert (first.status_code, again.status_code, again.json()["id"]) == (201, 201, first.json()["id"])
    assert service.client.post("/v1/searches", content=spec, headers={"Content-Type": "application/json"}).status_code == 422


def test_the_same_idempotency_key_and_body_give_the_same_search(service: Service) -> None:
    headers = {**JSON, "Idempotency-Key": "k1"}

    first, second = (service.client.post("/v1/searches", content=json.dumps(service.spec()), headers=headers) for _ in range(2))

    assert first.json()["id"] == second.json()["id"]
    assert (first.status_code, second.status_code) == (201, 201)
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    assert len(service.store.list_searches()) == 1


def test_a_preview_says_what_a_submit_would_and_stores_nothing(service: Service) -> None:
    preview = service.client.post("/v1/searches:preview", content=json.dumps(service.spec()), headers=JSON)
    submitted = service.client.post("/v1/searches", content=json.dumps(service.spec()), headers=JSON)

    assert preview.status_code == 200
    assert preview.json()["plan"] == submitted.json()["plan"]
    assert len(service.store.list_searches()) == 1


def test_a_preview_tells_the_time_once_such_a_worker_was_measured(service: Service) -> None:
    def preview() -> dict[str, Any]:
        answer = service.client.post("/v1/searches:preview", content=json.dumps(service.spec()), headers=JSON)
        assert answer.status_code == 200, answer.text
        took: dict[str, Any] = answer.json()["time"]
        return took

    assert (preview()["known"], preview()["pending"]) == (False, True)
    (wish,) = service.store.wished_speeds()
    points = [{"flops_per_token": 10_000, "trained_per_second": 1000.0, "scored_per_second": 3000.0}]
    service.store.save_speed(wish.key, points=points, host="here", error=None, fence=None)

    took = preview()
    assert took["known"]
    assert 0 < took["prepare_seconds"] < took["wall_seconds"]["expected"] <= took["wall_seconds"]["at_most"]
    assert took["worker"]["host"] == "here"


def test_a_preview_says_why_a_shape_is_not_legal(service: Service) -> None:
    keys = ["L9-D24-F32-H4-K2-E8", "L1-D24-F32-H4-K2-E8"]
    asked = service.client.post("/v1/searches:preview", params={"shape": keys}, content=json.dumps(service.spec()), headers=JSON).json()["asked"]

    assert [(shape["key"], shape["legal"]) for shape in asked] == [(keys[0], False), (keys[1], True)]
    assert "num_hidden_layers" in {problem["field"] for problem in asked[0]["problems"]}

    wrong = service.client.post("/v1/searches:preview", params={"shape": "big"}, content=json.dumps(service.spec()), headers=JSON)
    assert wrong.status_code == 422
    assert wrong.json()["errors"][0]["field"] == "shape"


def test_pages_of_searches_stay_in_step_while_new_ones_arrive(service: Service) -> None:
    ids = [service.submit(seed=seed).id for seed in range(5)][::-1]
    first = service.client.get("/v1/searches?limit=2").json()
    service.submit(seed=9)

    second = service.client.get(f"/v1/searches?limit=2&after={first['next_cursor']}").json()
    third = service.client.get(f"/v1/searches?limit=2&after={second['next_cursor']}").json()

    assert [search["id"] for page in (first, second, third) for search in page["data"]] == ids
    assert [page["has_more"] for page in (first, second, third)] == [True, True, False]
    assert third["next_cursor"] is None


def test_searches_are_filtered_by_state(service: Service) -> None:
    service.submit()
    running = service.submit(seed=1)
    service.move(running, SearchState.SEARCHING)

    assert [search["id"] for search in service.client.get("/v1/searches?state=searching").json()["data"]] == [running.id]


def test_a_search_tells_progress_best_and_cost(service: Service) -> None:
    search = service.ranked_search()

    body = service.client.get(f"/v1/searches/{search.id}").json()

    assert body["progress"]["trials"] == {"waiting": 0, "running": 0, "completed": 3, "stopped": 1, "failed": 1, "cancelled": 0}
    assert (body["progress"]["proposed"], body["progress"]["settled"]) == (5, 5)
    # A score of a lower rung is higher, and not comparable.
    assert body["best"] == {"trial": 0, "score": 0.7, "standard_error": 0.02}
    assert [(rung["tokens"], rung["finished"]) for rung in body["rungs"]] == [(0, 4), (1000, 4), (4000, 3)]
    assert search.board is not None
    kept = search.board["cost"]
    assert body["cost"] == {
        "distillation_tokens": kept["tokens"],
        "step_seconds": kept["seconds"],
        "device_seconds": kept["device_seconds"],
        "decisions": kept["decisions"],
    }


def test_times_are_utc_with_a_z(service: Service) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", service.client.get(f"/v1/searches/{service.submit().id}").json()["created_at"])


def test_a_queued_search_is_cancelled_at_once_and_again_is_a_conflict_only_when_over(service: Service) -> None:
    queued, running = service.submit(), service.submit(seed=1)
    service.move(running, SearchState.SEARCHING)

    answers = [service.client.post(f"/v1/searches/{search.id}/cancel") for search in (queued, running, running)]

    assert [answer.status_code for answer in answers] == [202, 202, 202]
    assert [answer.json()["state"] for answer in answers] == ["cancelled", "cancelling", "cancelling"]


def test_a_trial_has_results_without_documents_attempts_and_a_curve(service: Service) -> None:
    search = service.ranked_search()

    trials = service.client.get(f"/v1/searches/{search.id}/trials").json()["data"]
    answer = service.client.get(f"/v1/searches/{search.id}/trials/1")

    assert [trial["number"] for trial in trials] == [0, 1, 2, 3, 4]
    assert trials[4]["failure"]["reason"] == "out_of_memory"
    body = answer.json()
    assert body["shape"] == {**service.shape(1), "num_experts": None}
    assert [rung["tokens"] for rung in body["rungs"]] == [0, 1000, 4000]
    assert body["rungs"][2]["tasks"]["bits"] == {"value": 1.1, "standard_error": 0.03, "higher_is_better": False}
    assert [point["tokens"] for point in body["points"]] == [500, 1000, 2000, 4000]
    assert [attempt["state"] for attempt in body["attempts"]] == ["succeeded"] * 3
    assert "documents" not in answer.text


def test_trials_come_in_pages(service: Service) -> None:
    search = service.ranked_search()

    first = service.client.get(f"/v1/searches/{search.id}/trials?limit=3").json()
    second = service.client.get(f"/v1/searches/{search.id}/trials?limit=3&after={first['next_cursor']}").json()

    assert [trial["number"] for page in (first, second) for trial in page["data"]] == [0, 1, 2, 3, 4]
    assert (first["has_more"], second["has_more"]) == (True, False)


def test_the_leaderboard_is_the_stored_board(service: Service) -> None:
    search = service.ranked_search()

    body = service.client.get(f"/v1/searches/{search.id}/leaderboard").json()

    board = service.store.whole_board(search.id)
    assert board is not None
    assert body["rows"] == [{**row, "shape": {**row["shape"], "num_experts": None}} for row in board["rows"]]
    assert (body["leader"], body["winner"], body["pareto"], body["state"]) == (0, None, [0], "searching")
    assert body["cost"]["decisions"] == board["cost"]["decisions"]


def test_the_leaderboard_of_a_new_search_is_empty(service: Service) -> None:
    body = service.client.get(f"/v1/searches/{service.submit().id}/leaderboard").json()

    assert (body["rows"], body["winner"]) == ([], None)


def test_the_leaderboard_as_csv_has_a_line_per_row_and_a_column_per_task(service: Service) -> None:
    answer = service.client.get(f"/v1/searches/{service.ranked_search().id}/leaderboard?format=csv")

    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert answer.headers["content-type"].startswith("text/csv")
    assert [row["rank"] for row in rows] == ["1", "1", "3", ""]
    assert (rows[0]["hidden_size"], rows[0]["pairs"], rows[0]["pairs_standard_error"], rows[0]["bits"]) == ("48", "0.8", "0.03", "")
    assert (rows[1]["difference_low"], rows[1]["difference_high"], rows[1]["memory_bytes"]) == ("-0.05", "0.03", "400000.0")
    assert (rows[3]["difference"], rows[3]["probability_best"]) == ("", "")


def test_the_csv_has_what_was_confirmed(service: Service) -> None:
    answer = service.client.get(f"/v1/searches/{service.confirmed_search().id}/leaderboard?format=csv")

    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["is_winner"] for row in rows] == ["False", "True", "False", "False"]
    assert [row["probability_best"] for row in rows] == ["0.2", "0.8", "", ""]
    assert (rows[1]["verified"], rows[1]["held_out_pairs"], rows[1]["decode_seconds_per_token"]) == ("True", "0.8", "0.0015")
    assert rows[1]["tensor_parallel_sizes"] == "1 2 4"


def test_two_searches_are_compared_on_the_documents_that_both_used(service: Service) -> None:
    first, second = service.ranked_search(), service.confirmed_search()

    body = service.client.get(f"/v1/searches/{first.id}/compare?with={second.id}").json()

    assert body["searches"] == [first.id, second.id]
    assert (body["documents"], body["other_documents"], body["spec"]) == ("search", [], {})
    assert [row["number"] for row in body["best"]] == [0, 1]
    assert body["tasks"]["pairs"] == {"value": 0.0, "standard_error": 0.0, "low": 0.0, "high": 0.0, "paired": True}
    assert len(body["shapes"]) == 4
    assert [cost["distillation_tokens"] for cost in body["cost"]] == [8000, 8000]


def test_a_new_search_can_be_compared_and_an_unknown_one_cannot(service: Service) -> None:
    first, second = service.submit(), service.submit(seed=3)

    body = service.client.get(f"/v1/searches/{first.id}/compare?with={second.id}").json()

    assert (body["best"], body["shapes"], body["spec"]) == ([None, None], [], {"seed": [0, 3]})
    assert service.client.get(f"/v1/searches/{first.id}/compare?with=srch_0").status_code == 404
    assert service.client.get(f"/v1/searches/{first.id}/compare").status_code == 422


def test_events_are_listed_after_a_sequence(service: Service) -> None:
    search = service.ranked_search()

    first = service.client.get(f"/v1/searches/{search.id}/events?limit=2").json()
    rest = service.client.get(f"/v1/searches/{search.id}/events?limit=1000&after={first['next_cursor']}").json()

    assert [event["type"] for event in first["data"]] == ["search.created", "search.searching"]
    assert [event["sequence"] for event in rest["data"]] == list(range(3, search.version + 1))
    assert not rest["has_more"]


def frames(text: str) -> list[dict[str, str]]:
    blocks = [dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":")) for block in text.split("\n\n")]
    return [block for block in blocks if "id" in block]


def test_the_stream_holds_every_event_and_ends_with_the_search(service: Service) -> None:
    search = service.ranked_search()
    service.move(search, SearchState.SUCCEEDED)

    answer = service.client.get(f"/v1/searches/{search.id}/events/stream")

    events = service.store.list_events(search.id, limit=1000)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [(frame["id"], frame["event"]) for frame in frames(answer.text)] == [(str(event.sequence), event.type) for event in events]
    assert json.loads(frames(answer.text)[-1]["data"])["type"] == "search.succeeded"


def test_the_stream_goes_on_where_a_browser_left_it(service: Service) -> None:
    search = service.ranked_search()
    service.move(search, SearchState.FAILED)
    last = service.store.get_search(search.id).version

    resumed = service.client.get(f"/v1/searches/{search.id}/events/stream?after=1", headers={"Last-Event-ID": str(last - 2)})
    finished = service.client.get(f"/v1/searches/{search.id}/events/stream?after={last}")

    assert [frame["id"] for frame in frames(resumed.text)] == [str(last - 1), str(last)]
    assert frames(finished.text) == []


def test_there_is_no_winner_before_the_end(service: Service) -> None:
    search = service.ranked_search()

    answers = [service.client.get(f"/v1/searches/{search.id}/winner{suffix}") for suffix in ("", "/bundle")]

    assert [answer.status_code for answer in answers] == [409, 409]


def test_the_winner_has_its_bundle_for_download(service: Service) -> None:
    search = service.ranked_search()
    content = b"a tar file" * 1000
    digest = hashlib.sha256(content).hexdigest()
    (service.settings.data_folder / "w.tar").write_bytes(content)
    service.store.save_winner(search.id, {"bundle": "w.tar", "bundle_sha256": digest, "trial": 0, "config": {"hidden_size": 48}}, fence=None)

    winner = service.client.get(f"/v1/searches/{search.id}/winner").json()
    bundle = service.client.get(winner["bundle_url"])
    unchanged = service.client.get(winner["bundle_url"], headers={"If-None-Match": bundle.headers["etag"]})
    part = service.client.get(winner["bundle_url"], headers={"Range": "bytes=2-4"})

    assert (winner["config"], winner["bundle_sha256"]) == ({"hidden_size": 48}, digest)
    assert "bundle" not in winner
    assert bundle.content == content
    assert bundle.headers["etag"] == f'"{digest}"'
    assert unchanged.status_code == 304
    assert (part.status_code, part.content) == (206, b"tar")


def test_each_budget_of_a_family_has_its_own_board_and_winner(service: Service) -> None:
    search = service.submit(budget={"max_fraction": 0.7}, more_budgets=[{"max_fraction": 0.5}])
    shape, parts = service.propose(search, 0, origin="sampler"), {"pareto": [], "agreement": [], "controls": None}
    cost = {"tokens": 9, "seconds": {}, "cpus": 1.0, "gpus": 0.0}
    row = a_row(0, shape=shape, rank=1, tie_group=1)
    board = {"rows": [], "winner": None, "winners": [None, 0], "cost": cost, **parts, "more_budgets": [{"rows": [row], "winner": 0, **parts}]}
    service.store.save_board(search.id, board, fence=None)
    (service.settings.data_folder / "w1.tar").write_bytes(b"second")
    first, second = ({"bundle": f"w{budget}.tar", "bundle_sha256": str(budget) * 64, "trial": budget, "budget": budget} for budget in range(2))
    service.store.save_winner(search.id, {**first, "more": [second]}, fence=None)
    url = f"/v1/searches/{search.id}"

    boards = [service.client.get(f"{url}/leaderboard?budget={budget}").json() for budget in range(2)]
    winners = [service.client.get(f"{url}/winner?budget={budget}").json() for budget in range(2)]

    assert [(board["budget"], len(board["rows"]), board["winner"]) for board in boards] == [(0, 0, None), (1, 1, 0)]
    assert [board["winners"] for board in boards] == [[None, 0]] * 2
    assert [board["cost"]["distillation_tokens"] for board in boards] == [9, 9]
    assert [winner["trial"] for winner in winners] == [0, 1]
    assert "more" not in winners[0]
    assert service.client.get(winners[1]["bundle_url"]).content == b"second"
    assert {service.client.get(f"{url}/{path}?budget=2").status_code for path in ("leaderboard", "winner", "winner/bundle")} == {404}


@pytest.mark.parametrize("path", ["../outside.tar", "/etc/passwd", "gone.tar"])
def test_a_bundle_outside_of_the_data_folder_is_not_served(service: Service, path: str) -> None:
    search = service.ranked_search()
    service.store.save_winner(search.id, {"bundle": path, "bundle_sha256": "0" * 64}, fence=None)

    assert service.client.get(f"/v1/searches/{search.id}/winner/bundle").status_code == 404


def test_the_service_is_alive_and_ready(service: Service) -> None:
    assert service.client.get("/healthz").json() == {"status": "ok"}
    ready = service.client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")  # it answers; that no controller lives is told beside it


def test_the_server_ends_with_its_parent(tmp_path: Path, free_port: int) -> None:
    """A parent that starts `python -m api` and is then killed, so that it can tell nobody."""
    start = "import os, subprocess, sys, time; "
    start += "child = subprocess.Popen([sys.executable, '-m', 'api'], env={**os.environ, 'NAS_PARENT_PID': str(os.getpid())}); time.sleep(60)"
    environment = {**os.environ, "NAS_DATA": str(tmp_path), "NAS_PORT": str(free_port)}
    parent = subprocess.Popen([sys.executable, "-c", start], env=environment, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{free_port}/healthz"
    assert wait_until(lambda: answers(address), seconds=30)

    parent.send_signal(signal.SIGKILL)
    parent.wait()

    assert wait_until(lambda: not answers(address), seconds=10)


def answers(address: str) -> bool:
    try:
        return httpx2.get(address, timeout=1).status_code == 200
    except httpx2.TransportError:
        return False


def wait_until(condition: Callable[[], bool], *, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_the_application_loads_nothing_heavy() -> None:
    code = "import sys, api.app; print([name for name in ('torch', 'transformers', 'ray', 'optuna', 'lm_eval', 'plotly', 'workers') if name in sys.modules])"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"


def test_a_running_search_tells_the_time_it_still_takes_and_one_that_ended_does_not(service: Service) -> None:
    search = service.submit()

    def seconds_left() -> float | None:
        left: float | None = service.client.get(f"/v1/searches/{search.id}").json()["progress"]["seconds_left"]
        return left

    assert seconds_left() is None
    service.store.save_board(search.id, {"rows": [], "winner": None, "time_left": {"seconds": 90.5, "rungs": []}}, fence=None)
    service.store.change_search(search.id, to=SearchState.PREPARING, expected=[SearchState.QUEUED], fence=None)
    service.store.change_search(search.id, to=SearchState.SEARCHING, expected=[SearchState.PREPARING], fence=None)
    assert seconds_left() == 90.5
    service.store.change_search(search.id, to=SearchState.FAILED, expected=[SearchState.SEARCHING], fence=None, error={"reason": "x", "message": "y"})
    assert seconds_left() is None


def test_a_chain_is_asked_for_by_the_id_of_its_first_search(service: Service) -> None:
    first = service.submit()
    spec = json.dumps(service.spec(teacher=first.id))

    preview, second = (service.client.post(f"/v1/{path}", content=spec, headers=JSON).json() for path in ("searches:preview", "searches"))

    assert (second["state"], second["teacher_search"], second["waits_for"]) == ("queued", first.id, first.id)
    assert preview["inputs"][0] == second["inputs"][0] == {"kind": "teacher", "name": first.id, "digest": None}
    assert preview["plan"]["teacher_parameters"] == first.plan["budgets"][0]["space"]["largest"]["parameters"]
    service.move(first, SearchState.CANCELLED)
    refused = service.client.delete(f"/v1/searches/{first.id}")
    assert refused.status_code == 409
    assert second["id"] in refused.json()["detail"]
    again = service.client.post("/v1/searches", content=spec, headers=JSON)
    assert (again.status_code, again.json()["errors"][0]["field"]) == (422, "teacher")
