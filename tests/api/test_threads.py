"""Submits wait for each other, and for nothing else to wait for them."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from api.threads import NUM_SUBMITTING, NUM_THREADS
from nas.store.records import SearchRecord
from tests.api.conftest import Service
from tests.served import served
from tests.waiting import wait_until


def test_reads_are_answered_while_more_submits_wait_than_there_are_threads(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, most_at_once = [], threading.Event(), 0
    create = service.store.create_search

    def wait_and_create(**arguments: Any) -> SearchRecord:
        begun.append(1)
        assert go_on.wait(60)
        return create(**arguments)

    monkeypatch.setattr(service.store, "create_search", wait_and_create)
    body = json.dumps(service.spec())
    with served(service.client.app) as address, httpx2.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor(NUM_THREADS + 4) as pool:
        submits = [pool.submit(client.post, "/v1/searches", content=body, headers={"Content-Type": "application/json"}) for _ in range(NUM_THREADS + 4)]
        wait_until(lambda: begun, what="a submit is stored")
        try:
            listed = client.get("/v1/searches", timeout=20)
            most_at_once = len(begun)
        finally:
            go_on.set()
        answers = [submit.result().status_code for submit in submits]

    assert listed.status_code == 200
    assert 1 <= most_at_once <= NUM_SUBMITTING
    assert answers == [201] * len(submits)
