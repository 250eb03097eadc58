"""What one model costs under a budget's loads: closed forms, and the latency of its named workloads on the device where it is."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from nas.architecture import read_architecture
from nas.budget import read_workload
from nas.compress.teacher import resolve_dtype
from nas.cost import COSTS, count_costs
from nas.evaluate.latency import measure_latency
from nas.spec import LatencySpec, WorkloadSpec

REPEATS = 5
"""Runs behind one median."""


def closed_costs(model: PreTrainedModel, *, workload: WorkloadSpec) -> dict[str, float]:
    """The costs that follow from the model's config, by name: parameters, memory_bytes, flops_per_token."""
    architecture = read_architecture(model.config.to_dict())
    costs = count_costs(architecture, architecture.shape, workload=read_workload(workload, architecture=architecture))
    return {name: float(costs[name]) for name in COSTS}


def measured_costs(model: PreTrainedModel, *, workloads: Sequence[LatencySpec], dtype: str) -> dict[str, float]:
    """Milliseconds of prefill and of one decoding step of each workload, medians of `REPEATS` runs. Weights need no training for it: only shapes matter.

    Args:
        dtype: as the model would be served; the model is converted to it and left so.
    """
    costs = {}
    for workload in workloads:
        latency = measure_latency(
            model.to(resolve_dtype(dtype)),
            prompt_tokens=workload.prompt_tokens,
            new_tokens=workload.new_tokens,
            batch_size=workload.batch_size,
            repeats=REPEATS,
        )
        costs[f"prefill_ms:{workload.name}"] = 1e3 * latency.prefill_seconds
        costs[f"decode_ms:{workload.name}"] = 1e3 * latency.decode_seconds_per_token
    return costs
