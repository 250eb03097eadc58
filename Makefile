# Every target makes its environment first; nothing needs to be installed but Python 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
UNIT := not slow and not ray and not browser and not faults and not reference

.PHONY: setup demo test test-all test-faults lint check bench format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup  ## the whole product on a self-made teacher, in about ten minutes on two cores
	$(BIN)/python -m nas.demo

test: setup  ## what people run all day: real Ray, PostgreSQL, browser and kills, about ten minutes on two cores
	$(PYTEST) -n 2 --dist loadfile -m "not slow"

test-all: setup  ## also what takes long
	$(PYTEST) -n 2 --dist loadfile

test-faults: setup  ## break everything that deploy/README.md promises; the last lines say how much was tried, and what was lost or doubled
	$(PYTEST) -n 2 --dist loadgroup tests/faults tests/simulation tests/store/test_requests_machine.py -k "not ten_thousand"

lint: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy nas api workers

check: lint  ## and the tests that start nothing
	$(PYTEST) -n 2 -q -m "$(UNIT)"

bench: setup  ## ratios against a baseline in the same run
	$(BIN)/python -m tests.benchmarks

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) demo build .pytest_cache .mypy_cache .ruff_cache .hypothesis
