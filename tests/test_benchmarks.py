"""What `make bench` is made of, small."""

from __future__ import annotations

from importlib.util import find_spec

from tests.benchmarks.__main__ import SECTIONS


def test_every_section_of_the_benchmarks_has_its_module() -> None:
    assert {name: find_spec(f"tests.benchmarks.{module}") for name, module in SECTIONS.items() if find_spec(f"tests.benchmarks.{module}") is None} == {}
