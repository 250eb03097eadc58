"""Bundles of trials that are no winners over HTTP: asked for, waited for, downloaded; and who may not have them."""

from __future__ import annotations

import hashlib
import shutil
from typing import Any

import pytest

from nas.search.layout import STUDENT, trial_folder
from nas.store.records import SearchRecord, SearchState
from tests.api.conftest import Service

CONTENT = b"a front member" * 1000


@pytest.fixture
def search(service: Service) -> SearchRecord:
    """Won by trial 1; trial 0 was verified as well."""
    search = service.succeed(service.confirmed_search())
    service.verify_trial(search, 0)
    return search


def url_of(search: SearchRecord, number: int) -> str:
    return f"/v1/searches/{search.id}/trials/{number}/bundle"


def bundle_of(service: Service, search: SearchRecord, number: int) -> Any:
    return service.client.get(f"/v1/searches/{search.id}/trials/{number}").json()["bundle"]


def test_a_verified_trial_is_packed_once_it_is_asked_for_and_then_downloaded(service: Service, search: SearchRecord) -> None:
    get, post, url = service.client.get, service.client.post, url_of(search, 0)
    refused = get(url)
    assert (refused.status_code, refused.headers["content-type"]) == (409, "application/problem+json")
    assert "got one that nobody asked for; POST to this address asks for it" in refused.json()["detail"]
    assert bundle_of(service, search, 0) is None

    asked = post(url)

    assert (asked.status_code, asked.json()["state"], asked.json()["bundle_url"]) == (202, "waiting", None)
    assert get(url).json()["detail"].endswith("got one that is being packed")
    assert post(url).json() == asked.json() == bundle_of(service, search, 0)
    service.pack(search, 0, content=CONTENT)
    packed, digest = bundle_of(service, search, 0), hashlib.sha256(CONTENT).hexdigest()
    assert (packed["state"], packed["sha256"], packed["bytes"], packed["bundle_url"]) == ("packed", digest, len(CONTENT), url)
    whole = get(url)
    assert (whole.content, whole.headers["etag"]) == (CONTENT, f'"{digest}"')
    assert whole.headers["content-disposition"] == f'attachment; filename="{search.id}-trial-0.tar"'
    part = get(url, headers={"Range": "bytes=2-6", "If-Range": whole.headers["etag"]})
    assert (part.status_code, part.content) == (206, b"front")
    assert get(url, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
    assert get(f"/v1/artifacts/{digest}").content == CONTENT
    assert post(url).json()["state"] == "packed"


def test_the_same_key_asks_once(service: Service, search: SearchRecord) -> None:
    first, again = (service.client.post(url_of(search, 0), headers={"Idempotency-Key": "k"}) for _ in range(2))

    assert (first.json(), again.headers["idempotency-replayed"]) == (again.json(), "true")
    reused = service.client.post(url_of(search, 1), headers={"Idempotency-Key": "k"})
    assert (reused.status_code, reused.json()["type"]) == (422, "/problems/idempotency-key-reused")


def test_the_winner_s_is_there_unasked(service: Service) -> None:
    (service.settings.data_folder / "w.tar").write_bytes(CONTENT)
    search, digest = service.confirmed_search(), hashlib.sha256(CONTENT).hexdigest()
    service.store.save_winner(search.id, {"trial": 1, "bundle": "w.tar", "bundle_sha256": digest}, fence=None)
    service.move(search, SearchState.SUCCEEDED)

    assert service.client.get(url_of(search, 1)).content == CONTENT
    assert service.client.post(url_of(search, 1)).json()["state"] == "packed"
    assert service.store.waiting_bundles(limit=1) == []


def test_why_there_is_none_is_told(service: Service, search: SearchRecord) -> None:
    post, going_on = service.client.post, service.ranked_search()
    shutil.rmtree(service.settings.prepared_folder)
    answers = {
        "expected one that the confirm step verified, got one that was not confirmed": post(url_of(search, 3)),
        "expected what its search prepared on the disk, got a folder that is gone": post(url_of(search, 0)),
        "expected one that has ended, got state searching": post(url_of(going_on, 0)),
    }
    shutil.rmtree(trial_folder(service.settings.searches_folder / search.id, number=0) / STUDENT)
    answers["got one that was not kept (`retention.students`)"] = post(url_of(search, 0))

    for expected, answer in answers.items():
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/conflict")
        assert expected in answer.json()["detail"]
    assert post(url_of(search, 77)).status_code == service.client.get(url_of(search, 77)).status_code == 404
    assert service.store.waiting_bundles(limit=1) == []


def test_one_that_failed_says_why_and_is_tried_again(service: Service, search: SearchRecord) -> None:
    url = url_of(search, 0)
    service.client.post(url)
    error = {"reason": "disk_full", "message": "no room <b>", "log": ""}
    service.store.fail_bundle(search.id, 0, error=error, max_failures=1, device_seconds=0.0, fence=None)

    assert bundle_of(service, search, 0)["error"] == error
    assert "could not be packed (disk_full: no room <b>); POST to this address tries again" in service.client.get(url).json()["detail"]
    page = service.client.get(f"/searches/{search.id}/trials/0").text
    assert "The bundle could not be packed: disk_full." in page
    assert "no room &lt;b&gt;" in page
    assert service.client.post(url).json()["state"] == "waiting"


def test_the_pages_offer_it_and_show_that_it_is_packed(service: Service, search: SearchRecord) -> None:
    page, url = f"/searches/{search.id}/trials/0", url_of(search, 0)

    assert f'data-post="{url}"' in service.client.get(page).text
    assert f'<a href="{page}"' in service.client.get(f"/searches/{search.id}").text
    service.client.post(url)
    packing = service.client.get(page).text
    assert ("Packing the bundle" in packing, 'data-refresh-seconds="2"' in packing) == (True, True)
    service.pack(search, 0)
    assert f'href="{url}">Download the bundle' in service.client.get(page).text
    assert f'data-post="{url_of(search, 3)}"' not in service.client.get(f"/searches/{search.id}/trials/3").text


def test_a_bundle_goes_with_its_search(service: Service, search: SearchRecord) -> None:
    service.client.post(url_of(search, 0))
    service.pack(search, 0, content=CONTENT)

    assert service.client.delete(f"/v1/searches/{search.id}").status_code == 204
    assert service.client.get(url_of(search, 0)).status_code == 404
    assert service.client.get(f"/v1/artifacts/{hashlib.sha256(CONTENT).hexdigest()}").status_code == 404
