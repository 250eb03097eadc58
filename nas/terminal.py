"""What a person at a terminal sees: tables, event lines, and the two streams. Results go to `out`, everything else to `err`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_SHORT_AXES = {
    "L": "num_hidden_layers",
    "D": "hidden_size",
    "F": "intermediate_size",
    "H": "num_attention_heads",
    "KV": "num_key_value_heads",
    "X": "num_experts",
}

_PIPE_COLUMNS = 200
"""Width of a table that no terminal shows, such as in a pipe or a file."""

out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_COLUMNS)
err = Console(stderr=True)


def say(text: str) -> None:
    """A remark, on standard error."""
    err.print(f"nas: {text}", markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_rows(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """A list of records with the same names: a table, or JSON."""
    if as_json:
        print_json(list(rows))
        return
    if not rows:
        say("none")
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(rows[0]):
        table.add_column(name, no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*(shown(value, name=name) for name, value in row.items()))
    out.print(table)


def print_facts(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """One record: a line for each name, or JSON."""
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        out.print(f"{name:<34} {shown(value, name=name)}", markup=False, highlight=False, soft_wrap=True)


def shown(value: Any, *, name: str) -> str:
    """One value as text; a digest by its first 12 characters."""
    if name == "digest":
        return str(value)[:12]
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return ", ".join(shown(item, name="") for item in value)
    if isinstance(value, dict):
        return "  ".join(f"{key}={shown(item, name=key)}" for key, item in value.items())
    return str(value)


def status_line(search: Mapping[str, Any]) -> str:
    """Where a search stands, in one line."""
    progress, best = search["progress"], search["best"]
    rungs = "  ".join(f"rung {rung['rung']}: {rung['finished']}" + (f"+{rung['running']}" if rung["running"] else "") for rung in search["rungs"])
    lead = f"  best: trial {best['trial']}, score {_plus_minus(best['score'], best['standard_error'])}" if best else ""
    left = f"  about {_duration(progress['seconds_left'])} left" if progress.get("seconds_left") else ""
    return f"{search['state']}  trials {progress['settled']}/{progress['planned']}  {rungs}{lead}{left}"


def _duration(seconds: float) -> str:
    """90 s, 12 min, 3.5 h: no more digits than an estimate has."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def event_line(event: Mapping[str, Any]) -> str | None:
    """One event for a person; None for those that say little."""
    data, kind = event["data"], event["type"]
    at = event["created_at"][11:19]
    match kind:
        case "trial.proposed":
            return f"{at}  trial {data['trial']} proposed ({data['origin']}), {data['parameters']:,} parameters"
        case "trial.rung_finished":
            return f"{at}  trial {data['trial']} rung {data['rung']}: {data['tokens']:,} tokens, KL {data['kl']:.4f}"
        case "trial.failed":
            return f"{at}  trial {data['trial']} failed: {data['failure']['reason']}"
        case "trial.confirmed":
            return f"{at}  trial {data['trial']} {'confirmed' if data['verified'] else 'NOT verified: ' + str(data['reason'])}"
        case "prepare.step":
            return f"{at}  prepare: {data['step']}" + (f" {data['done']} of {data['of']}" if "done" in data else "")
        case "attempt.failed" | "attempt.lost":
            return f"{at}  attempt of {data['stage']} {kind.split('.')[1]}: {(data.get('reason') or '')[:200]}"
        case "attempt.waiting":
            return f"{at}  {data['stage']}" + (f" of trial {data['trial']}" if data.get("trial") is not None else "") + f": {data['reason']}"
        case "search.winner":
            return f"{at}  winner: trial {data['trial']}" if "trial" in data else f"{at}  winner chosen"
        case _ if kind.startswith("search."):
            error = data.get("error") or {}
            return f"{at}  search {kind.split('.')[1]}" + (f": {error.get('reason')}: {error.get('message')}" if error else "")
        case _:
            return None


def leaderboard_table(board: Mapping[str, Any], *, width: int | None = None) -> Table:
    """The board for a terminal. Where it is narrow, the columns that say least are left out; --csv and --json have them all."""
    rows = board["rows"]
    tasks = sorted({task for row in rows for task in row["tasks"]})
    columns: dict[str, list[str]] = {
        "rank": ["" if row["rank"] is None else str(row["rank"]) for row in rows],
        "trial": [str(row["number"]) for row in rows],
        "origin": [row["origin"].removeprefix("anchor:") for row in rows],
        **{short: [str(row["shape"][name]) for row in rows] for short, name in _SHORT_AXES.items() if rows and rows[0]["shape"].get(name) is not None},
        "parameters": [f"{row['parameters']:,}" for row in rows],
        "%": [f"{100 * row['share_of_teacher']:.1f}" for row in rows],
        "tokens": [f"{row['tokens']:,}" for row in rows],
        "score": [_plus_minus(row["score"], row["standard_error"]) for row in rows],
        "KL": [f"{row['kl']:.4f}" for row in rows],
        **{task: [_plus_minus(row["tasks"].get(task, {}).get("value"), row["tasks"].get(task, {}).get("standard_error")) for row in rows] for task in tasks},
        "state": [row["state"] for row in rows],
    }
    for name in (*reversed(tasks), "tokens", "state", "%", "KL"):
        if width is None or sum(max(map(len, (title, *cells))) + 2 for title, cells in columns.items()) <= width:
            break
        del columns[name]
    table = Table(*columns, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _plus_minus(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f} ± {error:.3f}" if error is not None else f"{value:.3f}"
