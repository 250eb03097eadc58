"""What all tests share: one thread per process, no network, and no silent skip of what must run.

The world is stricter here than in production: warnings of our own code are errors, and in continuous integration
(NAS_REQUIRED=ray,postgresql,browser,faults) a skipped test of one of those parts fails the run.
"""

from __future__ import annotations

import os

# Before torch and the hub's client are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import pytest

_skipped: dict[str, list[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        for part in _required():
            if part in report.keywords or f"[{part}" in report.nodeid or f"-{part}" in report.nodeid:
                _skipped.setdefault(part, []).append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    # With pytest-xdist the workers report to the controller, which alone decides.
    if _skipped and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for part, tests in _skipped.items():
        terminalreporter.write_line(f"required part {part!r} was skipped: {', '.join(tests)}", red=True)


def _required() -> list[str]:
    return [part for part in os.environ.get("NAS_REQUIRED", "").split(",") if part]
