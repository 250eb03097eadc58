"""Submitting, following and reading searches, over REST."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from nas.cli.errors import FAILED
from nas.cli.options import Json, SearchId, Url
from nas.client import TERMINAL_STATES, Client, read_api_key
from nas.errors import InvalidSpec, Problem
from nas.settings import Settings
from nas.shape import Shape
from nas.terminal import board_facts, comparison_tables, event_line, leaderboard_table, out, print_facts, print_json, print_rows, say, status_line

if TYPE_CHECKING:
    from nas.search.study import ExportedTrial

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
    _exit_unless_well(state)


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
    print_rows([{"quota": name, "limit": limit, "used": used[name]} for name, limit in project["quotas"].items()], as_json=False)


@commands.command("list")
def list_searches(state: Annotated[str | None, typer.Option(help="Only searches in this state.")] = None, url: Url = None, as_json: Json = False) -> None:
    """Searches, newest first."""
    with make_client(url) as client:
        searches = client.searches(state=state)
    if as_json:
        print_json(searches)
        return
    rows = [
        {
            "id": search["id"],
            "state": search["state"],
            "trials": f"{search['progress']['settled']}/{search['progress']['planned']}",
            "created": search["created_at"][:16].replace("T", " "),
            "teacher": search["teacher"],
            "label": search["label"],
        }
        for search in searches
    ]
    print_rows(rows, as_json=False)


@commands.command()
def watch(search_id: SearchId, url: Url = None, as_json: Json = False) -> None:
    """Follow a search until it ends; exit code 1 if it did not succeed. With --json: its events, one per line."""
    with make_client(url) as client:
        if as_json:
            for event in client.follow(search_id):
                sys.stdout.write(json.dumps(event) + "\n")
                sys.stdout.flush()
        state = client.search(search_id)["state"] if as_json else _follow(client, search_id, show=True)
    _exit_unless_well(state)


BudgetIndex = Annotated[int, typer.Option("--budget", help="Which budget of a search that has several; 0 is the first.")]


@commands.command()
def leaderboard(
    search_id: SearchId,
    csv: Annotated[bool, typer.Option("--csv", help="As CSV, all rows.")] = False,
    budget: BudgetIndex = 0,
    sort: Annotated[str, typer.Option(help="rank, score, kl or parameters; -NAME for the other way round.")] = "rank",
    state: Annotated[str | None, typer.Option(help="Only trials in this state.")] = None,
    rung: Annotated[int | None, typer.Option(help="Only trials whose deepest finished rung this is.")] = None,
    pareto: Annotated[bool | None, typer.Option("--pareto", help="Only trials of the front.")] = None,
    min_parameters: Annotated[int | None, typer.Option(help="Only shapes with at least so many parameters.")] = None,
    max_parameters: Annotated[int | None, typer.Option(help="Only shapes with at most so many parameters.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table at most; --csv and --json have all.")] = 100,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """The leaderboard of a search. Rows that share a rank (=) cannot be told apart; * is the winner, ✓ a file that was verified."""
    if csv and as_json:
        raise InvalidSpec(Problem(field="--csv", expected="one of --csv and --json", got="both"))
    query = {"budget": budget, "sort": sort, "state": state, "rung": rung, "pareto": pareto or None}
    query |= {"min_parameters": min_parameters, "max_parameters": max_parameters}
    with make_client(url) as client:
        if csv:
            sys.stdout.write(client.leaderboard_csv(search_id, **query))
            return
        board = client.leaderboard(search_id, most=None if as_json else rows, **query)
        spec = client.search(search_id)["spec"]
    num_budgets = 1 + len(spec["more_budgets"])
    if num_budgets > 1 and not as_json:
        say(f"budget {budget} of this search's 0 to {num_budgets - 1}; --budget N shows another")
    if as_json:
        print_json(board)
    elif not board["rows"]:
        say("no row is like that" if board["num_rows"] else "no trial has been measured yet")
    else:
        table = leaderboard_table(board, width=out.width, objectives=spec["objectives"])
        out.print(table)
        if hidden := len(leaderboard_table(board, objectives=spec["objectives"]).columns) - len(table.columns):
            say(f"{hidden} columns are left out, as the terminal is narrow; --csv and --json have all")
        if board["has_more"]:
            say(f"the first {len(board['rows'])} rows of a board of {board['num_rows']:,}; --rows N shows more, --csv and --json all")
        print_facts(board_facts(board), as_json=False)


@commands.command()
def compare(
    first: Annotated[str, typer.Argument(help="Id of a search (A).")],
    second: Annotated[str, typer.Argument(help="Id of another search (B).")],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Two searches side by side: what was asked differently, the shapes on both boards, best against best, and what each took."""
    with make_client(url) as client:
        comparison = client.compare(first, second)
    if as_json:
        print_json(comparison)
        return
    for title, rows in comparison_tables(comparison).items():
        out.print(title, style="bold", highlight=False)
        print_rows(rows, as_json=False)
        out.print()


@commands.command()
def winner(
    search_id: SearchId,
    bundle: Annotated[Path | None, typer.Option(help="Save the bundle (a tar file) here, or as bundle.tar in this folder.")] = None,
    budget: BudgetIndex = 0,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """The winning shape, and its bundle."""
    with make_client(url) as client:
        document = client.winner(search_id, budget=budget)
        if bundle is not None:
            saved = client.download_bundle(search_id, target=bundle / "bundle.tar" if bundle.is_dir() else bundle, budget=budget)
            say(f"saved {saved}")
    if as_json:
        print_json(document)
    else:
        shown = {"trial": document["trial"], **document["shape"], "parameters": document["parameters"], "share_of_teacher": document["share_of_teacher"]}
        print_facts({**shown, "bundle_sha256": document["bundle_sha256"]}, as_json=False)


@commands.command()
def cancel(search_id: SearchId, url: Url = None, as_json: Json = False) -> None:
    """Cancel a search; what it has measured stays."""
    with make_client(url) as client:
        search = client.cancel(search_id)
    print_facts({"id": search["id"], "state": search["state"]}, as_json=as_json)


def _follow(client: Client, search_id: str, *, show: bool) -> str:
    """Wait for the end of a search; returns its state. On a terminal its last line says where the search stands."""
    shown = out if show else Console(quiet=True)
    looked = 0.0
    with shown.status("", spinner="dots") as status:
        for event in client.follow(search_id):
            if line := event_line(event):
                shown.print(line, markup=False, highlight=False, soft_wrap=True)
            if shown.is_terminal and time.monotonic() - looked > 1.0:
                status.update(status_line(client.search(search_id)))
                looked = time.monotonic()
    return str(client.search(search_id)["state"])


def _exit_unless_well(state: str) -> None:
    if state in TERMINAL_STATES and state != "succeeded":
        raise typer.Exit(FAILED)


@commands.command("export-optuna")
def export_optuna(
    search_id: SearchId,
    file: Annotated[Path, typer.Argument(help="New file: SQLite, or an Optuna journal where the name ends in .log or .journal.")],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Write a search as an Optuna study, which optuna-dashboard opens."""
    from nas.search.study import export_study

    with make_client(url) as client:
        search = client.search(search_id)
        boards = [client.leaderboard(search_id, budget=budget) for budget in range(1 + len(search["spec"]["more_budgets"]))]
        rows = {row["number"]: row for board in boards for row in board["rows"]}
        objectives = ("score", *search["spec"]["objectives"])
        trials = [
            _exported(client.trial(search_id, trial["number"]), row=rows.get(trial["number"]), objectives=objectives) for trial in client.trials(search_id)
        ]
    export_study(trials, path=file, name=search_id, objectives=objectives)
    print_facts({"file": str(file), "study": search_id, "trials": len(trials)}, as_json=as_json)


def _exported(trial: Mapping[str, Any], *, row: Mapping[str, Any] | None, objectives: Sequence[str]) -> ExportedTrial:
    """A trial of the API with its row of the board. One that reached the last rung, but is not on the board yet, is still running there."""
    from nas.search.study import ExportedTrial

    ranked = row if row is not None and row["rank"] is not None else None
    names = ("rank", "tie_group", "standard_error", "verified", "probability_best")
    return ExportedTrial(
        number=trial["number"],
        origin=trial["origin"],
        shape=Shape.from_dict({name: value for name, value in trial["shape"].items() if value is not None}),
        state="running" if trial["state"] == "completed" and ranked is None else trial["state"],
        values=[] if ranked is None else [ranked["score"], *(ranked["costs"][name] for name in objectives[1:])],
        kl_by_tokens={rung["tokens"]: rung["kl"]["value"] for rung in trial["rungs"]},
        attributes={"parameters": trial["parameters"], "budget": trial["budget"], **{name: row[name] for name in names if row is not None}},
    )
