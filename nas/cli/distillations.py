"""Full distillations as jobs of the service, over REST. `nas distill` is the same without a service."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from nas.cli.following import exit_unless_well, follow, print_events, tell_break
from nas.cli.options import Json, SearchId, Url, read_pairs
from nas.cli.searches import make_client
from nas.terminal import duration, print_facts, print_json, print_rows, say, write

commands = typer.Typer(help="Full distillations of students that searches found.", no_args_is_help=True)

DistillationId = Annotated[str, typer.Argument(help="Id of a full distillation: dist_...")]


@commands.command()
def submit(
    search_id: SearchId,
    trial: Annotated[int | None, typer.Option(min=0, help="Number of a trial that the confirm step verified; default: the winner.")] = None,
    budget: Annotated[int, typer.Option(min=0, help="Whose winner, of a search with several budgets.")] = 0,
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", help="NAME=VALUE instead of the bundle's, such as tokens=2000000000; may be repeated.")
    ] = None,
    cpus: Annotated[float, typer.Option(help="CPU cores.")] = 1.0,
    gpus: Annotated[float, typer.Option(help="One GPU, or a share of one.")] = 0.0,
    max_attempts: Annotated[int, typer.Option(min=1, help="Times that it may fail.")] = 3,
    label: Annotated[str, typer.Option(help="For people.")] = "",
    idempotency_key: Annotated[str | None, typer.Option(help="The same key and request again give the same distillation.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Distil a search's student in full, as its bundle's recipe says; prints the distillation's id."""
    request = {
        "search_id": search_id,
        "trial": trial,
        "budget": budget,
        "recipe": _read_recipe(recipe or []),
        "resources": {"cpus": cpus, "gpus": gpus},
        "limits": {"max_attempts": max_attempts},
        "label": label,
    }
    with make_client(url) as client:
        made = client.distil(json.dumps(request).encode(), idempotency_key=idempotency_key)
    if as_json:
        print_json(made)
        return
    sys.stdout.write(made["id"] + "\n")
    say(f"trial {made['trial']}, {made['tokens']:,} tokens; follow with: nas distillations watch {made['id']}")


def _read_recipe(texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE each; a value is JSON, or a bare word."""
    recipe: dict[str, Any] = {}
    for name, value in read_pairs(texts, option="--recipe").items():
        try:
            recipe[name] = json.loads(value)
        except ValueError:
            recipe[name] = value
    return recipe


@commands.command("list")
def list_distillations(
    search: Annotated[str | None, typer.Option(help="Only those of this search's students.")] = None,
    state: Annotated[str | None, typer.Option(help="Only those in this state.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Full distillations, newest first."""
    with make_client(url) as client:
        found = client.distillations(search=search, state=state)
    if as_json:
        print_json(found)
        return
    names = ("id", "state", "search", "trial", "tokens", "label")
    print_rows([{**{name: one[name] for name in names}, "created": one["created_at"][:16].replace("T", " ")} for one in found], as_json=False)


@commands.command()
def show(distillation_id: DistillationId, url: Url = None, as_json: Json = False) -> None:
    """Where a distillation stands, and what came out. With --json: all that is known of it."""
    with make_client(url) as client:
        found = client.distillation(distillation_id)
    if as_json:
        print_json(found)
        return
    names = ("id", "state", "search", "trial", "label", "tokens_done", "tokens", "created_at", "updated_at")
    error = {"error": found["error"]} if found["error"] else {}
    print_facts({**{name: found[name] for name in names}, "attempts": len(found["attempts"]), **_result_facts(found["result"]), **error}, as_json=False)


def _result_facts(result: Mapping[str, Any] | None) -> dict[str, Any]:
    """What came out: the held-out likelihood before and after, and the file."""
    if not result:
        return {}
    held_out = {
        f"held-out {title} {when}": f"{measured[name]:.4g} ± {measured[f'{name}_standard_error']:.2g}"
        for name, title in (("kl", "KL"), ("loss", "loss"))
        for when in ("before", "after")
        if (measured := result[f"held_out_{when}"])
    }
    return {**held_out, "seconds": result["seconds"], "bytes": result["bytes"], "sha256": result["sha256"]}


@commands.command()
def watch(distillation_id: DistillationId, url: Url = None, as_json: Json = False) -> None:
    """Follow a distillation until it ends; exit code 1 if it did not succeed. With --json: its events, one per line."""
    with make_client(url) as client:
        if as_json:
            print_events(client.follow_distillation(distillation_id), as_json=True)
        else:
            follow(
                client.follow_distillation(distillation_id, on_break=tell_break),
                status_line=lambda: _status_line(client.distillation(distillation_id)),
            )
        state = client.distillation(distillation_id)["state"]
    exit_unless_well(state)


def _status_line(found: dict[str, Any]) -> str:
    left = "" if found["seconds_left"] is None else f"  about {duration(found['seconds_left'])} left"
    loss = f"  loss {found['points'][-1]['loss']:.4f}" if found["points"] else ""
    return f"{found['state']}  {found['tokens_done']:,} / {found['tokens']:,} tokens{loss}{left}"


@commands.command()
def logs(
    distillation_id: DistillationId,
    attempt: Annotated[str | None, typer.Option(help="Id of an attempt; default: the latest.")] = None,
    url: Url = None,
) -> None:
    """The end of what its latest attempt said."""
    with make_client(url) as client:
        write(client.distillation_log(distillation_id, attempt=attempt))


@commands.command()
def events(distillation_id: DistillationId, url: Url = None, as_json: Json = False) -> None:
    """What happened so far; `nas distillations watch` goes on with what happens. With --json: all events, one per line."""
    with make_client(url) as client:
        print_events(client.distillation_events(distillation_id), as_json=as_json)


@commands.command()
def cancel(distillation_id: DistillationId, url: Url = None, as_json: Json = False) -> None:
    """Stop a distillation; what it has trained goes."""
    with make_client(url) as client:
        found = client.cancel_distillation(distillation_id)
    print_facts({"id": found["id"], "state": found["state"]}, as_json=as_json)


@commands.command()
def download(distillation_id: DistillationId, target: Annotated[Path, typer.Argument(help="File to write.")], url: Url = None) -> None:
    """Save the distilled model as one tar file, its digest checked."""
    with make_client(url) as client:
        client.download_distillation(distillation_id, target=target)
    say(f"saved {target}")


@commands.command()
def delete(distillation_id: DistillationId, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False, url: Url = None) -> None:
    """Forget a distillation that has ended, with its file."""
    if not yes:
        typer.confirm(f"Delete {distillation_id} with the model that it made?", abort=True, err=True)
    with make_client(url) as client:
        client.delete_distillation(distillation_id)
    say(f"deleted {distillation_id}")
