"""What runs on a node of the cluster before anything of ours may run there: is this node like the controller's machine?

Ray ships this module by value, so that a node with another version of the package, or with none, can still answer. So it
imports the standard library alone, and the rest inside functions, once it is known to be ours.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "lm-eval", "numpy", "ray")
"""What decides results, or has to read what another node wrote."""
SOURCES = ("nas", "workers")
TOKEN = "nodes/token.json"
"""In the shared files: what the controller left there, by which a node knows that it sees the same."""
MIN_FREE_BYTES = 2**30
"""Less free disk than this for the node's copies is worth a warning."""

_fit: set[str] = set()
"""What this process has found itself fit for: a warm worker asks itself once."""


def versions() -> dict[str, str | None]:
    """Of Python, of our source (a digest) and of the packages on this machine; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "nas": source_digest()}
    for package in PACKAGES:
        try:
            # Less what tells builds apart: torch for the controller's CPU and for a node's GPU have one version.
            found[package] = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def source_digest() -> str | None:
    """sha256 over names and content of our Python files: two machines with one number run the same code."""
    digest = hashlib.sha256()
    for package in SOURCES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return None
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def check_node(expected: dict[str, Any]) -> dict[str, Any]:
    """What this node is like, and what of it is not as expected.

    Args:
        expected: `versions` (None where any will do), and `files`: the URL of the shared files and the `token` that lies there.
    Returns:
        problems, warnings, facts: plain JSON.
    """
    began, found = time.time(), versions()
    problems = [
        f"{name}: expected {_short(wanted)} as on the controller's machine, got {_short(found.get(name))}"
        for name, wanted in expected["versions"].items()
        if wanted is not None and found.get(name) != wanted
    ]
    problems += [
        f"{name}: expected to be installed, got nothing" for name, version in found.items() if version is None and expected["versions"].get(name) is None
    ]
    facts: dict[str, Any] = {"versions": found, "host": socket.gethostname(), "authenticated": os.environ.get("RAY_AUTH_MODE") == "token"}
    warnings: list[str] = []
    if not problems:  # without our own code there is nothing to read them with
        problems += _check_files(expected["files"], facts=facts, warnings=warnings)
    return {"problems": problems, "warnings": warnings, "facts": {**facts, "began": began, "ended": time.time()}}


def _check_files(files: dict[str, Any], *, facts: dict[str, Any], warnings: list[str]) -> list[str]:
    """Are the shared files those of the controller, may this node write there, and is there room for its copies?"""
    from nas.errors import NasError
    from nas.settings import Settings
    from nas.shared_files import SharedFiles

    try:
        shared, key = SharedFiles(files["url"]), f"nodes/{socket.gethostname()}-{os.getpid()}.json"
        token = (shared.read_json(TOKEN) or {}).get("token")
        if token != files["token"]:
            return [
                f"shared files {files['url']}: expected the controller's token {files['token'][:8]}, got {_short(token)}: another place under the same name"
            ]
        shared.write_json({"at": time.time()}, key=key)
        shared.delete(key)
        if files["copies"]:
            settings = Settings.from_environment(os.environ)
            settings.cache_folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=settings.cache_folder):
                free = shutil.disk_usage(settings.cache_folder).free
            facts |= {"cache": str(settings.cache_folder), "cache_free_bytes": free}
            if free < MIN_FREE_BYTES:
                warnings.append(f"NAS_CACHE={settings.cache_folder}: expected at least {MIN_FREE_BYTES} bytes free, got {free}")
    except (NasError, OSError) as error:
        return [f"shared files and copies: {type(error).__name__}: {error}"]
    return []


def run_step(step: dict[str, Any], *, work: str, expected: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Run a step here, if this node is fit for it.

    Args:
        step: `workers.step.Step` as plain values: a node of another version could not unpickle ours.
        work: module:function that takes the step and the arguments and returns its outcome.
    Returns:
        outcome: `Outcome.as_dict()`; node: this one's id in Ray; check: why it is not fit, None where it is.
    """
    import ray

    node = ray.get_runtime_context().get_node_id()
    if (identity := repr(sorted(expected.items()))) not in _fit:
        check = check_node(expected)
        if check["problems"]:
            message = f"node {node[:12]} ({socket.gethostname()}): {'; '.join(check['problems'])}"
            outcome = {"succeeded": False, "result": None, "reason": "node_unfit", "message": message, "retryable": True}
            return {"outcome": outcome, "node": node, "check": check}
        _fit.add(identity)
    module, _, name = work.partition(":")
    function = getattr(importlib.import_module(module), name)
    from workers.step import Step

    return {"outcome": function(Step(**step), **arguments).as_dict(), "node": node, "check": None}


def _short(value: str | None) -> str:
    return "nothing" if value is None else value[:12]
