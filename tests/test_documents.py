"""What the documents promise names a test that holds it; the test must be there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_REFERENCE = re.compile(r"`((?:tests/[\w/]+\.py)?(?:::\w+)*)`")


def references(document: Path) -> list[str]:
    """Every `tests/...py::name` of a document; `::name` alone belongs to the file named before it."""
    found, file = [], ""
    for reference in _REFERENCE.findall(document.read_text(encoding="utf-8")):
        if reference:
            file = reference.split("::")[0] or file
            found.append(file + reference[len(reference.split("::")[0]) :])
    return found


def exists(reference: str) -> bool:
    path, *names = reference.split("::")
    if not (ROOT / path).is_file():
        return False
    scope: list[ast.stmt] = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for name in names:
        found = [node for node in scope if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
        if not found:
            return False
        scope = found[0].body
    return True


@pytest.mark.parametrize("document", ["SECURITY.md", "deploy/README.md"])
def test_every_test_that_a_document_names_exists(document: str) -> None:
    missing = [reference for reference in references(ROOT / document) if not exists(reference)]

    assert missing == []


def test_the_threat_model_names_its_tests() -> None:
    assert len(references(ROOT / "SECURITY.md")) >= 20
