from __future__ import annotations

from nas.store.records import AttemptState
from tests.api.conftest import Service


def test_the_log_of_an_attempt_is_text_and_of_its_search_alone(service: Service) -> None:
    search, other = service.submit(), service.submit()
    attempt = service.store.start_attempt(search.id, stage="prepare", trial=None, rung=None, fence=None)
    path = f"/v1/searches/{search.id}/attempts/{attempt.id}/log"

    assert service.client.get(path).status_code == 404
    service.store.finish_attempt(attempt.id, state=AttemptState.FAILED, reason="error: no", log="<b>began</b>\nended\n", fence=None)
    answer = service.client.get(path)

    assert (answer.status_code, answer.text) == (200, "<b>began</b>\nended\n")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert service.client.get(f"/v1/searches/{other.id}/attempts/{attempt.id}/log").status_code == 404


def test_attempts_are_listed_in_pages_the_latest_first(service: Service) -> None:
    search = service.ranked_search()
    of_trial = [attempt.id for attempt in service.store.list_attempts(search.id, trial=1)]
    every = [attempt.id for attempt in service.store.list_attempts(search.id)]

    found, cursor = [], None
    while True:
        page = service.client.get(f"/v1/searches/{search.id}/attempts", params={"limit": 4, **({"after": cursor} if cursor else {})}).json()
        found += [attempt["id"] for attempt in page["data"]]
        if not (cursor := page["next_cursor"]):
            break

    assert found == every[::-1]
    page = service.client.get(f"/v1/searches/{search.id}/attempts?trial=1").json()
    assert [attempt["id"] for attempt in page["data"]] == of_trial[::-1]
    assert {attempt["trial"] for attempt in page["data"]} == {1}
    assert service.client.get(f"/v1/searches/{search.id}/attempts?after=nonsense").status_code == 422


def test_a_failed_trials_page_shows_the_last_lines_and_leads_to_the_log(service: Service) -> None:
    search = service.ranked_search()
    service.propose(search, 9)
    attempt = service.store.start_attempt(search.id, stage="rung", trial=9, rung=0, fence=None)
    service.store.finish_attempt(attempt.id, state=AttemptState.FAILED, reason="error: no", log="whole", fence=None)
    failure = {"stage": "rung 0", "reason": "error", "message": "no", "attempts": 1, "log": "<script>last</script> line"}
    service.store.change_trial(search.id, 9, to="failed", failure=failure, fence=None)  # type: ignore[arg-type]

    page = service.client.get(f"/searches/{search.id}/trials/9", headers={"Accept": "text/html"}).text

    assert "&lt;script&gt;last&lt;/script&gt; line" in page
    assert f'href="/v1/searches/{search.id}/attempts/{attempt.id}/log"' in page
