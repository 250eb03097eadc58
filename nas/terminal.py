"""What a person at a terminal sees: tables, event lines, and the two streams. Results go to `out`, everything else to `err`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nas.shape import Shape

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

_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters, but tabs and line ends: what a service sends may move the cursor, rename the window or hide what stands before it."""


class Terminal(Console):
    """A console on which text is text: names and messages of a service are neither commands to the terminal nor markup of rich."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(without_commands(text), **options)


def without_commands(text: str) -> str:
    """Text that a terminal only shows; where a command began stands U+FFFD."""
    return _COMMANDS.sub("\ufffd", text)


out = Terminal(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_COLUMNS)
err = Terminal(stderr=True)


def say(text: str) -> None:
    """A remark, on standard error."""
    err.print(f"nas: {text}", markup=False, highlight=False, soft_wrap=True)


def write(text: str) -> None:
    """A document of the service on standard output: as it is for a file or another program, without commands for a terminal."""
    sys.stdout.write(without_commands(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """One JSON document."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_rows(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """A list of records: a table with a column for every name that one of them has, or JSON."""
    if as_json:
        print_json(list(rows))
        return
    if not rows:
        out.print("none", style="dim", highlight=False)
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    names = list(dict.fromkeys(name for row in rows for name in row))
    for index, name in enumerate(names):
        table.add_column(name, no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*("" if row.get(name) is None else shown(row[name], name=name) for name in names))
    out.print(table)


def print_facts(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """One record: a line for each name that has a value, or JSON."""
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        if value is not None:
            out.print(f"{name:<34} {shown(value, name=name)}", markup=False, highlight=False, soft_wrap=True)


def shown(value: Any, *, name: str) -> str:
    """One value as text; a digest by its first 12 characters."""
    if name == "digest":
        return str(value)[:12]
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
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
    lead = f"  best: trial {best['trial']}, score {plus_minus(best['score'], best['standard_error'])}" if best else ""
    left = f"  about {duration(progress['seconds_left'])} left" if progress.get("seconds_left") else ""
    waits = f"  waits for {search['waits_for']}" if search.get("waits_for") else ""
    return f"{search['state']}{waits}  {progress['settled']} of {progress['planned']} trials settled  {rungs}{lead}{left}"


def duration(seconds: float) -> str:
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
        case "trial.retried":
            return f"{at}  trial {data['trial']} is tried again"
        case "search.updated":
            return f"{at}  search changed: {shown(data, name='')}"
        case "trial.confirmed":
            return f"{at}  trial {data['trial']} {'confirmed' if data['verified'] else 'NOT verified: ' + str(data['reason'])}"
        case "prepare.step":
            return f"{at}  prepare: {data['step']}" + (f" {data['done']} of {data['of']}" if "done" in data else "")
        case "attempt.lost" if data.get("reason") in ("paused", "cancelled"):
            return None  # as it was asked to
        case "attempt.failed" | "attempt.lost":
            return f"{at}  attempt of {_step(data)} {kind.split('.')[1]}: {(data.get('reason') or '')[:200]}"
        case "attempt.waiting":
            return f"{at}  {_step(data)}: {data['reason']}"
        case "task.weak":
            forms = f"; clear by {', '.join(data['clear_forms'])}" if data["clear_forms"] else ""
            verdict = "kept, as the spec insists" if data["in_objective"] else "left out of the objective"
            z = "" if data["z"] is None else f", {data['z']:.2f} standard errors"
            return f"{at}  task {data['task']} ranks nothing, {verdict}: teacher {data['teacher']:.4g}, random weights {data['random']:.4g}{z}{forms}"
        case "search.confirming" if data.get("reason") == "space_exhausted":
            return f"{at}  search confirming: the space is exhausted, all {data['legal_shapes']:,} legal shapes have been tried"
        case "search.winner":
            of = f" of budget {data['budget']}" if data.get("budget") else ""
            return f"{at}  winner{of}: trial {data['trial']}" if "trial" in data else f"{at}  winner chosen"
        case "distillation.distilled":
            return f"{at}  distilled on {data['tokens']:,} tokens"
        case _ if kind.startswith(("search.", "distillation.")):
            error = data.get("error") or {}
            return f"{at}  {kind.split('.')[0]} {kind.split('.')[1]}" + (f": {error.get('reason')}: {error.get('message')}" if error else "")
        case _:
            return None


def _step(data: Mapping[str, Any]) -> str:
    """Which step an attempt's event is about: prepare, rung 1 of trial 7."""
    rung = "" if data.get("rung") is None else f" {data['rung']}"
    return f"{data['stage']}{rung}" + ("" if data.get("trial") is None else f" of trial {data['trial']}")


def leaderboard_table(board: Mapping[str, Any], *, width: int | None = None, objectives: Sequence[str] = ()) -> Table:
    """The board for a terminal, with the costs that are objectives and who is on their front. Where it is narrow, the columns that say least are
    left out; --csv and --json have them all."""
    rows = board["rows"]
    tasks = sorted({task for row in rows for task in row["tasks"]})
    ties = Counter(row["tie_group"] for row in rows if row["rank"] is not None)
    columns: dict[str, list[str]] = {
        "rank": ["" if row["rank"] is None else f"{row['rank']}{'=' if ties[row['tie_group']] > 1 else ''}" for row in rows],
        "trial": [f"{row['number']}{_mark(row, winner=board.get('winner'))}" for row in rows],
        "origin": [row["origin"].removeprefix("anchor:") for row in rows],
        **{short: [str(row["shape"][name]) for row in rows] for short, name in _SHORT_AXES.items() if rows and rows[0]["shape"].get(name) is not None},
        "parameters": [f"{row['parameters']:,}" for row in rows],
        "%": [f"{100 * row['share_of_teacher']:.1f}" for row in rows],
        "tokens": [f"{row['tokens']:,}" for row in rows],
        "score": [plus_minus(row["score"], row["standard_error"]) for row in rows],
        "to the best": [_interval(row.get("difference")) for row in rows],
        **{name: [_cost(row.get("costs", {}).get(name)) for row in rows] for name in objectives if name != "parameters"},
        **({"front": ["yes" if row["number"] in board["pareto"] else "" for row in rows]} if objectives else {}),
        "KL": [f"{row['kl']:.4f}" for row in rows],
        **{task: [plus_minus(row["tasks"].get(task, {}).get("value"), row["tasks"].get(task, {}).get("standard_error")) for row in rows] for task in tasks},
        "ms/token": [_milliseconds(row.get("confirmation")) for row in rows],
        "P(best)": ["" if row.get("probability_best") is None else f"{100 * row['probability_best']:.0f}%" for row in rows],
        "state": [row["state"] for row in rows],
    }
    empty = [name for name in ("to the best", "ms/token", "P(best)") if not any(columns[name])]
    for name in empty:
        del columns[name]
    for name in (*reversed(tasks), "tokens", "state", "%", "KL", "ms/token", "to the best", "P(best)"):
        if name not in columns:
            continue
        if width is None or sum(max(map(len, (title, *cells))) + 2 for title, cells in columns.items()) <= width:
            break
        del columns[name]
    table = Table(*columns, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def board_facts(board: Mapping[str, Any]) -> dict[str, Any]:
    """What the board says of the search as a whole: the winner and how sure it is, what it took, how far to trust the order."""
    facts: dict[str, Any] = {}
    winner = next((row for row in board["rows"] if row["number"] == board.get("winner")), None)
    if winner is not None:
        probability, finalists = winner.get("probability_best"), board.get("finalists", ())
        if len(finalists) == 1:
            sure = ", the only finalist"
        else:
            sure = "" if probability is None else f", the best of {len(finalists)} finalists with probability {probability:.2f}"
        facts["winner"] = f"trial {winner['number']}{sure}"
    if cost := board.get("cost"):
        facts["cost"] = f"{cost['distillation_tokens']:,} tokens, {cost['device_seconds']:,.0f} device seconds"
        for entry in cost["decisions"]:
            facts[entry["decision"]] = (
                f"{entry['trials']} measured, {entry['chosen']} chosen: {entry['tokens']:,} tokens, {entry['device_seconds']:,.0f} device seconds"
            )
    for entry in board.get("agreement", ()):
        if entry["tau"] is not None:
            facts[f"{entry['first']} -> {entry['second']}"] = f"Kendall tau {entry['tau']:.2f} over {entry['num_trials']} trials"
    if spreads := board.get("seed_spreads"):
        facts["spread between seeds"] = _seed_spread(spreads[-1])
    for repeat in board.get("repeats", ()):
        kls = ", ".join(f"{kl:.4f}" for kl in repeat["kl_by_rung"])
        facts[f"repeat with seed {repeat['seed']}"] = f"trial {repeat['number']}, {repeat['state']}, not ranked: KL {kls}"
    for name, share in (board.get("importances") or {}).items():
        facts[f"importance of {name}"] = f"{100 * share:.0f}%"
    if board.get("weak_tasks"):
        facts["weak tasks"] = f"{', '.join(board['weak_tasks'])}: no part of the score, unless the spec insists; the teacher is not clear of random weights"
    return facts


def _seed_spread(spread: Mapping[str, Any]) -> str:
    """What is taken for the spread at the last rung, and where it comes from."""
    if spread["measured"] is None:
        return f"{100 * spread['value']:.2g}% of a KL, as the spec assumes"
    shown = f"{100 * spread['measured']:.2g}%, of which {100 * spread['of_blocks']:.2g}% by their blocks"
    pooled = f"the spec's {100 * spread['prior']:.2g}% pooled with {spread['num_runs']} runs of one shape, which differ by {shown}"
    return f"{100 * spread['value']:.2g}% of a KL: {pooled}"


def comparison_tables(comparison: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Two searches as tables, by title."""
    best, cost = comparison["best"], comparison["cost"]
    sides = [
        {
            "": name,
            "search": search,
            "best": None if row is None else f"trial {row['number']}",
            "score": None if row is None else plus_minus(row["score"], row["standard_error"]),
            "parameters": None if row is None else row["parameters"],
            "tokens": spent["distillation_tokens"],
            "device seconds": spent["device_seconds"],
        }
        for name, search, row, spent in zip("AB", comparison["searches"], best, cost, strict=True)
    ]
    gaps = {**comparison["tasks"], **({"KL to the teacher": comparison["kl"]} if comparison["kl"] else {})}
    differences = [
        {"measured": name, "B - A": f"{gap['value']:+.4f}", "95 %": f"{gap['low']:+.4f} .. {gap['high']:+.4f}", "paired": gap["paired"]}
        for name, gap in gaps.items()
    ]
    shapes = [
        {
            "shape": Shape.from_dict(both["shape"]).key,
            **{f"{name}: {figure}": both[side][figure] for name, side in (("A", "first"), ("B", "second")) for figure in ("rank", "tokens", "score", "kl")},
        }
        for both in comparison["shapes"]
    ]
    fields = [{"field": name, "A": shown(ours, name=""), "B": shown(theirs, name="")} for name, (ours, theirs) in comparison["spec"].items()]
    return {
        "The searches": sides,
        f"Best against best, on {comparison['documents'].replace('_', '-')} documents": differences,
        "Shapes on both boards": shapes,
        "What was asked differently": fields,
    }


def _mark(row: Mapping[str, Any], *, winner: int | None) -> str:
    """Behind a trial's number: a star for the winner, a tick for a verified file, a cross for one that was refused."""
    return (" *" if row["number"] == winner else "") + {True: " ✓", False: " ✗", None: ""}[row.get("verified")]


def _interval(difference: Mapping[str, Any] | None) -> str:
    if difference is None or difference["low"] is None:
        return ""
    return "best" if difference["low"] == difference["high"] == 0 else f"{difference['low']:+.3f} .. {difference['high']:+.3f}"


def _cost(value: float | None) -> str:
    """Bytes and FLOPs are whole numbers; milliseconds have as many digits as a measurement."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _milliseconds(confirmation: Mapping[str, Any] | None) -> str:
    latency = (confirmation or {}).get("latency")
    return f"{1000 * latency['decode_seconds_per_token']:.2f}" if latency else ""


def plus_minus(value: float | None, error: float | None) -> str:
    """A value with its error; nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.3f} ± {error:.3f}" if error is not None else f"{value:.3f}"
