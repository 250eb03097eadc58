"""Text of users and of what runs for them reaches other users' browsers: it must arrive as text on every page, whatever it is."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nas.store.records import AttemptState, SearchState, TrialState
from tests.api.conftest import Service

HOSTILE = """'"><script src=//evil.example></script><img src=x onerror=alert(1)>{{ 7 * 7 }}</textarea></title>--><svg/onload=alert(2)> javascript:alert(3)"""


class Seen(HTMLParser):
    """The elements that a browser would make: of ours only."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str | None] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.inline_script = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        values = dict(attrs)
        self.addresses += [str(values[name]) for name in ("href", "src", "action", "data-post", "data-stream") if values.get(name)]
        if tag == "script":
            self.scripts.append(values.get("src"))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and data.strip():
            self.inline_script += data


@pytest.fixture
def pages(service: Service) -> list[str]:
    """Every kind of page, of a search in which every text is hostile."""
    store = service.store
    body = service.spec(label=HOSTILE, labels={"team": HOSTILE[:60]})
    answer = service.client.post("/v1/searches", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 201, answer.text
    search = store.get_search(answer.json()["id"])
    other = service.submit(label=HOSTILE)
    service.move(search, SearchState.SEARCHING)
    service.propose(search, 0)
    service.propose(search, 1)
    failure = {"stage": HOSTILE, "reason": HOSTILE, "message": HOSTILE, "attempts": 1, "log": HOSTILE}
    store.change_trial(search.id, 0, to=TrialState.FAILED, fence=None, failure=failure)
    attempt = store.start_attempt(search.id, stage="rung", trial=1, rung=0, fence=None)
    store.finish_attempt(attempt.id, state=AttemptState.FAILED, reason=HOSTILE, fence=None, log=HOSTILE)
    store.add_event(search.id, "task.weak", {HOSTILE: HOSTILE})
    service.move(search, SearchState.FAILED, error={"stage": HOSTILE, "message": HOSTILE, HOSTILE: {"a": HOSTILE}})
    paths = ["/", f"/searches/{search.id}", f"/searches/{search.id}/trials/0", f"/searches/{search.id}/trials/1"]
    paths += [f"/searches/{search.id}/compare?with={other.id}", "/login", "/docs"]
    texts = [service.client.get(path, headers={"Accept": "text/html"}) for path in paths]
    assert {text.status_code for text in texts} == {200}
    problem = service.client.get("/nothing/" + HOSTILE, headers={"Accept": "text/html"})
    login = service.client.get("/login", params={"next": HOSTILE})
    return [text.text for text in [*texts, problem, login]]


def test_no_text_becomes_an_element_a_handler_or_an_address(pages: list[str]) -> None:
    for page in pages:
        seen = Seen()
        seen.feed(page)

        assert all(script and script.startswith("/static/") for script in seen.scripts), seen.scripts
        assert seen.inline_script == ""
        assert "onerror" not in seen.attributes
        assert not {name for name in seen.attributes if name.startswith("on") or name == "style"}
        assert "evil.example" not in " ".join(seen.addresses)
        assert not [address for address in seen.addresses if address.lower().lstrip().startswith(("javascript:", "data:", "//"))]
    assert any("{{ 7 * 7 }}" in page for page in pages)
    assert sum("&lt;script src=//evil.example&gt;" in page for page in pages) >= 5  # it was shown, as text


def test_scripts_write_text_and_never_markup_of_their_own() -> None:
    for script in (Path(__file__).parents[2] / "api" / "static").glob("*.js"):
        source = script.read_text(encoding="utf-8")
        for sink in (".innerHTML =", ".outerHTML =", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert sink not in source, f"{script.name} uses {sink}"


def test_a_download_is_never_a_page(service: Service) -> None:
    search = service.ranked_search()
    for path in ("leaderboard?format=csv", "leaderboard", "events", "trials/0"):
        answer = service.client.get(f"/v1/searches/{search.id}/{path}", headers={"Accept": "text/html"})

        assert "html" not in answer.headers["content-type"]
        assert answer.headers["x-content-type-options"] == "nosniff"
