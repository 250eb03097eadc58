"""What a submit costs: few statements, as many with a hundred searches there as with none; and a burst of them is kept whole."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from nas.store.quotas import Quotas
from nas.store.records import SearchState
from tests.api.conftest import Service
from tests.api.test_leaderboard import counted

HEADERS = {"Content-Type": "application/json"}


def statements_of_a_submit(service: Service, *, key: str) -> list[str]:
    with counted(service) as statements:
        answer = service.client.post("/v1/searches", content=json.dumps(service.spec()), headers=HEADERS | {"Idempotency-Key": key})
    assert answer.status_code == 201
    return statements


@pytest.mark.parametrize("quotas", [Quotas(), Quotas(max_active_searches=1000, max_tokens_per_day=10**12)])
def test_a_submit_takes_as_many_statements_with_a_hundred_searches_as_with_none(service: Service, quotas: Quotas) -> None:
    service.store.set_quotas("default", quotas)
    statements_of_a_submit(service, key="before")  # the connection's own statements, and the database's of this boot
    first = statements_of_a_submit(service, key="first")
    for _ in range(100):
        service.submit()

    assert len(statements_of_a_submit(service, key="last")) == len(first) <= (13 if quotas == Quotas() else 15)


def test_a_burst_under_a_quota_stores_as_many_as_may_be_and_each_key_once(service: Service) -> None:
    service.store.set_quotas("default", Quotas(max_active_searches=7))
    body = json.dumps(service.spec())

    def submit(number: int) -> tuple[int, str | None]:
        answer = service.client.post("/v1/searches", content=body, headers=HEADERS | {"Idempotency-Key": f"key-{number % 15}"})
        return answer.status_code, answer.json().get("id")

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(submit, range(30)))

    stored = {search.id for search in service.store.list_searches(state=SearchState.QUEUED, limit=100)}
    assert {name for status, name in answers if status == 201} == stored
    assert len(stored) == 7
    assert {status for status, _ in answers} == {201, 429}


def test_the_answer_of_a_new_search_is_the_one_that_is_read_afterwards(service: Service) -> None:
    made = service.client.post("/v1/searches", content=json.dumps(service.spec(label="a", labels={"b": "c"})), headers=HEADERS)
    read = service.client.get(made.headers["Location"])

    assert made.json() == read.json()
    assert made.headers["ETag"] == read.headers["ETag"]
