"""The rules of deploy/alerts.yaml speak of metrics, labels and states that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from api.metrics import RequestMetrics, StoreMetrics
from nas.settings import Settings
from nas.store.records import AttemptState, SearchState, TrialState
from nas.store.store import Store
from workers import metrics

ROOT = Path(__file__).resolve().parents[2]
RULES: list[dict[str, Any]] = [rule for group in yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
STATES = {"nas_searches": set(SearchState), "nas_trials": set(TrialState), "nas_attempts": set(AttemptState), "nas_attempts_ended_total": set(AttemptState)}
ADDED_BY_PROMETHEUS = {"instance", "job", "le"}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[str]]]:
    """Labels by the name of each sample that API and controller may show."""
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path_factory.mktemp("data"))})
    store = Store.open(settings.database_url, migrate=True)
    registry = CollectorRegistry()
    requests = RequestMetrics(registry)
    requests.requests.labels(method="GET", route="/", status="200").inc(0)
    requests.seconds.labels(method="GET", route="/").observe(0.0)
    metrics.ATTEMPTS_ENDED.labels(stage="rung", state="failed", reason="timeout").inc(0)
    families: list[Metric] = [*StoreMetrics(store, settings=settings).collect(), *registry.collect(), *metrics.REGISTRY.collect()]
    found: dict[str, set[str]] = {"up": set()}
    for family in families:
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, set()) | sample.labels.keys()
    yield found
    store.close()


def selectors(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Every metric of an expression, with what is asked of its labels."""
    found = re.findall(r"\b(nas_[a-z_]+|up)\b(?:\{([^}]*)\})?", expression)
    return [(name, dict(re.findall(r'(\w+)=~?"([^"]*)"', inner))) for name, inner in found]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_every_metric_label_and_state_that_a_rule_names_exists(rule: dict[str, Any], known: dict[str, set[str]]) -> None:
    named = selectors(rule["expr"])

    assert named
    for name, labels in named:
        assert name in known, f"{name} is shown by nobody"
        assert labels.keys() <= known[name] | ADDED_BY_PROMETHEUS, f"{name} has the labels {known[name]}"
        if "state" in labels:
            assert labels["state"] in STATES[name]
    for by in re.findall(r"by \(([^)]*)\)", rule["expr"]):
        assert {label.strip() for label in by.split(",")} <= ADDED_BY_PROMETHEUS.union(*(known[name] for name, _ in named))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_every_alert_says_what_is_wrong_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"].endswith(".")
    assert len(rule["annotations"]["runbook"]) > 40
    assert rule["expr"].count("(") == rule["expr"].count(")")


def test_a_rule_that_names_what_nobody_shows_would_be_found(known: dict[str, set[str]]) -> None:
    assert selectors('sum(rate(nas_gone_total{state="x"}[5m]))') == [("nas_gone_total", {"state": "x"})]
    assert "nas_gone_total" not in known
    assert known["nas_attempts_ended_total"] == {"stage", "state", "reason"}


def test_the_alerts_have_names_of_their_own() -> None:
    names = [rule["alert"] for rule in RULES]

    assert len(names) == len(set(names))
