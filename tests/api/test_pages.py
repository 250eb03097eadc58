from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from api.rendering import format_age, format_bytes, format_count, format_seconds
from nas.store.records import SearchState, TrialState, utc_now
from tests.api.conftest import a_row

if TYPE_CHECKING:
    from tests.api.conftest import Service

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTILE = "<script>alert('x')</script>\"' onload=alert(1) {{ 7 * 7 }}"


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page(service: Service, path: str) -> str:
    answer = service.client.get(path, headers={"Accept": "text/html"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/html")
    return str(answer.text)


def rows(text: str) -> dict[str, str]:
    """Id -> text of the table rows that have one."""
    found = re.findall(r'<tr id="([^"]+)"[^>]*>(.*?)</tr>', text, flags=re.DOTALL)
    return {name: plain(body) for name, body in found}


def plain(text: str) -> str:
    """What a reader sees."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def figure(text: str, name: str) -> dict[str, object]:
    found = re.search(rf"""id="{name}" data-figure='([^']*)'""", text)
    assert found is not None
    values = json.loads(html.unescape(found.group(1)))
    assert isinstance(values, dict)
    return values


@pytest.fixture
def paths(service: Service) -> list[str]:
    search = service.ranked_search()
    confirmed = service.confirmed_search()
    compared = f"/searches/{search.id}/compare?with={confirmed.id}"
    return [
        "/",
        f"/searches/{search.id}",
        f"/searches/{confirmed.id}",
        compared,
        f"/searches/{search.id}/trials/1",
        f"/searches/{search.id}/trials/4",
        "/docs",
        "/problems/conflict",
    ]


def test_no_page_holds_inline_code_or_loads_anything_from_elsewhere(service: Service, paths: list[str]) -> None:
    for path in paths:
        for tag, attributes in Elements(page(service, path)).tags:
            assert tag != "style"
            assert tag != "script" or attributes.get("src")
            assert not [name for name in attributes if name == "style" or name.startswith("on")], (path, tag, attributes)
            for name in ("src", "href"):
                assert not (attributes.get(name) or "").startswith(("http:", "https:", "//", "javascript:")), (path, attributes)


def test_everything_that_a_page_loads_or_links_is_there(service: Service, paths: list[str]) -> None:
    links = {
        link.partition("#")[0]
        for path in paths
        for _, attributes in Elements(page(service, path)).tags
        for name in ("src", "href")
        if (link := attributes.get(name) or "").startswith("/")
    }

    assert [link for link in sorted(links) if service.client.get(link).status_code != 200] == []


def test_every_page_forbids_foreign_code(service: Service, paths: list[str]) -> None:
    for path in paths:
        policy = service.client.get(path).headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "script-src" not in policy
        assert "unsafe-eval" not in policy


def test_a_hostile_label_is_only_text(service: Service) -> None:
    search = service.submit(label=HOSTILE)
    service.propose(search, 0)
    service.move(search, SearchState.FAILED, error={"message": HOSTILE})

    for path in ("/", f"/searches/{search.id}", f"/searches/{search.id}/trials/0"):
        text = page(service, path)
        elements = Elements(text)
        assert "<script>alert" not in text
        assert HOSTILE in elements.text
        assert not [tag for tag, attributes in elements.tags if "onload" in attributes]


def test_without_searches_the_list_says_what_to_do(service: Service) -> None:
    text = page(service, "/")

    assert "No searches yet" in text
    assert "nas submit" in text


def test_the_list_shows_state_progress_and_best_score(service: Service) -> None:
    search = service.ranked_search()

    row = rows(page(service, "/"))[f"row-{search.id}"]

    for part in ("ranked", "searching", "tiny", "60% of teacher", "5 of", "1 failed", "0.700 ± 0.020", "just now"):
        assert part in row


def test_labels_stand_on_the_list_and_on_the_search_as_text(service: Service) -> None:
    search = service.submit(labels={"team": "<b>edge</b>", "year": "2026"})

    for text in (page(service, "/"), page(service, f"/searches/{search.id}")):
        assert "team=&lt;b&gt;edge&lt;/b&gt; · year=2026" in text


def test_the_board_marks_ranks_ties_origins_and_what_is_not_ranked(service: Service) -> None:
    text = page(service, f"/searches/{service.ranked_search().id}")
    found = rows(text)

    assert list(found) == ["trial-0", "trial-1", "trial-2", "trial-3"]
    assert found["trial-0"].startswith("1 = #0 leads uniform Pareto")
    assert found["trial-1"].startswith("1 = #1 3 48 97")
    assert found["trial-2"].startswith("3 #2 random control")
    assert found["trial-3"].startswith("– #3")
    assert "0.690 ± 0.020" in found["trial-1"]
    assert "Not at the last rung" in text


def test_the_leader_is_called_the_winner_once_there_is_one(service: Service) -> None:
    search = service.ranked_search()
    service.store.save_winner(search.id, {"bundle": "w.tar", "bundle_sha256": "0" * 64}, fence=None)

    text = page(service, f"/searches/{search.id}")

    assert rows(text)["trial-0"].startswith("1 = #0 winner")
    assert figure(text, "plot-score")["leader"] == "winner"
    assert f"/v1/searches/{search.id}/winner/bundle" in text


def test_a_trial_that_the_board_does_not_have_yet_is_listed(service: Service) -> None:
    search = service.ranked_search()
    service.propose(search, 9, origin="user")

    assert rows(page(service, f"/searches/{search.id}"))["trial-9"].startswith("– #9 yours waiting 3 48 105 8 / 4")


@pytest.mark.parametrize(("verified", "text"), [(True, "✓ verified"), (False, "✗ not verified")])
def test_a_finalist_is_marked_as_verified_or_not(service: Service, verified: bool, text: str) -> None:
    search = service.ranked_search()
    metric = {"value": 0.625, "standard_error": 0.03, "higher_is_better": True}
    confirmation = {
        "verified": verified,
        "reason": None if verified else "the logits differ",
        "held_out": {"kl": metric, "loss": metric, "tasks": {"pairs": metric}},
    }
    service.store.save_confirmation(None, search_id=search.id, trial=1, confirmation=confirmation, fence=None)
    board = service.board(search)
    service.store.save_board(search.id, {**board, "rows": [{**row, "verified": verified if row["number"] == 1 else None} for row in board["rows"]]}, fence=None)

    found = rows(page(service, f"/searches/{search.id}"))
    assert text in found["trial-1"]
    assert text not in found["trial-0"]
    trial = page(service, f"/searches/{search.id}/trials/1")
    assert text in trial
    assert "0.625" in trial
    assert ("the logits differ" in trial) is not verified


def test_the_finalists_show_how_probably_each_is_the_best_their_latency_and_where_they_can_be_served(service: Service) -> None:
    text = plain(page(service, f"/searches/{service.confirmed_search().id}"))
    table = text[text.index("Confirmed on held-out documents") :]

    assert "#0 finalist ✓ verified 90.0K 20%" in table
    assert "#1 winner ✓ verified 90.0K 80%" in table
    assert "20.0, 1.50 ms TP 1, 2, 4; blocks none" in table


def test_each_row_shows_its_distance_to_the_best_and_its_memory(service: Service) -> None:
    found = rows(page(service, f"/searches/{service.ranked_search().id}"))

    assert "−0.050 … +0.030" in found["trial-1"]
    assert "400.0 kB" in found["trial-1"]
    assert "…" not in found["trial-3"]


def test_the_cost_of_each_decision_and_the_importances_are_on_the_page(service: Service) -> None:
    text = plain(page(service, f"/searches/{service.confirmed_search().id}"))

    assert "rung 2 3 1 4.00K 12 s 4.00K tokens, 12 s" in text
    assert "in all, with preparing 8.00K 27 s" in text
    assert "hidden_size 75%" in text


def test_two_searches_stand_side_by_side(service: Service) -> None:
    first, second = service.ranked_search(), service.confirmed_search()
    service.submit(seed=3)
    text = plain(page(service, f"/searches/{first.id}/compare?with={second.id}"))

    assert "Best shape #0 L3-D48-F96-H8-K4-E8 (not confirmed) #1 L3-D48-F97-H8-K4-E8" in text
    assert "pairs 0.0000 0.0000 … 0.0000 cannot be told apart paired over the same documents" in text
    assert "Nothing: the specs and their inputs are the same." in text
    assert f'<option value="{second.id}">ranked, ' in page(service, f"/searches/{first.id}")


def test_failures_are_grouped_with_their_reason(service: Service) -> None:
    text = page(service, f"/searches/{service.ranked_search().id}")

    assert "out_of_memory" in text
    assert "no room" in text


def test_the_score_figure_has_points_of_the_last_rung_the_teacher_and_the_budget(service: Service) -> None:
    search = service.ranked_search()

    values = figure(page(service, f"/searches/{search.id}"), "plot-score")

    points = values["points"]
    assert isinstance(points, list)
    assert [(point["number"], point["kind"], point["tied"], point["y"]) for point in points] == [
        (0, "anchor", True, 0.7),
        (1, "sampler", True, 0.69),
        (2, "control", False, 0.5),
    ]
    assert (values["teacher"], values["budget"]) == (search.plan["teacher_parameters"], search.plan["max_parameters"])
    assert values["leader"] == "leads"


def test_the_curve_has_the_points_and_the_rungs(service: Service) -> None:
    values = figure(page(service, f"/searches/{service.ranked_search().id}/trials/1"), "plot-curve")

    assert values["x"] == [500, 1000, None, 2000, 4000]
    assert [rung["tokens"] for rung in values["rungs"]] == [0, 1000, 4000]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (SearchState.QUEUED, "Waiting for the controller"),
        (SearchState.PREPARING, "Preparing"),
        (SearchState.SEARCHING, "No shape has been proposed yet"),
        (SearchState.CANCELLED, "No shape was evaluated"),
    ],
)
def test_a_search_without_trials_says_why(service: Service, state: SearchState, text: str) -> None:
    search = service.submit()
    if state is not SearchState.QUEUED:
        service.move(search, state)

    assert text in page(service, f"/searches/{search.id}")


@pytest.mark.parametrize(
    ("state", "actions"),
    [
        (SearchState.SEARCHING, ["pause", "cancel"]),
        (SearchState.PAUSING, ["resume", "cancel"]),
        (SearchState.PAUSED, ["resume", "cancel"]),
        (SearchState.CANCELLING, []),
        (SearchState.SUCCEEDED, []),
    ],
)
def test_a_page_offers_what_may_be_done_in_this_state(service: Service, state: SearchState, actions: list[str]) -> None:
    search = service.submit()
    service.move(search, state)

    assert re.findall(r'data-post="/v1/searches/[^/]+/(\w+)"', page(service, f"/searches/{search.id}")) == actions


def test_a_search_that_paused_by_itself_says_why_and_not_that_it_failed(service: Service) -> None:
    search = service.submit()
    service.move(search, SearchState.PAUSED, error={"reason": "disk_full", "message": "no space left"})

    text = page(service, f"/searches/{search.id}")

    assert "The search paused by itself" in text
    assert "no space left" in text
    assert "The search failed" not in text


@pytest.mark.parametrize(("state", "offered"), [(SearchState.SEARCHING, True), (SearchState.SUCCEEDED, False)])
def test_a_failed_trial_can_be_tried_again_while_its_search_goes_on(service: Service, state: SearchState, offered: bool) -> None:
    search = service.ranked_search()
    if state is not SearchState.SEARCHING:
        service.move(search, state)

    assert ("/trials/4/retry" in page(service, f"/searches/{search.id}/trials/4")) == offered


def test_every_event_of_the_service_refreshes_an_open_page(service: Service) -> None:
    script = service.client.get("/static/live.js").text
    sources = "".join(file.read_text("utf-8") for folder in ("nas/store", "workers") for file in sorted((REPOSITORY / folder).glob("*.py")))
    written = set(re.findall(r'"((?:search|trial|attempt)\.[a-z_]+)"', sources))
    states = {f"search.{state}" for state in SearchState} - {"search.queued"}

    assert [event for event in sorted(written | states) if f'"{event}"' not in script] == []


def test_a_page_follows_the_search_only_while_it_runs(service: Service) -> None:
    search = service.ranked_search()
    running = page(service, f"/searches/{search.id}")
    service.move(search, SearchState.SUCCEEDED)

    assert f"events/stream?after={search.version}" in running
    assert "data-stream" not in page(service, f"/searches/{search.id}")


def test_a_failed_search_says_why(service: Service) -> None:
    search = service.submit()
    service.move(search, SearchState.FAILED, error={"stage": "prepare", "message": "digest differs"})

    text = page(service, f"/searches/{search.id}")

    assert "The search failed at prepare" in text
    assert "digest differs" in text


def test_a_failed_trial_says_why(service: Service) -> None:
    text = page(service, f"/searches/{service.ranked_search().id}/trials/4")

    for part in ("out_of_memory", "no room", "after 3 attempts"):
        assert part in text


def test_one_running_trial_without_results_has_pages(service: Service) -> None:
    search = service.submit()
    service.move(search, SearchState.SEARCHING)
    service.propose(search, 0)
    service.store.start_attempt(search.id, stage="rung", trial=0, rung=0, fence=None)

    assert "1 running" in page(service, f"/searches/{search.id}")
    assert "data-refresh-seconds" in page(service, f"/searches/{search.id}/trials/0")
    assert service.store.get_trial(search.id, 0).state is TrialState.RUNNING


def test_a_browser_gets_a_page_for_what_does_not_exist_and_the_api_never_does(service: Service) -> None:
    html_answer = service.client.get("/searches/srch_0", headers={"Accept": "text/html"})
    api_answer = service.client.get("/v1/searches/srch_0", headers={"Accept": "text/html"})

    assert (html_answer.status_code, html_answer.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert api_answer.headers["content-type"] == "application/problem+json"


def test_the_docs_show_every_operation_with_its_example(service: Service) -> None:
    text = page(service, "/docs")
    document = service.client.get("/openapi.json").json()

    for methods in document["paths"].values():
        for operation in methods.values():
            assert f'id="{operation["operationId"]}"' in text
    assert "&#34;max_fraction&#34;: 0.6" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (999, "999"), (999.6, "1.00K"), (260032, "260K"), (999_600, "1.00M"), (1_600_000, "1.60M"), (8030261248, "8.03B")],
)
def test_counts_are_written_in_three_digits(value: float | None, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.31, "0.3 s"), (59.7, "1 min 00 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min"), (200000, "2 d 07 h")])
def test_durations_are_written_in_two_units(value: float, text: str) -> None:
    assert format_seconds(value) == text


def test_a_clock_that_is_behind_makes_no_negative_age() -> None:
    now = utc_now()

    assert format_age(now.replace(year=now.year + 1), now=now) == "just now"
    assert format_bytes(1500) == "1.5 kB"


def test_confirmed_shapes_stand_beside_the_teacher_on_held_out_documents(service: Service) -> None:
    search = service.ranked_search()

    def result(kl: float) -> dict[str, Any]:
        metric = {"value": kl, "standard_error": 0.01, "higher_is_better": False}
        return {"parameters": 90000, "tokens": 4000, "kl": metric, "loss": metric, "tasks": {"bits": metric}}

    board = service.board(search)
    rows = [dict(row, confirmation={"verified": True, "held_out": result(0.25)}) for row in board["rows"][:1]]
    rows += [
        dict(row, number=90 + index, origin="control", confirmation={"verified": True, "held_out": result(kl)})
        for index, kl in enumerate((0.5, 0.7, 0.9))
        for row in rows
    ]
    service.store.save_board(search.id, {**board, "rows": [*rows, *board["rows"][1:]], "teacher": {"held_out": result(0.0)}}, fence=None)

    page = service.client.get(f"/searches/{search.id}").text

    table = page[page.index("Confirmed on held-out documents") :]
    assert [name in table for name in ("teacher", "0.250", "median of 3 random shapes", "0.700")] == [True] * 4


def test_the_page_of_a_family_shows_one_budget_and_links_the_others(service: Service) -> None:
    search = service.submit(budget={"max_fraction": 0.7}, more_budgets=[{"max_fraction": 0.5}])
    shape, parts = service.propose(search, 0, origin="sampler"), {"winner": None, "pareto": [], "agreement": [], "controls": None}
    one = service.store.add_trial(search.id, number=1, origin="user", shape={**shape, "num_hidden_layers": 1}, choices=None, parameters=9, budget=1, fence=None)
    service.store.save_board(search.id, {"rows": [a_row(0, shape=shape, rank=1, tie_group=1)], **parts, "more_budgets": [{"rows": [], **parts}]}, fence=None)

    first, second = (service.client.get(f"/searches/{search.id}?budget={budget}").text for budget in range(2))

    assert list(rows(first)) == ["trial-0"]
    assert list(rows(second)) == [f"trial-{one.number}"]
    assert f'/searches/{search.id}?budget=1"' in first
    assert service.client.get(f"/searches/{search.id}?budget=2").status_code == 404


def test_the_page_says_where_the_spread_between_seeds_comes_from_and_names_the_repeats(service: Service) -> None:
    search = service.ranked_search()
    board = service.store.whole_board(search.id)
    assert board is not None
    spread = {"value": 0.012, "prior": 0.01, "measured": 0.016, "of_blocks": 0.004, "num_runs": 3}
    repeat = {"number": 1, "seed": 8, "state": "completed", "rung": 1, "kl_by_rung": [3.0, 1.25], "score": 0.5}
    agreement = [{"first": "KL at rung 0", "second": "KL at rung 1", "tau": 0.5, "num_trials": 4}]
    parts = {"agreement": agreement, "seed_spread": 0.012, "seed_error": 0.02}
    texts = []
    for spreads, repeats in (([spread], [repeat]), ([{**spread, "measured": None, "of_blocks": None, "num_runs": 0}], [])):
        service.store.save_board(search.id, {**board, **parts, "seed_spreads": spreads, "repeats": repeats}, fence=None)
        texts.append(plain(page(service, f"/searches/{search.id}")))

    assert "from 1.2% of a KL: 1.0% by the spec, pooled with 3 runs of one shape, which differ by 1.6%, 0.4% of it by their blocks)" in texts[0]
    assert "Trained again with another seed, not ranked: #1 (KL 1.2500 at rung 1)" in texts[0]
    assert "from 1.2% of a KL, as the spec assumes)" in texts[1]
    assert "Trained again" not in texts[1]


def test_the_figures_of_a_budget_are_its_own(service: Service) -> None:
    search = service.submit(budget={"max_fraction": 0.7}, more_budgets=[{"max_fraction": 0.5}])
    shape, parts = service.propose(search, 0, origin="sampler"), {"winner": None, "pareto": [], "agreement": [], "controls": None}
    second = a_row(1, shape=shape, rank=1, tie_group=1) | {"score": 0.4321}
    board = {"rows": [a_row(0, shape=shape, rank=1, tie_group=1)], **parts, "more_budgets": [{"rows": [second], **parts, "leader": 1}]}
    service.store.save_board(search.id, board, fence=None)

    text = plain(page(service, f"/searches/{search.id}?budget=1"))

    assert "0.432" in text[: text.index("Leaderboard")]
    assert "50.0% of the teacher" in text
    assert "70.0% of the teacher" not in text


def test_the_score_is_drawn_over_the_first_objective(service: Service) -> None:
    search = service.submit(objectives=["memory_bytes"], budget={"max_memory_bytes": 300_000})
    shape = service.propose(search, 0, origin="sampler")
    row = a_row(0, shape=shape, rank=1, tie_group=1, costs={"memory_bytes": 250_000.0})
    service.store.save_board(search.id, {"rows": [row], "winner": None, "pareto": [0], "agreement": [], "controls": None}, fence=None)

    values = figure(page(service, f"/searches/{search.id}"), "plot-score")

    assert "memory, bytes 300K" in plain(page(service, f"/searches/{search.id}"))
    assert (values["cost"], values["is_front_drawn"]) == ("memory, bytes", True)
    assert [point["x"] for point in values["points"]] == [250_000.0]  # type: ignore[attr-defined]
    assert (values["teacher"], values["budget"]) == (search.plan["teacher_costs"]["memory_bytes"], 300_000)


def test_the_page_shows_measured_objectives_and_what_became_of_weak_tasks(service: Service) -> None:
    name = "decode_ms:chat"
    search = service.submit(objectives=[name], budget={"max_fraction": 0.7, "latency": [{"name": "chat", "prompt_tokens": 8, "new_tokens": 4}]})
    shape = service.propose(search, 0, origin="sampler")
    task = search.spec["tasks"][0]["name"]
    row = a_row(0, shape=shape, rank=1, tie_group=1, costs={name: 4.2324})
    service.store.save_board(search.id, {"rows": [row], "winner": None, "pareto": [0], "agreement": [], "controls": None, "weak_tasks": [task]}, fence=None)

    page = service.client.get(f"/searches/{search.id}").text

    assert "decode ms:chat ↓" in page
    assert '<td class="number">4.23</td>' in page
    assert "is no part of the score" in page
    assert "kept as the spec insists" not in page


def test_a_search_that_waits_for_its_teacher_says_for_which_search(service: Service) -> None:
    first = service.submit()
    second = service.submit(teacher=first.id)

    text = page(service, f"/searches/{second.id}")

    assert f'<a href="/searches/{first.id}">winner of {first.id}</a>' in text
    assert f"Waits for {first.id} , whose winner will be its teacher." in plain(text)
    assert f"winner of {first.id} waits for it" in rows(page(service, "/"))[f"row-{second.id}"]
    service.move(first, SearchState.CANCELLED)
    service.move(second, SearchState.FAILED, error={"reason": "teacher_unavailable", "message": "none"})
    assert "waits for it" not in page(service, "/")
