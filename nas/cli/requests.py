"""What a user asks of a search that is there, over REST: pause, resume, cancel, retry a trial, extend, delete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from nas.cli.options import Json, Labels, SearchId, Url, read_pairs
from nas.cli.searches import make_client
from nas.errors import InvalidSpec, Problem
from nas.terminal import print_facts, say

commands = typer.Typer()


@commands.command()
def cancel(search_id: SearchId, url: Url = None, as_json: Json = False) -> None:
    """Cancel a search; what it has measured stays."""
    with make_client(url) as client:
        _tell(client.cancel(search_id), as_json=as_json)


@commands.command()
def pause(search_id: SearchId, url: Url = None, as_json: Json = False) -> None:
    """Pause a search: what runs is asked to stop and keeps its checkpoints."""
    with make_client(url) as client:
        _tell(client.pause(search_id), as_json=as_json)


@commands.command()
def resume(search_id: SearchId, url: Url = None, as_json: Json = False) -> None:
    """Let a paused search go on from where it is."""
    with make_client(url) as client:
        _tell(client.resume(search_id), as_json=as_json)


@commands.command()
def retry(search_id: SearchId, number: Annotated[int, typer.Argument(help="Number of a failed trial.")], url: Url = None, as_json: Json = False) -> None:
    """Let a failed trial try its next rung again; its failures so far count no more."""
    with make_client(url) as client:
        trial = client.retry(search_id, number)
    print_facts({"search": search_id, "trial": trial["number"], "state": trial["state"]}, as_json=as_json)


@commands.command()
def extend(
    search_id: SearchId,
    max_trials: Annotated[int | None, typer.Option(min=1, help="Shapes that it proposes, for each budget.")] = None,
    max_parallel_trials: Annotated[int | None, typer.Option(min=1, help="Trials that run at once.")] = None,
    label: Labels = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Change a search that has not ended: more shapes, more of them at once, other labels (all of them, in place of those that it has)."""
    if (max_trials, max_parallel_trials, label) == (None, None, None):
        raise InvalidSpec(Problem(field="extend", expected="--max-trials, --max-parallel-trials or --label", got="none of them"))
    with make_client(url) as client:
        labels = None if label is None else read_pairs(label, option="--label")
        search = client.update(search_id, max_trials=max_trials, max_parallel_trials=max_parallel_trials, labels=labels)
    spec = search["spec"]
    facts = {"max_trials": spec["sampler"]["max_trials"], "max_parallel_trials": spec["resources"]["max_parallel_trials"], "labels": search["labels"]}
    print_facts({"id": search["id"], "state": search["state"], **facts}, as_json=as_json)


@commands.command()
def delete(search_id: SearchId, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False, url: Url = None) -> None:
    """Forget a search that has ended, with its trials, results and files."""
    if not yes:
        typer.confirm(f"Delete {search_id} with all its results and files?", abort=True, err=True)
    with make_client(url) as client:
        client.delete(search_id)
    say(f"deleted {search_id}; a controller removes its files within minutes")


def _tell(search: Mapping[str, Any], *, as_json: bool) -> None:
    print_facts({"id": search["id"], "state": search["state"]}, as_json=as_json)
