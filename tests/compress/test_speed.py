from __future__ import annotations

import pytest
import torch

from nas.compress import speed


def test_a_probe_measures_every_size_and_leaves_the_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "HIDDEN_SIZES", {"cpu": (32, 64)})
    monkeypatch.setattr(speed, "_BATCH", {"cpu": (1, 16)})
    monkeypatch.setattr(speed, "_SECONDS", 0.01)
    before = torch.random.get_rng_state()

    points = speed.probe_speed(device="cpu", dtype="float32")

    assert [point.flops_per_token for point in points] == sorted({point.flops_per_token for point in points})
    assert all(point.scored_per_second > 0 and point.trained_per_second > 0 for point in points)
    assert torch.equal(torch.random.get_rng_state(), before)
