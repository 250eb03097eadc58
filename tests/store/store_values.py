"""Values for the tests of the store."""

from __future__ import annotations

from typing import Any


def shape(**changes: int) -> dict[str, int]:
    numbers = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return numbers | changes


def result(*, tokens: int = 0, loss: float = 2.5) -> dict[str, Any]:
    """The result of a rung, as `RungResult.as_dict()` gives it."""
    metric = {"value": loss, "standard_error": 0.1, "higher_is_better": False, "documents": [loss - 0.1, loss + 0.1]}
    return {
        "rung": 0,
        "tokens": tokens,
        "kl": metric,
        "loss": metric,
        "tasks": {"pairs/a.b": metric},
        "parameters": 1000,
        "seconds": {"distil": 1.5},
        "details": {"pairs/a.b": {"acc,none": 0.5}},
    }
