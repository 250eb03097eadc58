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


def board_row(number: int, **changes: Any) -> dict[str, Any]:
    """A row of a leaderboard, as far as the store knows of it."""
    row = {
        "number": number,
        "rank": 1,
        "rung": 2,
        "tie_group": 1,
        "shape": shape(intermediate_size=8 + number),
        "parameters": 1000 + number,
        "score": 0.5,
        "kl": 0.25,
        "state": "completed",
        "costs": {"parameters": 1000.0 + number},
    }
    return row | changes
