"""The whole OpenAPI document against the application, by schemathesis: nothing breaks, and every answer is one that the document promises.

It runs over searches in every stage; what a schema cannot say (ids that exist) is given. All of schemathesis' checks are on.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from schemathesis.engine import from_schema
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished
from schemathesis.openapi.checks import RejectedPositiveData

from nas.store.records import SearchState

if TYPE_CHECKING:
    from schemathesis import Case, HookContext, Response
    from schemathesis.core.failures import Failure
    from schemathesis.schemas import BaseSchema

    from tests.api.conftest import Service

ACTIONS = ("cancel_search", "pause_search", "resume_search", "update_search", "delete_search")
BUNDLED = {"request_trial_bundle": 0, "download_trial_bundle": 1}
"""Trials of the search that has succeeded: one that was verified, and the winner."""
REFUSED = ["400", "401", "403", "404", "405", "406", "409", "412", "415", "422", "428", "429"]


def configuration(*, searches: dict[str, str], distillations: dict[str, str], digest: str, is_short: bool) -> dict[str, Any]:
    """Of a run: deterministic; each operation on a search of its own, or on the one that has succeeded."""
    operations: list[dict[str, Any]] = [
        {"include-operation-id": name, "parameters": {"path.search_id": search_id}} for name, search_id in searches.items() if name != "done"
    ]
    operations += [
        {"include-operation-id": name, "parameters": {"path.distillation_id": distillation_id}}
        for name, distillation_id in distillations.items()
        if name != "done"
    ]
    operations += [{"include-operation-id": name, "parameters": {"path.number": number}} for name, number in BUNDLED.items()]
    # What these refuse, a schema cannot say: names that are not registered, a budget that nothing fits.
    semantic = {"positive_data_acceptance": {"expected-statuses": ["2xx", "422", "429"]}}
    # Every field of a spec at its bounds is thousands of requests: not in the short run.
    coverage = {"coverage": {"enabled": not is_short}}
    operations += [
        {"include-operation-id": name, "checks": semantic, "phases": coverage} for name in ("submit_search", "preview_search", "submit_distillation")
    ]
    return {
        "seed": 1,
        "headers": {"Host": "127.0.0.1"},
        "generation": {"max-examples": 5 if is_short else 100, "deterministic": True, "database": "none"},
        "checks": {"negative_data_rejection": {"expected-statuses": REFUSED}, "missing_required_header": {"expected-statuses": ["428"]}},
        "parameters": {
            "path.search_id": searches["done"],
            "query.with": searches["retry_trial"],
            "path.sha256": digest,
            "path.distillation_id": distillations["done"],
            "header.If-Match": "*",
        },
        "operations": operations,
    }


def is_fault(context: HookContext, failure: Failure, case: Case, response: Response) -> bool:
    """Not what a schema takes for right and cannot know better: a cursor of another list or order, a key that came with another request, and 5.0,
    which JSON Schema counts as an integer."""
    if not isinstance(failure, RejectedPositiveData) or response.status_code != 422:
        return True
    problem = response.json()
    if problem["type"] == "/problems/idempotency-key-reused":
        return False
    errors = problem["errors"]
    return not all(error["field"] == "after" or (error["expected"] == "a valid integer" and error["got"].endswith(".0")) for error in errors)


@pytest.fixture
def configured(service: Service) -> Any:
    """Makes the document over searches that run and one that has succeeded."""
    content = b"a bundle" * 100
    digest = hashlib.sha256(content).hexdigest()
    (service.settings.data_folder / "w.tar").write_bytes(content)
    done = service.confirmed_search()
    service.store.save_winner(done.id, {"bundle": "w.tar", "bundle_sha256": digest, "trial": 1, "config": {"hidden_size": 48}}, fence=None)
    service.move(done, SearchState.SUCCEEDED)
    service.verify_trial(done, BUNDLED["request_trial_bundle"])
    searches = {"done": done.id, "retry_trial": service.ranked_search().id, **{name: service.submit().id for name in ACTIONS}}
    service.store.request_cancel(searches["delete_search"])
    distillations = {name: service.distil(done).id for name in ("cancel_distillation", "delete_distillation")}
    distillations["done"] = service.finish_distillation(service.distil(done)).id
    service.store.request_cancel(distillations["delete_distillation"])

    def make(is_short: bool) -> BaseSchema:
        config = schemathesis.Config.from_dict(configuration(searches=searches, distillations=distillations, digest=digest, is_short=is_short))
        schema = schemathesis.openapi.from_asgi("/openapi.json", service.client.app, config=config, headers={"Host": "127.0.0.1"})
        schema.hook("filter_failure")(is_fault)
        return schema

    return make


def run(schema: BaseSchema) -> tuple[list[str], set[str], int]:
    """What schemathesis' own engine found in all its phases, the operations that it tried, and how many requests it sent."""
    failures, tried, num_cases = [], set(), 0
    for event in from_schema(schema).execute():
        if isinstance(event, ScenarioFinished):
            num_cases += len(event.recorder.cases)
            for case_id, checks in event.recorder.checks.items():
                case = event.recorder.cases[case_id].value
                tried.add(case.operation.definition.raw["operationId"])
                for check in checks:
                    if check.failure_info is not None:
                        failures.append(f"{event.phase.value}: {event.label}: {check.failure_info.failure}\n{case.as_curl_command()[:1000]}")
        elif isinstance(event, NonFatalError | FatalError):
            failures.append(str(getattr(event, "info", None) or event.exception))
    return failures, tried, num_cases


@pytest.mark.parametrize("is_short", [True, pytest.param(False, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_the_service_keeps_what_its_document_promises(configured: Any, service: Service, is_short: bool) -> None:
    failures, tried, num_cases = run(configured(is_short))

    assert failures == []
    assert tried == {operation["operationId"] for methods in service.client.get("/openapi.json").json()["paths"].values() for operation in methods.values()}
    assert num_cases > 500
