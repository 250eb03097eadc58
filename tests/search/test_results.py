"""Means over documents, and results as JSON."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.search.results import Metric, RungResult

finite = st.floats(-1e6, 1e6)
documents = st.lists(finite, min_size=1, max_size=20).map(tuple)
metrics = st.builds(Metric, value=finite, standard_error=st.floats(0, 1e6), higher_is_better=st.booleans(), documents=documents)


@given(documents)
@settings(max_examples=50, deadline=None)
def test_a_metric_is_the_mean_of_its_documents_with_its_standard_error(values: tuple[float, ...]) -> None:
    metric = Metric.from_documents(values, higher_is_better=True)
    assert metric.value == pytest.approx(statistics.fmean(values), abs=1e-9)
    expected = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    assert metric.standard_error == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(
    st.builds(
        RungResult,
        rung=st.integers(0, 3),
        tokens=st.integers(0, 10),
        kl=metrics,
        loss=metrics,
        tasks=st.dictionaries(st.text(max_size=3), metrics),
        parameters=st.integers(1, 9),
        seconds=st.dictionaries(st.text(max_size=3), finite),
        details=st.just({"t": {"acc": {"value": None}}}),
        costs=st.dictionaries(st.text(max_size=3), finite),
        likelihoods=st.dictionaries(st.text(max_size=3), st.dictionaries(st.sampled_from(["margin", "bits_per_byte"]), metrics), max_size=2),
    )
)
@settings(max_examples=30, deadline=None)
def test_a_result_survives_json(result: RungResult) -> None:
    assert RungResult.from_dict(json.loads(json.dumps(result.as_dict(), allow_nan=False))) == result


def test_a_result_stored_before_there_were_likelihood_forms_is_read() -> None:
    metric = Metric.from_documents((1.0, 2.0), higher_is_better=False)
    result = RungResult(rung=0, tokens=0, kl=metric, loss=metric, tasks={}, parameters=1, seconds={}, details={})
    stored = {name: value for name, value in result.as_dict().items() if name != "likelihoods"}
    assert RungResult.from_dict(stored) == result
