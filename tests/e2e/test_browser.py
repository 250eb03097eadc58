"""The pages in a real browser, against a real server: what a user sees while a search runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as DriverService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from starlette.testclient import TestClient

from api.app import create_app
from nas.settings import Settings
from nas.spec import dump_spec, parse_spec
from nas.store.records import CorpusRecord, PointRecord, SearchRecord, SearchState, TaskRecord, TeacherRecord, TrialState, utc_now
from nas.store.store import Store
from nas.submission import check_submission
from tests.api.conftest import Service, register_inputs
from tests.served import served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver on the PATH (Debian: apt-get install chromium chromium-driver)"),
]

WAIT_SECONDS = 20
CONFIG = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 512}
SHAPE = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
SPEC = {
    "label": "seen in a browser",
    "teacher": "tiny",
    "corpus": {"parts": [{"name": "stories"}], "sequence_length": 128},
    "tasks": [{"name": "pairs"}],
    "budget": {"max_fraction": 0.6},
    "rungs": {"first_tokens": 1000, "num_trained": 1},
    "distillation": {"batch_size": 2},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    store: Store
    search: SearchRecord
    address: str

    def propose(self, number: int) -> None:
        shape = {**SHAPE, "intermediate_size": 96 + number}
        self.store.add_trial(self.search.id, number=number, origin="sampler", shape=shape, choices=None, parameters=90000 + number, fence=None)

    def finish(self, number: int) -> None:
        """Both rungs of a trial, and the board with it as its only row."""
        metric = {"value": 0.6, "standard_error": 0.03, "higher_is_better": True, "documents": [0.5, 0.7]}
        for rung, tokens in ((0, 0), (1, 1000)):
            attempt = self.store.start_attempt(self.search.id, stage="rung", trial=number, rung=rung, fence=None)
            points = [
                PointRecord(search_id=self.search.id, trial=number, rung=rung, tokens=count, loss=100 / count, learning_rate=1e-3, tokens_per_second=1e4)
                for count in range(100, tokens + 1, 100)
            ]
            self.store.add_points(points)
            result = {
                "rung": rung,
                "tokens": tokens,
                "kl": metric,
                "loss": metric,
                "tasks": {"pairs": metric},
                "parameters": 90000,
                "seconds": {},
                "details": {},
            }
            state = TrialState.WAITING if rung == 0 else TrialState.COMPLETED
            self.store.record_rung(attempt.id, search_id=self.search.id, trial=number, rung=rung, result=result, trial_state=state, fence=None)
        row = {"rank": 1, "tie_group": 1, "number": number, "origin": "sampler", "is_control": False, "shape": {**SHAPE, "intermediate_size": 96 + number}}
        row |= {"parameters": 90000, "share_of_teacher": 0.45, "rung": 1, "tokens": 1000, "score": 0.8125, "standard_error": 0.02, "state": "completed"}
        row |= {"kl": 0.6, "kl_standard_error": 0.03, "loss": 1.6, "tasks": {"pairs": {"value": 0.6, "standard_error": 0.03}}}
        self.store.save_board(self.search.id, {"rows": [row], "winner": number, "pareto": [number], "agreement": [], "controls": None}, fence=None)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path)})
    store = Store.open(settings.database_url, migrate=True)
    now = utc_now()
    store.add_teacher(TeacherRecord(name="tiny", digest="a" * 64, path="/t", config=CONFIG, parameters=200000, added_at=now))
    store.add_corpus(CorpusRecord(name="stories", digest="b" * 64, files=(), num_documents=10, num_bytes=1000, added_at=now))
    card = {"name": "pairs", "output_type": "multiple_choice", "default_metric": "acc", "metrics": [{"name": "acc", "higher_is_better": True}]}
    store.add_task(TaskRecord(name="pairs", digest="c" * 64, folder="/t", card=card, added_at=now))
    spec = parse_spec(json.dumps(SPEC))
    submission = check_submission(spec, store=store)
    search = store.create_search(spec=dump_spec(spec), inputs=submission.inputs, plan=submission.plan, label=spec.label)
    store.change_search(search.id, to=SearchState.SEARCHING, expected=[SearchState.QUEUED], fence=None)
    with served(create_app(store=store, settings=settings)) as address:
        yield Site(store=store, search=search, address=address)
    store.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--disable-gpu", "--window-size=1300,1400", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        # Chromium's sandbox does not run as root, which containers do.
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=DriverService(DRIVER))
    yield driver
    driver.quit()


def wait_for(browser: webdriver.Chrome, selector: str, text: str = "") -> None:
    """Until an element that matches holds the text."""
    WebDriverWait(browser, WAIT_SECONDS).until(
        lambda driver: driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].some((element) => element.textContent.includes(arguments[1]))", selector, text
        ),
        message=f"{selector} with {text!r}",
    )


def test_a_user_follows_a_search_from_the_list_to_a_trials_curve(site: Site, browser: webdriver.Chrome) -> None:
    browser.get(site.address)
    browser.find_element(By.LINK_TEXT, "seen in a browser").click()
    wait_for(browser, "#live-text", "live")
    wait_for(browser, "#leaderboard", "No shape has been proposed yet")
    wait_for(browser, "#plot-score svg", "No shape has reached the last rung yet")
    browser.execute_script("window.notReloaded = true; document.querySelector('#spec').open = true; scrollTo(0, 200)")

    site.propose(7)
    wait_for(browser, "#trial-7 .state", "waiting")
    site.finish(7)
    wait_for(browser, "#trial-7 .score", "0.812")
    wait_for(browser, "#trial-7 .origin-winner", "leads")
    wait_for(browser, "#plot-score svg .scatterlayer .point")
    wait_for(browser, "#plot-score svg", "budget")

    assert browser.execute_script("return window.notReloaded") is True
    assert browser.execute_script("return document.querySelector('#spec').open") is True
    assert browser.execute_script("return scrollY") == 200

    browser.find_element(By.CSS_SELECTOR, "#trial-7 a").click()
    wait_for(browser, "#plot-curve svg .scatterlayer .js-line")
    wait_for(browser, "#rung-results tbody tr", "1.00K")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_page_stops_following_when_the_search_ends(site: Site, browser: webdriver.Chrome) -> None:
    browser.get(f"{site.address}/searches/{site.search.id}")
    wait_for(browser, "#live-text", "live")

    site.store.change_search(site.search.id, to=SearchState.SUCCEEDED, expected=[SearchState.SEARCHING], fence=None)

    wait_for(browser, "#head .state", "succeeded")
    wait_for(browser, "#live[hidden]")


def test_a_user_logs_in_follows_a_search_and_logs_out(site: Site, browser: webdriver.Chrome) -> None:
    _, secret = site.store.create_key(project="default", name="me", scopes=["read", "submit"])
    page = f"{site.address}/searches/{site.search.id}"
    browser.get(page)
    wait_for(browser, "h1", "Log in")
    browser.find_element(By.NAME, "key").send_keys("nas_wrong", Keys.ENTER)
    wait_for(browser, ".banner", "not one of this service")
    browser.find_element(By.NAME, "key").send_keys(secret, Keys.ENTER)

    wait_for(browser, "#live-text", "live")
    assert browser.current_url == page
    assert browser.execute_script("return document.cookie") == ""
    site.propose(7)
    wait_for(browser, "#trial-7 .state", "waiting")
    browser.find_element(By.CSS_SELECTOR, "[data-post$='cancel']").click()
    browser.switch_to.alert.accept()
    wait_for(browser, "#head .state", "cancelling")

    browser.find_element(By.CSS_SELECTOR, ".who button").click()
    wait_for(browser, "h1", "Log in")
    browser.get(page)
    wait_for(browser, "h1", "Log in")


def test_a_search_is_cancelled_with_its_button(site: Site, browser: webdriver.Chrome) -> None:
    browser.get(f"{site.address}/searches/{site.search.id}")
    wait_for(browser, "#live-text", "live")

    browser.find_element(By.CSS_SELECTOR, "[data-post$='cancel']").click()
    browser.switch_to.alert.accept()

    wait_for(browser, "#head .state", "cancelling")
    assert site.store.get_search(site.search.id).state is SearchState.CANCELLING


def test_a_bundle_that_was_asked_for_appears_on_the_page_when_it_is_packed(tmp_path: Path, browser: webdriver.Chrome) -> None:
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path / "data")})
    settings.data_folder.mkdir()
    store = Store.open(settings.database_url, migrate=True)
    register_inputs(store)
    app = create_app(store=store, settings=settings)
    service = Service(store=store, client=TestClient(app), settings=settings)
    search = service.succeed(service.confirmed_search())
    service.verify_trial(search, 0)
    with served(app) as address:
        browser.get(f"{address}/searches/{search.id}/trials/0")
        browser.find_element(By.CSS_SELECTOR, "[data-post$='bundle']").click()
        wait_for(browser, "#head .actions", "Packing the bundle")

        service.pack(search, 0)

        wait_for(browser, "#head .actions", "Download the bundle")
        wait_for(browser, "#live[hidden]")
    store.close()
