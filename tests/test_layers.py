"""Who imports what. The house is drawn in ARCHITECTURE.md; this test holds its walls."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports only from rows above its own. A package's row holds all its modules, which may import each other.
ROWS = (
    "nas.errors",
    "nas.files",
    "nas.settings",
    "nas.shared_files",
    "nas.node_cache",
    "nas.logs",
    "nas.tracing",
    "nas.shape",
    "nas.families",
    "nas.architecture",
    "nas.deployability",
    "nas.cost",
    "nas.memory",
    "nas.strict_json",
    "nas.spec",
    "nas.budget",
    "nas.space",
    "nas.estimate",
    "nas.compress.device",
    "nas.compress.manifest",
    "nas.compress.experts",
    "nas.compress.untrusted",
    "nas.compress.teacher",
    "nas.compress.corpus",
    "nas.compress.blocks",
    "nas.compress.importance",
    "nas.compress.linear",
    "nas.compress.losses",
    "nas.compress.depth",
    "nas.compress.sorting",
    "nas.compress.slicing",
    "nas.compress.second_moments",
    "nas.compress.teacher_outputs",
    "nas.compress.signals",
    "nas.compress.held_out",
    "nas.compress.objective",
    "nas.compress.hidden_states",
    "nas.compress.reconstruction",
    "nas.compress.train_plan",
    "nas.compress.muon",
    "nas.compress.moments",
    "nas.compress.data_order",
    "nas.compress.heap",
    "nas.compress.train_state",
    "nas.compress.distributed",
    "nas.compress.fitting",
    "nas.compress.distillation",
    "nas.compress.speed",
    "nas.compress.correction",
    "nas.pricing",
    "nas.evaluate",
    "nas.recipe",
    "nas.run_folder",
    "nas.full_run",
    "nas.pruning",
    "nas.search.results",
    "nas.search.task_signals",
    "nas.search.pareto",
    "nas.search.study",
    "nas.search.seeds",
    "nas.search.rungs",
    "nas.search.confirmed",
    "nas.search.objective",
    "nas.search.leaderboard",
    "nas.search.ranking",
    "nas.search.forecast",
    "nas.search.comparison",
    "nas.search.costs",
    "nas.search.layout",
    "nas.search.task_scoring",
    "nas.search.shared",
    "nas.search.task_damage",
    "nas.search.trial",
    "nas.search.prepare",
    "nas.search.confirm",
    "nas.store",
    "nas.trial_files",
    "nas.housekeeping",
    "nas.chain",
    "nas.warm_start",
    "nas.submission",
    "nas.distillations",
    "nas.trial_bundles",
    "nas.bundle",
    "nas.registration",
    "nas.connection",
    "nas.client",
    "nas.terminal",
    "nas.serve",
    "nas.cli",
    "nas.demo",
)

# Library -> the only places that may import it.
OWNERS: dict[str, str | tuple[str, ...]] = {
    "optuna": "nas.search.study",
    "sqlalchemy": "nas.store",
    "alembic": "nas.store",
    "lm_eval": "nas.evaluate",
    "ray": "workers",
    "fastapi": "api",
    "starlette": "api",
    "uvicorn": "api",
    "structlog": "nas.logs",
    "opentelemetry": ("nas.tracing", "api.app"),
    "prometheus_client": ("api.metrics", "api.service", "workers.metrics"),
}

HEAVY = ("torch", "transformers", "ray", "optuna", "lm_eval")

# What the extra `worker` installs, by the name under which it is imported.
WORKER = (
    "accelerate",
    "datasets",
    "huggingface_hub",
    "lm_eval",
    "optuna",
    "pyarrow",
    "ray",
    "safetensors",
    "sklearn",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
)
WITHOUT_WORKER = """
import sys
for name in {names!r}:
    sys.modules[name] = None  # importing it raises
from fastapi.testclient import TestClient
from nas.settings import Settings
from nas.store.store import Store
import api.__main__, nas.serve, nas.cli
from api.app import create_app
settings = Settings.from_environment({{"NAS_DATA": {folder!r}}})
store = Store.open_for_service(settings.database_url, migrate=True)
with TestClient(create_app(store=store, settings=settings), base_url="http://localhost") as client:
    for path in ("/healthz", "/openapi.json", "/v1/searches", "/v1/teachers", "/"):
        assert client.get(path).status_code == 200, client.get(path).text
    assert client.post("/v1/searches", content="{{}}", headers={{"Content-Type": "application/json"}}).status_code == 422
store.close()
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in ("nas", "api", "workers") for path in sorted((ROOT / package).rglob("*.py"))}


def imports(module: str) -> Iterator[str]:
    """Every module that a source file imports, wherever in the file."""
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; the house uses absolute ones"
            base = node.module or ""
            # `from nas.evaluate import harness` imports a module, `from nas.shape import Shape` a name.
            yield from (f"{base}.{alias.name}" if f"{base}.{alias.name}" in SOURCES else base for alias in node.names)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def row_of(module: str) -> int | None:
    return next((index for index, row in enumerate(ROWS) if within(module, row)), None)


@pytest.mark.parametrize("module", SOURCES)
def test_packages_import_one_way(module):
    forbidden = {"nas": ("api", "workers"), "api": ("workers",), "workers": ("api",)}[module.split(".")[0]]

    assert [name for name in imports(module) if name.split(".")[0] in forbidden] == []


@pytest.mark.parametrize("module", SOURCES)
def test_each_library_has_its_importers(module):
    owners = {name: OWNERS.get(name.split(".")[0], ()) for name in imports(module)}
    places = {name: (owner,) if isinstance(owner, str) else owner for name, owner in owners.items() if owner}
    trespasses = [name for name, allowed in places.items() if not any(within(module, place) for place in allowed)]

    assert trespasses == []


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("nas.")])
def test_a_module_imports_only_from_rows_above_its_own(module):
    own = row_of(module)
    if own is None:
        source = SOURCES[module].read_text(encoding="utf-8")
        assert not source.strip() or any(row.startswith(module + ".") for row in ROWS), f"{module} has no row in ROWS: give it one, and ARCHITECTURE.md a line"
        return
    for name in imports(module):
        if within(name, "nas"):
            other = row_of(name)
            assert other is not None, f"{module} imports {name}, which has no row"
            assert other < own or (other == own and name != module), f"{module} imports {name}, which is not above it"


def test_every_row_that_is_drawn_exists():
    assert [row for row in ROWS if row not in SOURCES] == []


def test_the_top_package_stays_empty():
    assert SOURCES["nas"].read_text(encoding="utf-8").strip() == ""


def test_importing_the_api_loads_nothing_heavy():
    if "api.app" not in SOURCES:
        pytest.skip("api/app.py does not exist yet")
    code = f"import sys, api.app; print(*[name for name in {HEAVY!r} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_api_and_the_client_need_nothing_of_the_worker_s_packages(tmp_path):
    code = WITHOUT_WORKER.format(names=WORKER, folder=str(tmp_path))

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_the_extra_worker_is_what_the_api_is_tested_without():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    imported_as = {"huggingface-hub": "huggingface_hub", "lm-eval": "lm_eval", "scikit-learn": "sklearn"}

    names = {re.split("[=<>]", requirement)[0] for requirement in extras["worker"]}

    assert {imported_as.get(name, name) for name in names} == set(WORKER)
