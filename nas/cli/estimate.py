"""`nas estimate`: what a search would take, before anything is spent."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from nas.cli.options import Json, Url
from nas.cli.searches import make_client, read_spec
from nas.terminal import out, print_facts, print_json, print_rows, say, shown

commands = typer.Typer()


@commands.command()
def estimate(
    spec: Annotated[Path, typer.Argument(help="Spec file (JSON); - for standard input.")],
    shape: Annotated[list[str] | None, typer.Option(help="Also say whether this shape is legal: L4-D56-F144-H4-K4-E8.")] = None,
    wait_seconds: Annotated[float, typer.Option(help="Wait at most so long for workers that are measured for the first time.")] = 120.0,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Check and price a search before anything is spent: legal shapes, tokens, memory, disk and time."""
    body = read_spec(spec)
    started = time.monotonic()
    said = as_json
    with make_client(url) as client:
        while True:
            preview = client.preview(body, shapes=shape or [])
            if not preview["time"].get("pending") or time.monotonic() - started > wait_seconds:
                break
            if not said:
                say("the speed of such workers is being measured, once (some seconds)")
                said = True
            time.sleep(1.0)
    if as_json:
        print_json(preview)
    else:
        _print(preview)


def budget_facts(plan: Mapping[str, Any]) -> dict[str, str]:
    """One budget of the plan: its ceilings and the legal shapes under them."""
    space = plan["space"]
    described = {"smallest": space["smallest"], "largest": space["largest"], **{f"anchor {name}": anchor for name, anchor in plan["anchors"].items()}}
    described |= {f"example {number}": example for number, example in enumerate(space["examples"], start=1)}
    ceilings = {f"at most {name.replace('_', ' ')}": f"{most:,}" for name, most in plan["ceilings"].items()}
    ceilings |= {f"at most {name}": f"{most:g}, measured at rung 0" for name, most in plan["latency_ceilings"].items()}
    return {
        **ceilings,
        **({"at least": f"{plan['min_parameters']:,} {plan['counting']} parameters"} if plan["min_parameters"] else {}),
        "legal shapes": f"{space['count']:,}",
        **{name: f"{shown(shape['shape'], name='')}  ({shape['parameters']:,} parameters)" for name, shape in described.items()},
    }


def _print(preview: Mapping[str, Any]) -> None:
    plan, took = preview["plan"], preview["time"]
    facts = {"teacher": _teacher(preview)}
    for number, budget in enumerate(plan["budgets"]):
        prefix = f"budget {number}: " if len(plan["budgets"]) > 1 else ""
        facts |= {prefix + name: value for name, value in budget_facts(budget).items()}
    facts |= {
        "distillation tokens": f"{plan['expected_distillation_tokens']:,} expected, {plan['max_distillation_tokens']:,} if every trial went all the way",
        "memory of a trial": f"{plan['memory']['training']['device_bytes'] / 2**20:,.0f} MiB",
        "disk": f"{plan['disk']['prepared_bytes'] / 2**20:,.0f} MiB prepared, {plan['disk']['trial_bytes'] / 2**20:,.0f} MiB a trial",
    }
    print_facts(facts, as_json=False)
    out.print()
    seconds = {rung["rung"]: rung for rung in took.get("rungs", [])}
    print_rows(
        [
            {
                "rung": rung["rung"],
                "tokens added": rung["tokens"],
                "trials expected": rung["expected"],
                "at most": rung["at_most"],
                **({"a trial takes": _duration(seconds[rung["rung"]]["seconds_per_trial"])} if seconds else {}),
            }
            for rung in plan["rungs"]
        ],
        as_json=False,
    )
    out.print()
    worker = took["worker"]
    resources = f"{worker['cpus']:g} CPUs, {worker['gpus']:g} GPUs, {worker['dtype']}"
    if took["known"]:
        wall, device = took["wall_seconds"], took["device_seconds"]
        facts = {
            "wall time": f"{_duration(wall['expected'])} expected, {_duration(wall['at_most'])} if ties take along all they may",
            "of which prepare": _duration(took["prepare_seconds"]),
            "of which confirm": _duration(took["confirm_seconds"]),
            "device time": f"{_duration(device['expected'])} expected, {_duration(device['at_most'])} at most",
            "measured on": f"{worker['host']}, {worker['measured_at'][:16]} ({resources}); an estimate, within a factor of two",
        }
    else:
        facts = {"wall time": f"not known for workers with {resources}: {took['reason']}"}
    print_facts(facts, as_json=False)
    for asked in preview["asked"]:
        out.print()
        reasons = [f"  {problem['field']}: expected {problem['expected']}, got {problem['got']}" for problem in asked["problems"]]
        verdict = "legal" if asked["legal"] else "not legal"
        if asked["legal"] and not asked["proposed"]:
            verdict += ", but outside of `space` or below `budget.min_use`: tried where `shapes` names it, never proposed"
        out.print("\n".join([f"{asked['key']}  ({asked['parameters']:,} parameters): {verdict}", *reasons]), markup=False, highlight=False, soft_wrap=True)


def _teacher(preview: Mapping[str, Any]) -> str:
    parameters = f"{preview['plan']['teacher_parameters']:,} parameters"
    (teacher,) = (used for used in preview["inputs"] if used["kind"] == "teacher")
    if teacher["digest"] is not None:
        return parameters
    return f"the winner of {teacher['name']}, which has not ended: priced for the largest that it may be, {parameters}"


def _duration(seconds: float) -> str:
    """1 min 20 s as 0:01:20; below ten seconds with a decimal."""
    return f"{seconds:.1f} s" if seconds < 10 else str(timedelta(seconds=round(seconds)))
