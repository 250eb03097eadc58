"""Submitting, listing and following searches, over REST."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nas.cli.following import exit_unless_well, follow, print_events, tell_break
from nas.cli.options import Json, Labels, SearchId, Url, read_pairs
from nas.client import Client, read_api_key
from nas.errors import InvalidSpec, Problem
from nas.settings import Settings
from nas.terminal import Terminal, out, print_facts, print_json, print_rows, say, status_line

commands = typer.Typer()


def make_client(url: str | None) -> Client:
    settings = Settings.from_environment(os.environ)
    return Client(url or f"http://{settings.host}:{settings.port}", api_key=read_api_key(os.environ))


@commands.command()
def submit(
    spec: Annotated[Path, typer.Argument(help="Spec file (JSON); - for standard input.")],
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to its end.")] = False,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key and spec again give the same search.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Submit a search; prints its id.

    The least that a spec says, all else has a default (see /docs of the service):

    \b
    {"teacher": "NAME", "corpus": {"parts": [{"name": "NAME"}]},
     "tasks": [{"name": "NAME"}], "budget": {"max_fraction": 0.6}}
    """
    body = read_spec(spec)
    with make_client(url) as client:
        search = client.submit(body, idempotency_key=idempotency_key)
        if not as_json:
            sys.stdout.write(search["id"] + "\n")
            sys.stdout.flush()
            say(f"{search['plan']['legal_shapes']:,} legal shapes; follow with: nas watch {search['id']}")
        state = _follow(client, search["id"], show=not as_json) if wait else search["state"]
        if as_json:
            print_json(client.search(search["id"]) if wait else search)
    exit_unless_well(state)


def read_spec(path: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise InvalidSpec(Problem(field="spec", expected="a readable file", got=str(error))) from error


@commands.command()
def whoami(url: Url = None, as_json: Json = False) -> None:
    """The project and the scopes of the API key, and what is left of the project's quotas."""
    with make_client(url) as client:
        project = client.project()
    if as_json:
        print_json(project)
        return
    print_facts({"project": project["name"], "key": project["key_id"], "scopes": project["scopes"]}, as_json=False)
    used = dict(zip(project["quotas"], project["usage"].values(), strict=True))
    limits = {name: "no limit" if limit is None else limit for name, limit in project["quotas"].items()}
    print_rows([{"quota": name, "limit": limit, "used": used[name]} for name, limit in limits.items()], as_json=False)


@commands.command("list")
def list_searches(
    state: Annotated[str | None, typer.Option(help="Only searches in this state.")] = None,
    label: Labels = None,
    created_after: Annotated[str | None, typer.Option(help="Only those submitted at this time or later, such as 2026-11-22T09:00:00Z.")] = None,
    created_before: Annotated[str | None, typer.Option(help="Only those submitted before this time.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Searches, newest first."""
    with make_client(url) as client:
        searches = client.searches(state=state, labels=read_pairs(label or (), option="--label"), created_after=created_after, created_before=created_before)
    if as_json:
        print_json(searches)
        return
    rows = [
        {
            "id": search["id"],
            "state": search["state"],
            "settled": f"{search['progress']['settled']}/{search['progress']['planned']}",
            "created": search["created_at"][:16].replace("T", " "),
            "teacher": search["teacher"],
            "label": " ".join(filter(None, (search["label"], *(f"{name}={value}" for name, value in search["labels"].items())))),
        }
        for search in searches
    ]
    print_rows(rows, as_json=False)


@commands.command()
def show(search_id: SearchId, url: Url = None, as_json: Json = False) -> None:
    """Where a search stands: state, progress, best shape, cost, and why it failed. With --json: all that is known of it."""
    with make_client(url) as client:
        search = client.search(search_id)
    if as_json:
        print_json(search)
        return
    say(status_line(search))
    cost = {"distillation_tokens": search["cost"]["distillation_tokens"], "device_seconds": search["cost"]["device_seconds"]}
    plan = {"legal_shapes": search["plan"].get("legal_shapes"), "max_parameters": search["max_parameters"]}
    named = {name: search[name] for name in ("id", "state", "label", "labels", "teacher")}
    error = {"error": search["error"]} if search["error"] else {}
    named |= {"waits_for": search["waits_for"]} if search["waits_for"] else {}
    print_facts({**named, **plan, **search["progress"], **cost, "created_at": search["created_at"], "updated_at": search["updated_at"], **error}, as_json=False)


@commands.command()
def watch(search_id: SearchId, url: Url = None, as_json: Json = False) -> None:
    """Follow a search until it ends; exit code 1 if it did not succeed. With --json: its events, one per line."""
    with make_client(url) as client:
        if as_json:
            print_events(client.follow(search_id), as_json=True)
        state = client.search(search_id)["state"] if as_json else _follow(client, search_id, show=True)
    exit_unless_well(state)


@commands.command()
def wait(search_id: SearchId, url: Url = None, as_json: Json = False) -> None:
    """Wait for a search to end, and say no more than its state; exit code 1 if it did not succeed. For scripts."""
    with make_client(url) as client:
        state = _follow(client, search_id, show=False)
    print_facts({"id": search_id, "state": state}, as_json=as_json)
    exit_unless_well(state)


def _follow(client: Client, search_id: str, *, show: bool) -> str:
    """Wait for the end of a search; returns its state. On a terminal its last line says where the search stands."""
    events = client.follow(search_id, on_break=tell_break if show else None)
    follow(events, status_line=lambda: status_line(client.search(search_id)), shown=out if show else Terminal(quiet=True))
    return str(client.search(search_id)["state"])
