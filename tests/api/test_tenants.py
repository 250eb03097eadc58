"""Projects do not see each other: every route of the application is asked by another project's key, also those that are yet to come."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2
import pytest
from fastapi.routing import iter_route_contexts
from starlette.routing import Mount
from starlette.testclient import TestClient

from api.auth import is_public
from nas.store.records import AttemptState, SearchRecord, SearchState
from tests.api.conftest import Service

MARK = "mark-of-ours"
"""In the label, the labels, the failure and the bundle of our search: nobody else may ever read it."""

LEAST_ROUTES = 27
NONE = "srch_0"
"""An id of nothing; dist_0 is another."""


OF_A_PROJECT = re.compile(r"{(search_id|distillation_id)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenants:
    service: Service
    ours: TestClient
    theirs: TestClient
    search: SearchRecord
    """Of ours, finished, with all that a search can have."""
    distillation: SearchRecord
    """Of ours, finished."""


@pytest.fixture
def tenants(service: Service) -> Tenants:
    store = service.store
    store.create_project("theirs")
    search = service.confirmed_search()
    attempt = store.start_attempt(search.id, stage="bundle", trial=None, rung=None, fence=None)
    bundle = service.settings.data_folder / "ours.tar"
    bundle.write_bytes(MARK.encode())
    winner = {"trial": 1, "bundle": "ours.tar", "bundle_sha256": hashlib.sha256(bundle.read_bytes()).hexdigest(), "mark": MARK}
    store.save_winner(search.id, winner, fence=None)
    store.update_search(search.id, version=None, labels={"team": MARK})
    store.add_event(search.id, "task.weak", {"task": MARK})
    store.finish_attempt(attempt.id, state=AttemptState.FAILED, reason=MARK, fence=None, log=MARK)
    service.move(search, SearchState.FAILED, error={"stage": "bundle", "message": MARK})
    distilled = service.confirmed_search()
    distillation = service.finish_distillation(service.distil(service.succeed(distilled), label=MARK), content=f"a model {MARK}".encode())
    clients = {}
    for project in ("default", "theirs"):
        secret = store.create_key(project=project, name="", scopes=["read", "submit", "admin"])[1]
        headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
        clients[project] = TestClient(service.client.app, base_url="http://127.0.0.1", headers=headers, raise_server_exceptions=False, follow_redirects=False)
    return Tenants(service=service, ours=clients["default"], theirs=clients["theirs"], search=store.get_search(search.id), distillation=distillation)


def routes(service: Service) -> Iterator[tuple[str, str]]:
    """Method and path of every route, those of included routers and of plain Starlette among them."""
    for context in iter_route_contexts(service.client.app.routes):  # type: ignore[attr-defined]
        if isinstance(context.original_route, Mount):
            assert is_public(f"{context.path}/"), f"{context.path} is mounted: is it everybody's?"
            continue
        for method in sorted(context.methods or {"GET"}):
            yield method, str(context.path)


def url_of(path: str, tenants: Tenants, *, search_id: str) -> str:
    """The path with its parameters filled in, of the search or of what hangs from it."""
    attempts = tenants.service.store.list_attempts(tenants.search.id)
    named = search_id if search_id == NONE else tenants.distillation.id
    values = {
        "search_id": search_id,
        "distillation_id": named.replace("srch", "dist"),
        "number": "1",
        "code": "not-found",
        "attempt_id": attempts[-1].id,
        "attempt": attempts[-1].id,
    }
    values["sha256"] = values["digest"] = str((tenants.search.winner or {})["bundle_sha256"])
    unknown = set(re.findall(r"{(\w+)", path)) - set(values)
    assert not unknown, f"{path}: this test has to learn what {unknown} is, to ask for another project's"
    return re.sub(r"{(\w+)(:\w+)?}", lambda match: values[match[1]], path)


def ask(client: TestClient, method: str, url: str) -> httpx2.Response:
    query = {"with": url.split("/searches/")[1].split("/")[0]} if url.endswith("/compare") else {}
    return client.request(method, url, params=query, headers={"If-Match": "*", "Accept": "*/*"})


def without_names(answer: httpx2.Response, *ids: str) -> tuple[int, object]:
    """What an answer says, whatever it was asked of."""
    text = re.sub("|".join(ids), "ID", answer.text)
    return answer.status_code, re.sub(r"req_[0-9a-f]{32}", "REQ", text)


def test_nothing_of_a_search_can_be_had_with_another_projects_key(tenants: Tenants) -> None:
    before = tenants.service.store.get_search(tenants.search.id)
    asked = 0
    for method, path in routes(tenants.service):
        if not OF_A_PROJECT.search(path):
            continue
        theirs = ask(tenants.theirs, method, url_of(path, tenants, search_id=tenants.search.id))
        of_none = ask(tenants.theirs, method, url_of(path, tenants, search_id=NONE))
        asked += 1

        assert MARK not in theirs.text, f"{method} {path} shows another project's search"
        assert without_names(theirs, tenants.search.id, tenants.distillation.id) == without_names(of_none, NONE, "dist_0"), (
            f"{method} {path} tells that another project's search exists"
        )
        if method in ("GET", "HEAD"):
            assert theirs.status_code == 404, f"{method} {path}: expected 404 for another project's search"
    assert asked >= LEAST_ROUTES
    assert tenants.service.store.get_search(tenants.search.id) == before


def test_no_other_route_shows_anything_of_another_project(tenants: Tenants) -> None:
    for method, path in routes(tenants.service):
        if OF_A_PROJECT.search(path) or method not in ("GET", "HEAD"):
            continue
        theirs = ask(tenants.theirs, method, url_of(path, tenants, search_id=tenants.search.id))

        assert MARK not in theirs.text, f"{method} {path} shows another project's search"
        assert tenants.search.id not in theirs.text, f"{method} {path} names another project's search"
        assert tenants.distillation.id not in theirs.text, f"{method} {path} names another project's distillation"


def test_the_same_questions_of_its_own_project_are_answered(tenants: Tenants) -> None:
    """Else the tests above would prove nothing: the addresses are right."""
    for method, path in routes(tenants.service):
        if method == "GET" and OF_A_PROJECT.search(path):
            answer = ask(tenants.ours, method, url_of(path, tenants, search_id=tenants.search.id))
            assert answer.status_code == 200, f"{method} {path}: {answer.text[:300]}"
    assert MARK in tenants.ours.get("/v1/searches").text
    assert tenants.search.id in tenants.ours.get("/").text
    assert tenants.distillation.id in tenants.ours.get("/v1/distillations").text
    assert tenants.ours.get(f"/v1/artifacts/{(tenants.distillation.winner or {})['sha256']}").status_code == 200


def test_without_a_key_no_route_but_the_public_ones_answers(tenants: Tenants) -> None:
    for method, path in routes(tenants.service):
        url = url_of(path, tenants, search_id=tenants.search.id)
        answer = ask(tenants.service.client, method, url)
        if not is_public(url):
            assert answer.status_code == 401, f"{method} {path}: expected 401 without a key"


@pytest.mark.parametrize("base", ["/v1", ""])
def test_a_search_cannot_be_compared_with_another_projects(tenants: Tenants, base: str) -> None:
    own = tenants.theirs.post("/v1/searches", content=json.dumps(tenants.service.spec())).json()["id"]
    answers = [tenants.theirs.get(f"{base}/searches/{own}/compare", params={"with": other}) for other in (tenants.search.id, "srch_0")]

    assert [answer.status_code for answer in answers] == [404, 404]
    assert without_names(answers[0], tenants.search.id) == without_names(answers[1], "srch_0")


@pytest.mark.parametrize("path", ["/v1/searches", "/v1/searches:preview"])
@pytest.mark.parametrize("name", ["warm_start_from", "teacher"])
def test_a_search_cannot_start_from_another_projects(tenants: Tenants, path: str, name: str) -> None:
    others = (tenants.search.id, "srch_0")
    bodies = [json.dumps(tenants.service.spec(**{name: [other] if name == "warm_start_from" else other})) for other in others]
    answers = [tenants.theirs.post(path, content=body) for body in bodies]

    assert [answer.status_code for answer in answers] == [422, 422]
    assert without_names(answers[0], tenants.search.id) == without_names(answers[1], "srch_0")


def test_the_same_idempotency_key_of_two_projects_makes_two_searches(tenants: Tenants) -> None:
    body, headers = json.dumps(tenants.service.spec()), {"Idempotency-Key": "k"}
    made = [client.post("/v1/searches", content=body, headers=headers).json()["id"] for client in (tenants.ours, tenants.theirs) for _ in range(2)]

    assert made[0] == made[1] != made[2] == made[3]


def test_pages_of_a_list_never_reach_into_another_project(tenants: Tenants) -> None:
    own = [tenants.theirs.post("/v1/searches", content=json.dumps(tenants.service.spec())).json()["id"] for _ in range(3)]
    seen, after = [], None
    while True:
        page = tenants.theirs.get("/v1/searches", params={"limit": 1, **({"after": after} if after else {})}).json()
        seen += [search["id"] for search in page["data"]]
        after = page["next_cursor"]
        if not page["has_more"]:
            break

    assert seen == own[::-1]


def test_no_proxy_may_keep_an_answer_for_another_tenant(tenants: Tenants) -> None:
    for method, path in routes(tenants.service):
        url = url_of(path, tenants, search_id=tenants.search.id)
        if method == "GET" and not is_public(url):
            kept = ask(tenants.ours, method, url).headers["cache-control"]
            assert kept.startswith(("private", "no-store")), f"{path} may be kept by a proxy: {kept}"


def test_another_projects_student_cannot_be_distilled_nor_its_model_be_had_by_its_digest(tenants: Tenants) -> None:
    search_id = tenants.distillation.distils
    assert search_id is not None
    answers = [tenants.theirs.post("/v1/distillations", content=json.dumps({"search_id": other})) for other in (search_id, NONE)]

    assert [answer.status_code for answer in answers] == [422, 422]
    assert without_names(answers[0], search_id) == without_names(answers[1], NONE)
    assert tenants.theirs.get("/v1/distillations", params={"search": search_id}).json()["data"] == []
    assert tenants.theirs.get(f"/v1/artifacts/{(tenants.distillation.winner or {})['sha256']}").status_code == 404
