"""The OpenAPI document is a promise: `openapi.json` beside this file is what was promised.

After a wanted change: NAS_WRITE_OPENAPI=1 python -m pytest tests/api/test_openapi.py, and review the difference.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from api.openapi import SUBMIT_EXAMPLES
from nas.spec import parse_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.api.conftest import Service

SNAPSHOT = Path(__file__).with_name("openapi.json")


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_the_document_is_as_promised(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    if os.environ.get("NAS_WRITE_OPENAPI") == "1":
        SNAPSHOT.write_text(json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

    assert document == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_the_document_is_openapi_3_1_with_named_tagged_operations(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    names = [operation["operationId"] for operation in operations]

    assert document["openapi"].startswith("3.1")
    assert len(set(names)) == len(names)
    assert {tag for operation in operations for tag in operation["tags"]} == {tag["name"] for tag in document["tags"]}
    assert all(operation["summary"] and operation["description"] for operation in operations)


def test_every_reference_of_the_document_leads_somewhere(service: Service) -> None:
    document = service.client.get("/openapi.json").json()

    assert {reference.rsplit("/", 1)[-1] for reference in references(document)} <= set(document["components"]["schemas"])


@pytest.mark.parametrize("name", sorted(SUBMIT_EXAMPLES))
def test_every_example_of_a_submit_is_a_spec(name: str) -> None:
    parse_spec(json.dumps(SUBMIT_EXAMPLES[name]["value"]))
